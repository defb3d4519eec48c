"""A stage goes on from the newest checkpoint that is whole: one file, or the shards of two ranks."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ranks import two_ranks

import ssmvl
from ssmvl.checkpoints import read_tensors
from ssmvl.training.resuming import LATEST, choose_checkpoint

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


def train(tiny: Path, ranks: int, capfd: pytest.CaptureFixture[str]) -> str:
    if ranks == 1:
        capfd.readouterr()
        ssmvl.train(tiny, *ONE_STAGE)
        return capfd.readouterr().out
    for name in ("store", "rank0.txt", "rank1.txt"):
        (tiny.parent / name).unlink(missing_ok=True)
    return two_ranks(lambda: ssmvl.train(tiny, *ONE_STAGE), tiny.parent)[0]


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
        passed = choose_checkpoint(folder)
        assert (folder / LATEST).resolve().name.startswith("ep0-ba4"), name
        assert len(passed) == (0 if ranks == 1 and name == "gone" else 1)
        assert all(f"{folder}/ep0-ba6" in text for text in passed)
    cut(newest(CHECKPOINTS))
    shutil.rmtree(MODEL)
    said = train(tiny, ranks, capfd)
    assert "stage finetune: passes over a checkpoint: runs/tiny/finetune/checkpoints/ep0-ba6" in said
    assert "stage finetune: resumed at step 4," in said
    found, _ = read_tensors(MODEL / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_whole_ones_are_kept_as_they_are_and_without_any_a_stage_begins(tmp_path: Path) -> None:
    assert choose_checkpoint(tmp_path) == []
    torch.save({}, tmp_path / "ep0-ba9-rank0.pt")
    torch.save({}, tmp_path / "ep1-ba10-rank0.pt")
    (tmp_path / LATEST).symlink_to("ep0-ba11-rank0.pt")
    assert choose_checkpoint(tmp_path) == []
    assert (tmp_path / LATEST).resolve().name == "ep1-ba10-rank0.pt"
    for path in tmp_path.glob("ep*"):
        cut(path)
    assert len(choose_checkpoint(tmp_path)) == 2
    assert not os.path.lexists(tmp_path / LATEST)
