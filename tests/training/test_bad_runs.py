"""What keeps a run from going on: one message on every rank, exit code 2, and nothing that was saved is damaged."""

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
from ssmvl.errors import MissingDependencyError, RunError
from ssmvl.recipes.merge import load_recipe
from ssmvl.training import run, session, trainer
from ssmvl.training.checkpoints.identity import resuming
from ssmvl.training.run_folder import RunFolder

pytestmark = pytest.mark.filterwarnings("default")  # Composer, streaming and torch.distributed warn on their own
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
NO_MORE = 200_000  # bytes: more than logs and messages have, less than a checkpoint


class At(Callback):
    """Does something after `STEP` steps."""

    def __init__(self, what: Callable[[], object]) -> None:
        self._what = what

    def batch_end(self, state: State, logger: Logger) -> None:
        if state.timestamp.batch.value == STEP:
            self._what()


def disk_is_full() -> None:
    """From now on no file of this process can get large, which its writers are told as they are of a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (NO_MORE, resource.RLIM_INFINITY))


def logs_cannot_grow() -> None:
    disk_is_full()
    for path in ROOT.glob("tensorboard/*/events*"):
        os.truncate(path, NO_MORE)


def train(number: int, *options: str, what: Callable[[], object] = int) -> tuple[int, list[str]]:
    """One start on this many ranks, to each of which something happens: exit code, and what each said."""
    folder = Path("said")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    made = trainer.Trainer

    def work() -> int:
        trainer.Trainer = lambda callbacks, **rest: made(callbacks=[*callbacks, At(what)], **rest)
        record(folder, {})
        return run.main(["tiny.yaml", *SMALL, *options])

    code = ranks(number, work, folder)
    return code, [(folder / f"rank{rank}.txt").read_text() for rank in range(number)]


def one_message(said: str) -> str:
    assert "Traceback" not in said, said
    (first,) = (line for line in said.splitlines() if line.startswith("error: "))
    return said[said.index(first) :]


def goes_on(number: int, step: int, *options: str) -> None:
    code, (said, *_) = train(number, *options)
    assert code == 0, said
    assert (f"resumed at step {step}," if step else "stage finetune: started,") in said
    assert len(ssmvl.load(ROOT).generate(["hi"], max_new_tokens=2)) == 1


@pytest.mark.long
@pytest.mark.parametrize(
    ("number", "sharding"),
    [(2, "fsdp2"), *(pytest.param(*case, marks=pytest.mark.slow) for case in [(1, "fsdp2"), (2, "ddp")])],
)
def test_a_full_disk_while_a_checkpoint_is_written(tiny: Path, number: int, sharding: str) -> None:
    option = f"stages.finetune.sharding={sharding}"
    code, said = train(number, option, what=disk_is_full)
    assert code == 2
    assert "cannot be written" in one_message(said[0])
    assert "the same command goes on at the newest checkpoint that is whole" in said[0]
    for text in said[1:]:
        assert ("cannot be written" if sharding == "fsdp2" else "another rank is lost") in one_message(text)
    goes_on(number, 2, option)


def test_a_full_disk_while_a_model_is_written(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = session.save_folder
    with monkeypatch.context() as patch:
        patch.setattr(session, "save_folder", lambda *given: (disk_is_full(), save(*given)))
        code, (said,) = train(1)
    assert code == 2
    assert "a file cannot be written" in one_message(said)
    assert [path.name for path in ROOT.iterdir() if "model" in path.name] == []
    goes_on(1, 6)


def folder_vanishes() -> None:
    shutil.rmtree(ROOT, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "message"),
    [
        (logs_cannot_grow, "a file cannot be written or read"),
        (folder_vanishes, "runs/tiny/recipe.yaml is gone: somebody removed"),
    ],
)
def test_logs_that_cannot_grow_and_a_folder_that_vanishes(tiny: Path, what: Callable[[], object], message: str) -> None:
    code, said = train(2, "stages.finetune.duration=40ba", "stages.finetune.checkpoint=40ba", what=what)
    assert code == 2
    assert message in one_message(said[0])
    assert "another rank is lost" in one_message(said[1])
    goes_on(2, 0)


@pytest.mark.parametrize("place", ["tensorboard", "finetune", "finetune/checkpoints"])
def test_a_file_in_the_way_is_named_before_training(tiny: Path, place: str) -> None:
    (ROOT / place).parent.mkdir(parents=True)
    (ROOT / place).write_text("in the way")
    with pytest.raises(RunError, match=rf"runs/tiny/{place} cannot be written"):
        ssmvl.train(tiny, *SMALL)
    assert (ROOT / place).read_text() == "in the way"


def test_a_folder_that_may_not_be_written_is_named_before_training(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As root, whom no mode keeps from writing, only a read-only mount would."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: "tensorboard" not in str(path))
        with pytest.raises(RunError, match=r"runs/tiny/tensorboard cannot be written .*may not write"):
            ssmvl.train(tiny, *SMALL)
    assert not list(ROOT.rglob("ep*"))


def test_a_place_for_checkpoints_that_cannot_be_made_is_named_and_the_runs_name_stays_free(tiny: Path) -> None:
    Path("afile").write_text("")
    with pytest.raises(RunError, match=r"afile/tiny/finetune cannot be written"):
        ssmvl.train(tiny, *SMALL, "checkpoints=afile")
    assert not (ROOT / "recipe.yaml").exists()


def test_two_launches_into_one_folder(tiny: Path) -> None:
    mine, theirs = multiprocessing.Pipe()

    def other() -> None:
        folder = RunFolder(ROOT, ["finetune"])
        folder.claim(load_recipe(tiny, *SMALL))
        theirs.send(os.getpid())
        theirs.recv()
        folder.release()
        theirs.send("released")
        theirs.recv()

    process = multiprocessing.get_context("fork").Process(target=other)
    process.start()
    try:
        owner = f"process {mine.recv()} on {socket.gethostname()}"
        code, said = train(2)
        assert code == 2
        for text in said:
            assert f"runs/tiny is in use by another launch ({owner}); wait for it, end it, or" in one_message(text)
        mine.send("release")
        assert mine.recv() == "released"
        goes_on(1, 0)
    finally:
        process.kill()
        process.join()


OTHERS = [
    pytest.param(number, option, message, marks=[pytest.mark.slow] * ((number, option) != (1, "seed=3")))
    for number in (1, 2)
    for option, message in (("seed=3", "it is of another run"), ("model.language.width=64", "mismatch"))
]


@pytest.mark.long
@pytest.mark.parametrize(("number", "option", "message"), OTHERS)
def test_a_checkpoint_of_another_recipe(tiny: Path, number: int, option: str, message: str) -> None:
    code, said = train(number, option)
    assert code == 0, said
    theirs = Path("runs/tiny").rename("runs/other") / "finetune" / "checkpoints"
    (ROOT / "finetune").mkdir(parents=True)
    shutil.copytree(theirs, ROOT / "finetune" / "checkpoints")
    code, said = train(number)
    assert code == 2
    for text in said:
        assert "runs/tiny/finetune/checkpoints/ep0-ba6" in one_message(text)
        assert message in one_message(text)
    assert "seed: 3 there, 0 here" in said[0] or option != "seed=3"
    assert not (ROOT / "model").exists()
    shutil.rmtree(ROOT / "finetune" / "checkpoints")
    goes_on(number, 0)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            "stages.finetune.train=[connectr]",
            "no parameter of the model is under 'connectr'. Did you mean 'connector'?",
        ),
        ("stages.finetune.batch=7", "7 samples cannot be shared by 2 ranks; choose a multiple of 2"),
        ("stages.finetune.data={name: shards, folder: nowhere}", "nowhere"),
        ("stages.finetune.data.train_size=6", "the data hold 6 samples, fewer than a batch of 8"),
    ],
)
def test_what_a_recipe_asks_for_in_vain(tiny: Path, option: str, message: str) -> None:
    code, said = train(2, option)
    assert code == 2
    assert all(message in one_message(text) for text in said)
    assert not list(ROOT.rglob("ep*"))


@pytest.mark.slow
def test_a_port_in_use(tiny: Path, composer: Callable[..., subprocess.Popen[str]]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        process = composer("-n", "2", "--master_port", str(port), "tiny.yaml", *SMALL)
        output, _ = process.communicate(timeout=240)
    assert process.returncode == 2, output
    assert "SIGKILL" not in output  # the rank that waits for the one which left ends when it is asked to
    assert f"error: the ranks cannot meet: another process uses port {port}" in output
    assert "Traceback" not in output
    assert not Path("runs").exists()


def test_what_ends_a_run_from_outside_is_told_apart() -> None:
    gone = ClientError({"Error": {"Code": "ExpiredToken", "Message": "expired"}}, "PutObject")
    assert "the GPU's memory is full" in (run.external_cause(torch.OutOfMemoryError("CUDA out of memory")) or "")
    assert "could not be sent to its bucket (An error occurred (ExpiredToken)" in (run.external_cause(gone) or "")
    assert run.external_cause(RuntimeError("a mistake")) is None
    with pytest.raises(torch.OutOfMemoryError), resuming("runs/x/ep0-ba1"):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_a_logger_that_is_not_installed_is_named(tiny: Path) -> None:
    with pytest.raises(MissingDependencyError, match=r"stages\.align\.loggers\.MLFlowLogger: .*mlflow"):
        ssmvl.train(tiny, "stages.align.loggers.MLFlowLogger={}")


def test_an_option_that_a_callback_refuses_is_named(tiny: Path) -> None:
    with pytest.raises(RunError, match=r"stages\.finetune\.callbacks\.SpeedMonitor: .*; its options are window_size"):
        ssmvl.train(tiny, *SMALL, "stages.finetune.callbacks={SpeedMonitor: {window_size: x}}")


def test_a_run_folder_that_a_machine_does_not_see_is_named(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "runs" / "x", ["align"], "elsewhere")
    with pytest.raises(RunError, match=r"recipe\.yaml is not there on .*; it must lie on storage that every node sees"):
        folder.require_seen()
