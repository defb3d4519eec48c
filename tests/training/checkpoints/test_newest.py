"""A stage goes on from the newest checkpoint that is whole: one file, or the shards of two ranks."""

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
from ssmvl.training.checkpoints.newest import newest_whole, surplus
from ssmvl.training.checkpoints.stores import BucketStore
from ssmvl.training.session import Session

pytestmark = pytest.mark.filterwarnings("default")  # Composer and streaming warn on their own account
ONE_STAGE = (
    "stages.align=null",
    "stages.order=null",
    "stages.finetune.duration=6ba",
    "stages.finetune.checkpoint=2ba",
    "evaluation=null",
)
CHECKPOINTS, MODEL = Path("runs/tiny/finetune/checkpoints"), Path("runs/tiny/model")


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut": cut,
    "cut at its end": lambda path: os.truncate(path, path.stat().st_size - 1),
    "empty": lambda path: os.truncate(path, 0),
    "something else": lambda path: path.write_text("no checkpoint"),
    "gone": Path.unlink,
}


def newest(folder: Path) -> Path:
    """The file of the newest checkpoint, or of its second shard."""
    (found,) = (path for path in folder.iterdir() if path.name.startswith("ep0-ba6"))
    return found / "__1_0.distcp" if found.is_dir() else found


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
def test_the_one_before_a_damaged_checkpoint_is_used(
    tiny: Path, ranks: int, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert "stage finetune: started" in train(tiny, ranks, capfd)
    wanted, _ = read_tensors(MODEL / "model.safetensors")
    kept = tmp_path / "kept"
    shutil.copytree(CHECKPOINTS, kept, symlinks=True)
    for name, damage in DAMAGES.items():
        folder = tmp_path / name
        shutil.copytree(kept, folder, symlinks=True)
        damage(newest(folder))
        found, passed = newest_whole(folder)
        assert found is not None
        assert found.name.startswith("ep0-ba4"), name
        assert len(passed) == (0 if ranks == 1 and name == "gone" else 1)
        assert all(f"{folder}/ep0-ba6" in text for text in passed.values())
    cut(newest(CHECKPOINTS))
    shutil.rmtree(MODEL)
    said = train(tiny, ranks, capfd)
    assert "stage finetune: passes over a checkpoint: runs/tiny/finetune/checkpoints/ep0-ba6" in said
    assert "stage finetune: resumed at step 4," in said
    assert "unlike" not in said
    found, _ = read_tensors(MODEL / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_the_newest_whole_ones_are_kept(tmp_path: Path) -> None:
    assert newest_whole(tmp_path) == (None, {})
    names = [f"ep0-ba{step}-rank0.pt" for step in (9, 10, 100, 101)]
    for name in names:
        torch.save({}, tmp_path / name)
    (tmp_path / "ep0-ba1000-rank0.pt.partial").touch()
    assert newest_whole(tmp_path) == (tmp_path / names[3], {})
    assert [path.name for path in surplus(tmp_path, 1)] == [names[2], names[1], names[0]]
    cut(tmp_path / names[3])
    assert [path.name for path in surplus(tmp_path, 1)] == [names[1], names[0]]
    cut(tmp_path / names[1])
    assert [path.name for path in surplus(tmp_path, 2)] == []
    assert [path.name for path in surplus(tmp_path, 3)] == []
    for path in tmp_path.glob("*.pt"):
        cut(path)
    found, passed = newest_whole(tmp_path)
    assert found is None
    assert len(passed) == 4


def test_checkpoints_of_earlier_launches_are_removed_too(tiny: Path, capfd: pytest.CaptureFixture[str]) -> None:
    elsewhere = "checkpoints=elsewhere"
    folder = Path("elsewhere/tiny/finetune")
    ssmvl.train(tiny, *ONE_STAGE, elsewhere, "stages.finetune.keep=3")
    assert {path.name for path in folder.iterdir()} == {f"ep0-ba{step}-rank0.pt" for step in (2, 4, 6)}
    assert not CHECKPOINTS.exists()
    shutil.rmtree(MODEL)
    (folder / "ep0-ba6-rank0.pt").unlink()
    said = train(tiny, 1, capfd, elsewhere, "stages.finetune.keep=1")
    assert "unlike runs/tiny/recipe.yaml, stages.finetune.keep: 3 there, 1 here; this counts from now on" in said
    assert "resumed at step 4," in said
    assert {path.name for path in folder.iterdir()} == {"ep0-ba6-rank0.pt"}


@pytest.mark.long
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_an_optimizer_goes_on_with_the_options_of_now(
    tiny: Path, ranks: int, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it would be, had it had them from its beginning."""

    class Options(Callback):
        def batch_end(self, state: State, logger: Logger) -> None:
            if state.timestamp.batch.value == 5:
                (optimizer,), (scheduler,) = state.optimizers, state.schedulers
                keys = ("lr", "weight_decay", "betas")
                print([[group[key] for key in keys] for group in optimizer.param_groups], scheduler.base_lrs, "at 5")

    stage_trainer = Session.trainer

    def watched(session: Session, *given: Any) -> Trainer:
        found = stage_trainer(session, *given)
        found.state.callbacks.append(Options())
        return found

    monkeypatch.setattr(Session, "trainer", watched)

    def at_5(said: str) -> str:
        return next(line for line in said.splitlines() if line.endswith("at 5"))

    now = "stages.finetune.optimizer={lr: 0.004, weight_decay: 0.2, betas: [0.8, 0.9]}"
    wanted = at_5(train(tiny, ranks, capfd, now, "run=now"))
    began = at_5(train(tiny, ranks, capfd, "stages.finetune.optimizer.weight_decay=0.1"))
    shutil.rmtree(MODEL)
    newest(CHECKPOINTS).unlink()
    said = train(tiny, ranks, capfd, now)
    assert "resumed at step 4," in said
    assert at_5(said) == wanted != began
    shutil.rmtree(MODEL)
    newest(CHECKPOINTS).unlink()
    with pytest.raises(RunError if ranks == 1 else ProcessRaisedException, match=r"groups|param_groups"):
        train(tiny, ranks, capfd, "stages.finetune.optimizer.lr_of={connector: 0.001}")


def test_a_bucket_is_looked_at_like_a_folder(
    tmp_path: Path, bucket: str, objects: Callable[[], dict[str, bytes]], put: Callable[[str, bytes], None]
) -> None:
    """Of large files the ends alone are fetched."""
    store = BucketStore(f"{bucket}/run/stage")
    assert store.newest() == (None, [])
    torch.save({"x": torch.zeros(10**6)}, path := tmp_path / "file.pt")
    whole = path.read_bytes()
    for step in (8, 9, 10, 11):
        content = whole if step != 11 else whole[:-1]
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
    newest, (shards, passed) = store.newest()
    assert shards.startswith(f"{bucket}/run/stage/ep0-ba12 cannot be read")
    assert not [key for key in objects() if "ba12/" in key]  # an index that is sent beside old shards would lie
    assert newest == f"{bucket}/run/stage/ep0-ba10-rank0.pt"
    assert passed.startswith(f"{bucket}/run/stage/ep0-ba11-rank0.pt cannot be read")
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
    place = f"checkpoints={bucket}/all"

    def checkpoints() -> set[str]:
        return {name.split("/")[3] for name in objects() if name.startswith("all/tiny/finetune/")}

    monkeypatch.setenv("TMPDIR", str(tiny.parent / "t"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    Path("t").mkdir()  # short: a socket in it may have 107 letters
    assert "stage finetune: started" in train(tiny, ranks, capfd, place)
    assert not list(Path("t").rglob("*.distcp"))
    wanted, _ = read_tensors(MODEL / "model.safetensors")
    end = "-rank0.pt" if ranks == 1 else ""
    assert checkpoints() == {f"ep0-ba4{end}", f"ep0-ba6{end}"}
    shutil.rmtree(MODEL)
    store = BucketStore(f"{bucket}/all/tiny/finetune")
    newest, passed = store.newest()
    assert (newest, passed) == (f"{bucket}/all/tiny/finetune/ep0-ba6{end}", [])
    name = f"all/tiny/finetune/ep0-ba6{end}" + ("" if ranks == 1 else "/__1_0.distcp")
    put(name, objects()[name][:1000])
    said = train(tiny, ranks, capfd, place)
    assert f"stage finetune: passes over a checkpoint: {bucket}/all/tiny/finetune/ep0-ba6" in said
    assert "stage finetune: resumed at step 4," in said
    assert "unlike" not in said
    export(f"{bucket}/all/tiny/finetune", "exported", recipe="runs/tiny")
    for model in (MODEL, Path("exported")):
        found, _ = read_tensors(model / "model.safetensors")
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_a_bucket_that_is_not_there_is_named_before_training(tiny: Path, bucket: str) -> None:
    with pytest.raises(RunError, match=r"s3://no-such-bucket/tiny/finetune cannot be used .*NoSuchBucket"):
        ssmvl.train(tiny, *ONE_STAGE, "checkpoints=s3://no-such-bucket")
    with pytest.raises(RecipeError, match=r"checkpoints: .*a folder, or .* s3://BUCKET/FOLDER"):
        ssmvl.train(tiny, *ONE_STAGE, "checkpoints=gs://bucket")
    with pytest.raises(RecipeError, match=r"checkpoints: .*a folder, or .* s3://BUCKET/FOLDER"):
        ssmvl.train(tiny, *ONE_STAGE, "checkpoints=s3://")
