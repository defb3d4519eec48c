"""Ctrl-C, SIGTERM, and finished stages that are extended."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ranks import two_ranks
from safetensors.torch import load_file
from tiny_recipe import TINY

import ssmvl
from ssmvl.errors import RunError
from ssmvl.training.callbacks.metrics import Pace

pytestmark = pytest.mark.filterwarnings("default")  # Composer and streaming emit warnings
ONE_STAGE = ("stages.align=null", "stages.order=null", "evaluation=null", "stages.finetune.duration=6ba")
ONE_STAGE += ("stages.finetune.schedule=constant", "stages.finetune.checkpoint=50ba")


def weights(name: str) -> dict[str, Any]:
    return load_file(f"runs/{name}/model/model.safetensors")


def equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The model of an uninterrupted run of six steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("straight"))
        Path("tiny.yaml").write_text(TINY)
        ssmvl.train("tiny.yaml", *ONE_STAGE)
        return weights("tiny")


@pytest.mark.long
@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_writes_a_checkpoint_and_the_run_resumes_exactly(
    number: int,
    error: type[BaseException],
    tiny: Path,
    straight: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    batch_start = Pace.batch_start

    def interrupted(pace: Pace, state: Any, logger: Any) -> None:
        if state.timestamp.batch.value == 2:
            signal.raise_signal(number)
        batch_start(pace, state, logger)

    monkeypatch.setattr(Pace, "batch_start", interrupted)
    with pytest.raises(error):
        ssmvl.train(tiny, *ONE_STAGE)
    monkeypatch.setattr(Pace, "batch_start", batch_start)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    text = capfd.readouterr().out
    assert "stopping after this step to write a checkpoint" in text
    assert "stage finetune: interrupted after step 3. Run the same command again to resume." in text
    assert [path.name for path in Path("runs/tiny/finetune/checkpoints").iterdir()] == ["ep0-ba3-rank0.pt"]
    ssmvl.train(tiny, *ONE_STAGE)
    assert "stage finetune: resumed at step 3" in capfd.readouterr().out
    assert equal(weights("tiny"), straight)


@pytest.mark.long
def test_a_signal_to_one_rank_ends_both_after_a_checkpoint(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch_start = Pace.batch_start

    def interrupted(pace: Pace, state: Any, logger: Any) -> None:
        if state.timestamp.batch.value == 2 and os.environ["RANK"] == "1":
            signal.raise_signal(signal.SIGTERM)
        batch_start(pace, state, logger)

    def end() -> None:
        try:
            ssmvl.train(tiny, *ONE_STAGE)
        except SystemExit as ended:
            print("exit code", ended.code)

    with monkeypatch.context() as patch:
        patch.setattr(Pace, "batch_start", interrupted)
        outputs = two_ranks(end, tmp_path)
    assert all("exit code 143" in output for output in outputs)
    assert "stage finetune: interrupted after step 3." in outputs[0]
    (tmp_path / "again").mkdir()
    outputs = two_ranks(lambda: ssmvl.train(tiny, *ONE_STAGE), tmp_path / "again")
    assert "stage finetune: resumed at step 3" in outputs[0]


@pytest.mark.long
def test_a_finished_stage_resumes_where_its_duration_is_raised(
    tiny: Path, straight: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    ssmvl.train(tiny, *ONE_STAGE, "stages.finetune.duration=4ba")
    for change in ("duration=3ba", "duration=6ep", "batch=4", "optimizer.lr=1e-3"):
        with pytest.raises(RunError, match=r"(?s)stage finetune is finished, so its options cannot change:.*run=NAME"):
            ssmvl.train(tiny, *ONE_STAGE, "stages.finetune.duration=6ba", f"stages.finetune.{change}")
    ssmvl.train(tiny, *ONE_STAGE)
    text = capfd.readouterr().out
    assert "stage finetune: resumed at step 4" in text
    assert equal(weights("tiny"), straight)
    shutil.rmtree("runs/tiny/finetune/checkpoints")
    with pytest.raises(RunError, match="cannot be extended: none of its checkpoints is left"):
        ssmvl.train(tiny, *ONE_STAGE, "stages.finetune.duration=8ba")


@pytest.mark.long
def test_a_stage_whose_model_was_used_cannot_be_extended(tiny: Path) -> None:
    ssmvl.train(tiny, "evaluation=null")
    with pytest.raises(RunError, match="stage align is finished and cannot be extended: stage finetune has started"):
        ssmvl.train(tiny, "evaluation=null", "stages.align.duration=3ba")


@pytest.mark.long
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_the_whole_process_group_reaches_no_loader_worker(tiny: Path, number: int, code: int) -> None:
    options = (*ONE_STAGE, "stages.finetune.duration=900ba", "stages.finetune.loader.workers=1")
    command = [str(Path(sys.executable).with_name("ssmvl")), "train", str(tiny), *options]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    ) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if re.match(r"finetune \d+/900", line):
                os.killpg(process.pid, number)
                break
        lines += process.stdout
    text = "".join(lines)
    assert process.returncode == code, text
    assert "Traceback" not in text
    (step,) = re.findall(r"interrupted after step (\d+)\. Run the same command again to resume\.", text)
    assert list(Path("runs/tiny/finetune/checkpoints").glob(f"ep*-ba{step}-rank0.pt"))
