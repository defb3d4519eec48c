"""From published files to a training run: converted into a bucket, verified, inspected, and trained on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from data.published import LAYOUTS, make

from ssmvl.cli import main

pytestmark = pytest.mark.filterwarnings("default")  # Composer and streaming emit warnings

TINY_ML_MAMBA = [
    "quickstart",
    "stages.order=null",
    "stages.align=null",
    "stages.finetune.batch=4",
    "stages.finetune.duration=2ba",
    "stages.finetune.warmup=0ba",
    "stages.finetune.checkpoint=2ba",
    "stages.finetune.packed=true",
    "evaluation=null",
]


@pytest.fixture
def ssmvl(tmp_path: Path) -> Callable[..., str]:
    """`ssmvl(*arguments)` runs the installed command in `tmp_path` and returns its output; the command must succeed."""

    def run(*arguments: str) -> str:
        command = [str(Path(sys.executable).with_name("ssmvl")), *arguments]
        done = subprocess.run(
            command, cwd=tmp_path, env={**os.environ, "COLUMNS": "120"}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    return run


def run_all_steps(layout: str, samples: int, bucket: str, folder: Path, ssmvl: Callable[..., str]) -> None:
    arguments = make(layout, folder / "published", samples=samples)
    url = f"{bucket}/{layout}"
    ssmvl("data", "convert", *arguments, "--out", url)
    verified = ssmvl("data", "verify", url)
    assert f"{samples:,} samples" in verified, verified
    inspected = ssmvl("data", "inspect", url, "--recipe", "quickstart", "--stage", "finetune", "--png", "sheet.png")
    assert "supervised: " in inspected
    assert (folder / "sheet.png").read_bytes().startswith(b"\x89PNG")
    data = f"stages.finetune.data={{name: shards, folder: {url}, cache: {folder / 'cache'}}}"
    ssmvl("train", *TINY_ML_MAMBA, f"run={layout}", data)
    about = json.loads((folder / "runs" / layout / "model" / "ssmvl.json").read_text())
    assert about
    assert list((folder / "cache").rglob("*.mds"))


@pytest.mark.long
@pytest.mark.parametrize("layout", ["llava_mix665k"])
def test_from_published_files_to_training(
    layout: str, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def in_process(*arguments: str) -> str:
        assert main(arguments) == 0
        return capfd.readouterr().out

    monkeypatch.chdir(tmp_path)
    run_all_steps(layout, 60, bucket, tmp_path, in_process)
    assert (tmp_path / "runs" / layout / "model" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_thousand_samples(layout: str, bucket: str, tmp_path: Path, ssmvl: Callable[..., str]) -> None:
    run_all_steps(layout, 2_000, bucket, tmp_path, ssmvl)
    assert (tmp_path / "runs" / layout / "model" / "model.safetensors").is_file()
