"""A stage resumes from the latest complete checkpoint: one file, or the shards of two ranks."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from composer import Callback, Logger, State, Trainer
from ranks import two_ranks
from torch.multiprocessing import ProcessRaisedException

import ssmvl
from ssmvl.checkpoints import read_tensors
from ssmvl.errors import RecipeError, RunError
from ssmvl.training.checkpoints.export import export
from ssmvl.training.checkpoints.latest import latest_complete, outdated
from ssmvl.training.checkpoints.stores import BucketStore
from ssmvl.training.session import Session

pytestmark = pytest.mark.filterwarnings("default")  # Composer and streaming warn by themselves
ONE_STAGE = (
    "stages.align=null",
    "stages.order=null",
    "stages.finetune.duration=6ba",
    "stages.finetune.checkpoint=2ba",
    "evaluation=null",
)
CHECKPOINTS, MODEL = Path("runs/tiny/finetune/checkpoints"), Path("runs/tiny/model")


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated": truncate,
    "truncated by one byte": lambda path: os.truncate(path, path.stat().st_size - 1),
    "empty": lambda path: os.truncate(path, 0),
    "another file": lambda path: path.write_text("no checkpoint"),
    "missing": Path.unlink,
}


def latest_file(folder: Path) -> Path:
    """Return the file of the latest checkpoint, or its second shard."""
    (checkpoint,) = (path for path in folder.iterdir() if path.name.startswith("ep0-ba6"))
    return checkpoint / "__1_0.distcp" if checkpoint.is_dir() else checkpoint


def train(tiny: Path, ranks: int, capfd: pytest.CaptureFixture[str], *options: str) -> str:
    if ranks == 1:
        capfd.readouterr()
        ssmvl.train(tiny, *ONE_STAGE, *options)
        return capfd.readouterr().out
    for name in ("store", "rank0.txt", "rank1.txt"):
        (tiny.parent / name).unlink(missing_ok=True)
    return two_ranks(lambda: ssmvl.train(tiny, *ONE_STAGE, *options), tiny.parent)[0]


@pytest.mark.long
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_damaged_checkpoint_is_skipped(
    tiny: Path, ranks: int, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert "stage finetune: started" in train(tiny, ranks, capfd)
    expected, _ = read_tensors(MODEL / "model.safetensors")
    original = tmp_path / "original"
    shutil.copytree(CHECKPOINTS, original, symlinks=True)
    for name, damage in DAMAGES.items():
        folder = tmp_path / name
        shutil.copytree(original, folder, symlinks=True)
        damage(latest_file(folder))
        checkpoint, skipped = latest_complete(folder)
        assert checkpoint is not None
        assert checkpoint.name.startswith("ep0-ba4"), name
        assert len(skipped) == (0 if ranks == 1 and name == "missing" else 1)
        assert all(f"{folder}/ep0-ba6" in reason for reason in skipped.values())
    truncate(latest_file(CHECKPOINTS))
    shutil.rmtree(MODEL)
    output = train(tiny, ranks, capfd)
    assert "stage finetune: skipping a checkpoint: runs/tiny/finetune/checkpoints/ep0-ba6" in output
    assert "stage finetune: resumed at step 4," in output
    assert "changed since the first launch" not in output
    resumed, _ = read_tensors(MODEL / "model.safetensors")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in expected.items())


def test_the_latest_complete_ones_are_kept(tmp_path: Path) -> None:
    assert latest_complete(tmp_path) == (None, {})
    names = [f"ep0-ba{step}-rank0.pt" for step in (9, 10, 100, 101)]
    for name in names:
        torch.save({}, tmp_path / name)
    (tmp_path / "ep0-ba1000-rank0.pt.partial").touch()
    assert latest_complete(tmp_path) == (tmp_path / names[3], {})
    assert [path.name for path in outdated(tmp_path, 1)] == [names[2], names[1], names[0]]
    truncate(tmp_path / names[3])
    assert [path.name for path in outdated(tmp_path, 1)] == [names[1], names[0]]
    truncate(tmp_path / names[1])
    assert [path.name for path in outdated(tmp_path, 2)] == []
    assert [path.name for path in outdated(tmp_path, 3)] == []
    for path in tmp_path.glob("*.pt"):
        truncate(path)
    checkpoint, skipped = latest_complete(tmp_path)
    assert checkpoint is None
    assert len(skipped) == 4


def test_checkpoints_of_earlier_launches_are_removed_too(tiny: Path, capfd: pytest.CaptureFixture[str]) -> None:
    elsewhere = "checkpoints=elsewhere"
    folder = Path("elsewhere/tiny/finetune")
    ssmvl.train(tiny, *ONE_STAGE, elsewhere, "stages.finetune.keep=3")
    assert {path.name for path in folder.iterdir()} == {f"ep0-ba{step}-rank0.pt" for step in (2, 4, 6)}
    assert not CHECKPOINTS.exists()
    shutil.rmtree(MODEL)
    (folder / "ep0-ba6-rank0.pt").unlink()
    output = train(tiny, 1, capfd, elsewhere, "stages.finetune.keep=1")
    assert "changed since the first launch: stages.finetune.keep: was 3, is now 1" in output
    assert "resumed at step 4," in output
    assert {path.name for path in folder.iterdir()} == {"ep0-ba6-rank0.pt"}


@pytest.mark.long
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_an_optimizer_resumes_with_the_current_options(
    tiny: Path, ranks: int, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if it had had them from the start."""

    class Options(Callback):
        def batch_end(self, state: State, logger: Logger) -> None:
            if state.timestamp.batch.value == 5:
                (optimizer,), (scheduler,) = state.optimizers, state.schedulers
                keys = ("lr", "weight_decay", "betas")
                print([[group[key] for key in keys] for group in optimizer.param_groups], scheduler.base_lrs, "at 5")

    stage_trainer = Session.trainer

    def watched(session: Session, *arguments: Any) -> Trainer:
        trainer = stage_trainer(session, *arguments)
        trainer.state.callbacks.append(Options())
        return trainer

    monkeypatch.setattr(Session, "trainer", watched)

    def at_5(output: str) -> str:
        return next(line for line in output.splitlines() if line.endswith("at 5"))

    current = "stages.finetune.optimizer={lr: 0.004, weight_decay: 0.2, betas: [0.8, 0.9]}"
    expected = at_5(train(tiny, ranks, capfd, current, "run=current"))
    initial = at_5(train(tiny, ranks, capfd, "stages.finetune.optimizer.weight_decay=0.1"))
    shutil.rmtree(MODEL)
    latest_file(CHECKPOINTS).unlink()
    output = train(tiny, ranks, capfd, current)
    assert "resumed at step 4," in output
    assert at_5(output) == expected != initial
    shutil.rmtree(MODEL)
    latest_file(CHECKPOINTS).unlink()
    with pytest.raises(RunError if ranks == 1 else ProcessRaisedException, match=r"groups|param_groups"):
        train(tiny, ranks, capfd, "stages.finetune.optimizer.lr_of={connector: 0.001}")


def test_a_bucket_is_searched_like_a_directory(
    tmp_path: Path, bucket: str, objects: Callable[[], dict[str, bytes]], put: Callable[[str, bytes], None]
) -> None:
    """Only the ends of large files are downloaded."""
    store = BucketStore(f"{bucket}/run/stage")
    assert store.latest() == (None, [])
    torch.save({"x": torch.zeros(10**6)}, path := tmp_path / "file.pt")
    complete = path.read_bytes()
    for step in (8, 9, 10, 11):
        content = complete if step != 11 else complete[:-1]
        put(f"run/stage/ep0-ba{step}-rank0.pt", content)
    for shard, size in (("__0_0.distcp", 5), (".metadata", 3)):
        put(f"run/stage/ep0-ba12/{shard}", b"x" * size)
    for other in (
        "run/stage/",
        "run/stage/ep0-ba5/",
        "run/stage/notes.txt",
        "run/stage/ep0-ba1/../../x",
        "run/stage2/ep0-ba12-rank0.pt",
    ):
        put(other, b"")
    latest, (shards, file) = store.latest()
    assert shards.startswith(f"{bucket}/run/stage/ep0-ba12 cannot be read")
    assert not [key for key in objects() if "ba12/" in key]  # next to old shards a new index would be wrong
    assert latest == f"{bucket}/run/stage/ep0-ba10-rank0.pt"
    assert file.startswith(f"{bucket}/run/stage/ep0-ba11-rank0.pt cannot be read")
    before = set(objects())
    store.remove_old(2)
    assert before - set(objects()) == {"run/stage/ep0-ba8-rank0.pt"}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_checkpoints_in_a_bucket(
    tiny: Path,
    ranks: int,
    bucket: str,
    objects: Callable[[], dict[str, bytes]],
    put: Callable[[str, bytes], None],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    location = f"checkpoints={bucket}/all"

    def checkpoints() -> set[str]:
        return {name.split("/")[3] for name in objects() if name.startswith("all/tiny/finetune/")}

    monkeypatch.setenv("TMPDIR", str(tiny.parent / "t"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    Path("t").mkdir()  # short: the path of a socket in it is limited to 107 characters
    assert "stage finetune: started" in train(tiny, ranks, capfd, location)
    assert not list(Path("t").rglob("*.distcp"))
    expected, _ = read_tensors(MODEL / "model.safetensors")
    end = "-rank0.pt" if ranks == 1 else ""
    assert checkpoints() == {f"ep0-ba4{end}", f"ep0-ba6{end}"}
    shutil.rmtree(MODEL)
    store = BucketStore(f"{bucket}/all/tiny/finetune")
    assert store.latest() == (f"{bucket}/all/tiny/finetune/ep0-ba6{end}", [])
    name = f"all/tiny/finetune/ep0-ba6{end}" + ("" if ranks == 1 else "/__1_0.distcp")
    put(name, objects()[name][:1000])
    output = train(tiny, ranks, capfd, location)
    assert f"stage finetune: skipping a checkpoint: {bucket}/all/tiny/finetune/ep0-ba6" in output
    assert "stage finetune: resumed at step 4," in output
    assert "changed since the first launch" not in output
    export(f"{bucket}/all/tiny/finetune", "exported", recipe="runs/tiny")
    for model in (MODEL, Path("exported")):
        tensors, _ = read_tensors(model / "model.safetensors")
        assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())


def test_a_missing_bucket_is_reported_before_training(tiny: Path, bucket: str) -> None:
    with pytest.raises(RunError, match=r"s3://no-such-bucket/tiny/finetune cannot be used .*NoSuchBucket"):
        ssmvl.train(tiny, *ONE_STAGE, "checkpoints=s3://no-such-bucket")
    with pytest.raises(RecipeError, match=r"checkpoints: .*a directory, or .* s3://BUCKET/DIR"):
        ssmvl.train(tiny, *ONE_STAGE, "checkpoints=gs://bucket")
    with pytest.raises(RecipeError, match=r"checkpoints: .*a directory, or .* s3://BUCKET/DIR"):
        ssmvl.train(tiny, *ONE_STAGE, "checkpoints=s3://")
