"""Failures that end a run: one message on every rank, exit code 2, and no damage to saved files."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from botocore.exceptions import ClientError
from composer import Callback, Logger, State
from killed_script import ranks, record
from torch import multiprocessing

import ssmvl
from ssmvl.errors import MissingDependencyError, RecipeError, RunError
from ssmvl.recipes.merge import load_recipe
from ssmvl.training import run, session, trainer
from ssmvl.training.checkpoints.identity import resuming
from ssmvl.training.run_folder import RunFolder

pytestmark = pytest.mark.filterwarnings("default")  # Composer, streaming and torch.distributed emit warnings
SMALL = (
    "stages.align=null",
    "stages.order=null",
    "evaluation=null",
    "model.language.num_layers=1",
    "model.connector.num_layers=1",
    "stages.finetune.duration=6ba",
    "stages.finetune.checkpoint=2ba",
)
ROOT, STEP = Path("runs/tiny"), 3
MAX_BYTES = 200_000  # more than logs and messages need, less than a checkpoint


class At(Callback):
    """Calls a function after `STEP` steps."""

    def __init__(self, action: Callable[[], object]) -> None:
        self._action = action

    def batch_end(self, state: State, logger: Logger) -> None:
        if state.timestamp.batch.value == STEP:
            self._action()


def disk_is_full() -> None:
    """Limit the size of this process's files from now on: writes beyond it fail as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (MAX_BYTES, resource.RLIM_INFINITY))


def logs_cannot_grow() -> None:
    disk_is_full()
    for path in ROOT.glob("tensorboard/*/events*"):
        os.truncate(path, MAX_BYTES)


def train(number: int, *options: str, action: Callable[[], object] = int) -> tuple[int, list[str]]:
    """Launch this many ranks, each of which calls `action` at `STEP`; return the exit code and each rank's output."""
    folder = Path("output")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    original = trainer.Trainer

    def work() -> int:
        trainer.Trainer = lambda callbacks, **rest: original(callbacks=[*callbacks, At(action)], **rest)
        record(folder, {})
        return run.main(["tiny.yaml", *SMALL, *options])

    code = ranks(number, work, folder)
    return code, [(folder / f"rank{rank}.txt").read_text() for rank in range(number)]


def one_message(output: str) -> str:
    assert "Traceback" not in output, output
    (first,) = (line for line in output.splitlines() if line.startswith("error: "))
    return output[output.index(first) :]


def assert_resumes(number: int, step: int, *options: str) -> None:
    code, (output, *_) = train(number, *options)
    assert code == 0, output
    assert (f"resumed at step {step}," if step else "stage finetune: started,") in output
    assert len(ssmvl.load(ROOT).generate(["hi"], max_new_tokens=2)) == 1


@pytest.mark.long
@pytest.mark.parametrize(
    ("number", "sharding"),
    [(2, "fsdp2"), *(pytest.param(*case, marks=pytest.mark.slow) for case in [(1, "fsdp2"), (2, "ddp")])],
)
def test_a_full_disk_while_a_checkpoint_is_written(tiny: Path, number: int, sharding: str) -> None:
    option = f"stages.finetune.sharding={sharding}"
    code, outputs = train(number, option, action=disk_is_full)
    assert code == 2
    assert "cannot be written" in one_message(outputs[0])
    assert "run the same command again to resume from the latest complete checkpoint" in outputs[0]
    for text in outputs[1:]:
        assert ("cannot be written" if sharding == "fsdp2" else "another rank was lost") in one_message(text)
    assert_resumes(number, 2, option)


def test_a_full_disk_while_a_model_is_written(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = session.save_folder
    with monkeypatch.context() as patch:
        patch.setattr(session, "save_folder", lambda *arguments: (disk_is_full(), save(*arguments)))
        code, (output,) = train(1)
    assert code == 2
    assert "the directory runs/tiny/model cannot be written" in one_message(output)
    assert [path.name for path in ROOT.iterdir() if "model" in path.name] == []
    assert_resumes(1, 6)


def folder_vanishes() -> None:
    shutil.rmtree(ROOT, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("action", "message"),
    [
        (logs_cannot_grow, "a file cannot be read or written"),
        (folder_vanishes, "runs/tiny/recipe.yaml was removed or moved during the run"),
    ],
)
def test_logs_that_cannot_grow_and_a_run_folder_that_vanishes(
    tiny: Path, action: Callable[[], object], message: str
) -> None:
    code, outputs = train(2, "stages.finetune.duration=40ba", "stages.finetune.checkpoint=40ba", action=action)
    assert code == 2
    assert message in one_message(outputs[0])
    assert "another rank was lost" in one_message(outputs[1])
    assert_resumes(2, 0)


@pytest.mark.parametrize("name", ["tensorboard", "finetune", "finetune/checkpoints"])
def test_a_file_in_the_way_is_named_before_training(tiny: Path, name: str) -> None:
    (ROOT / name).parent.mkdir(parents=True)
    (ROOT / name).write_text("in the way")
    with pytest.raises(RunError, match=rf"runs/tiny/{name} cannot be written"):
        ssmvl.train(tiny, *SMALL)
    assert (ROOT / name).read_text() == "in the way"


def test_a_directory_without_write_permission_is_named_before_training(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Patched, because root may write to any directory that is not on a read-only mount."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: "tensorboard" not in str(path))
        with pytest.raises(RunError, match=r"runs/tiny/tensorboard cannot be written .*no write permission"):
            ssmvl.train(tiny, *SMALL)
    assert not list(ROOT.rglob("ep*"))


def test_a_checkpoint_directory_that_cannot_be_made_is_named_and_the_run_name_stays_free(tiny: Path) -> None:
    Path("afile").write_text("")
    with pytest.raises(RunError, match=r"afile/tiny/finetune cannot be written"):
        ssmvl.train(tiny, *SMALL, "checkpoints=afile")
    assert not (ROOT / "recipe.yaml").exists()


def test_two_launches_of_one_run(tiny: Path) -> None:
    parent, child = multiprocessing.Pipe()

    def other_launch() -> None:
        folder = RunFolder(ROOT, ["finetune"])
        folder.claim(load_recipe(tiny, *SMALL))
        child.send(os.getpid())
        child.recv()
        folder.release()
        child.send("released")
        child.recv()

    process = multiprocessing.get_context("fork").Process(target=other_launch)
    process.start()
    try:
        owner = f"process {parent.recv()} on {socket.gethostname()}"
        code, outputs = train(2)
        assert code == 2
        for text in outputs:
            assert f"runs/tiny is in use by another launch ({owner}); wait for it, stop it, or" in one_message(text)
        parent.send("release")
        assert parent.recv() == "released"
        assert_resumes(1, 0)
    finally:
        process.kill()
        process.join()


OTHERS = [
    pytest.param(number, option, message, marks=[pytest.mark.slow] * ((number, option) != (1, "seed=3")))
    for number in (1, 2)
    for option, message in (("seed=3", "it belongs to a different run"), ("model.language.width=64", "mismatch"))
]


@pytest.mark.long
@pytest.mark.parametrize(("number", "option", "message"), OTHERS)
def test_a_checkpoint_of_another_recipe(tiny: Path, number: int, option: str, message: str) -> None:
    code, outputs = train(number, option)
    assert code == 0, outputs
    other = Path("runs/tiny").rename("runs/other") / "finetune" / "checkpoints"
    (ROOT / "finetune").mkdir(parents=True)
    shutil.copytree(other, ROOT / "finetune" / "checkpoints")
    code, outputs = train(number)
    assert code == 2
    for text in outputs:
        assert "runs/tiny/finetune/checkpoints/ep0-ba6" in one_message(text)
        assert message in one_message(text)
    assert "seed: was 3, is now 0" in outputs[0] or option != "seed=3"
    assert not (ROOT / "model").exists()
    shutil.rmtree(ROOT / "finetune" / "checkpoints")
    assert_resumes(number, 0)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            "stages.finetune.train=[connectr]",
            "no parameter of the model is under 'connectr'. Did you mean 'connector'?",
        ),
        ("stages.finetune.batch=7", "7 samples cannot be split evenly across 2 ranks; choose a multiple of 2"),
        ("stages.finetune.data={name: shards, folder: nowhere}", "nowhere"),
        ("stages.finetune.data.train_size=6", "the data hold 6 samples, fewer than one batch of 8"),
    ],
)
def test_mistakes_that_depend_on_data_or_ranks_are_found_before_training(tiny: Path, option: str, message: str) -> None:
    code, outputs = train(2, option)
    assert code == 2
    assert all(message in one_message(text) for text in outputs)
    assert not list(ROOT.rglob("ep*"))


@pytest.mark.slow
def test_a_port_in_use(tiny: Path, composer: Callable[..., subprocess.Popen[str]]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        process = composer("-n", "2", "--master_port", str(port), "tiny.yaml", *SMALL)
        output, _ = process.communicate(timeout=240)
    assert process.returncode == 2, output
    assert "SIGKILL" not in output  # the rank that waits for the other one ends on SIGTERM
    assert f"error: the ranks cannot connect, because another process uses port {port}" in output
    assert "Traceback" not in output
    assert not Path("runs").exists()


def test_external_causes_are_told_from_bugs() -> None:
    expired = ClientError({"Error": {"Code": "ExpiredToken", "Message": "expired"}}, "PutObject")
    assert "the GPU is out of memory" in (run.external_cause(torch.OutOfMemoryError("CUDA out of memory")) or "")
    assert "a checkpoint could not be uploaded (An error occurred (ExpiredToken)" in (run.external_cause(expired) or "")
    assert run.external_cause(RuntimeError("a mistake")) is None
    with pytest.raises(torch.OutOfMemoryError), resuming("runs/x/ep0-ba1"):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_a_logger_that_is_not_installed_is_named(tiny: Path) -> None:
    with pytest.raises(MissingDependencyError, match=r"stages\.align\.loggers\.CometMLLogger: .*comet_ml"):
        ssmvl.train(tiny, "stages.align.loggers.CometMLLogger={}")


def test_a_logger_whose_extra_is_not_installed_is_named_with_the_extra(tiny: Path) -> None:
    path, fix = r"stages\.align\.loggers\.MLFlowLogger", r"pip install 'ssmvl\[mlflow\]'"
    with pytest.raises(RecipeError, match=rf"{path}: needs .*mlflow.*: {fix}"):
        ssmvl.train(tiny, "stages.align.loggers.MLFlowLogger={}")


def test_an_option_that_a_callback_rejects_is_named(tiny: Path) -> None:
    with pytest.raises(RunError, match=r"stages\.finetune\.callbacks\.SpeedMonitor: .*; its options are window_size"):
        ssmvl.train(tiny, *SMALL, "stages.finetune.callbacks={SpeedMonitor: {window_size: x}}")


def test_a_run_folder_that_a_node_cannot_see_is_named(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "runs" / "x", ["align"], "elsewhere")
    message = (
        r"recipe\.yaml does not exist on .*, although the first rank created it; run folder and checkpoints must be"
    )
    with pytest.raises(RunError, match=rf"{message} on storage"):
        folder.require_seen()
