"""Ranks that record what they train and die at a given moment; forked, or started by the launcher."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from composer import Callback, Logger, State, Trainer
from composer.utils import dist

from ssmvl.training.run import main
from ssmvl.training.session import Session

EVENTS = ("open", "os.rename", "os.remove", "os.symlink")  # Python audit events; saving a file causes several


class Record(Callback):
    """Appends the sample ids and the loss of each step to `rank<rank>.jsonl`."""

    def __init__(self, stage: str, folder: Path, death: Mapping[str, Any]) -> None:
        self._stage, self._death = stage, death
        self._file = folder / f"rank{dist.get_global_rank()}.jsonl"

    def batch_start(self, state: State, logger: Logger) -> None:
        self._ids = list(state.batch["sample_ids"])
        self._die("start", state.timestamp.batch.value + 1)

    def after_backward(self, state: State, logger: Logger) -> None:
        self._die("backward", state.timestamp.batch.value + 1)

    def batch_end(self, state: State, logger: Logger) -> None:
        step, loss = state.timestamp.batch.value, float(state.total_loss_dict["loss/train/total"]).hex()
        with self._file.open("a") as file:
            file.write(json.dumps([self._stage, step, self._ids, loss]) + "\n")
        self._die("end", step)

    def _die(self, moment: str, step: int) -> None:
        if [self._death.get(key) for key in ("stage", "moment", "step")] != [self._stage, moment, step]:
            return
        who, rank = self._death.get("who", "group"), dist.get_global_rank()
        if who == "group":
            os.killpg(0, signal.SIGKILL)
        elif who == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        elif rank == 0 and who in ("SIGTERM", "SIGKILL"):  # the launcher gets it
            os.kill(os.getppid(), signal.Signals[who])


def record(folder: Path, death: Mapping[str, Any]) -> None:
    """Record every trainer of this process from now on, and kill this process group at `death`.

    Args:
        folder: directory of the records.
        death: empty for none; or one of
            `stage`, `step`, `moment` (start, backward, end) and optionally `who`: a rank, which gets SIGKILL, or the
            name of a signal for the launcher; without `who`, the whole group gets SIGKILL.
            `path`, a pattern, and `number`: the whole group gets SIGKILL at that many events on a matching path.
    """
    trainer = Session.trainer

    def recording(session: Session, name: str, *arguments: Any) -> Trainer:
        stage_trainer = trainer(session, name, *arguments)
        stage_trainer.state.callbacks.append(Record(name, folder, death))
        return stage_trainer

    Session.trainer = recording
    left = death.get("number", 0)

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        paths = filter(_is_path, arguments[:2]) if event in EVENTS else ()
        if any(re.search(death["path"], os.fsdecode(path)) for path in paths):
            left -= 1
            if left == 0:
                os.killpg(0, signal.SIGKILL)

    if "path" in death:
        sys.addaudithook(audit)


def _is_path(argument: object) -> bool:
    return isinstance(argument, (str, bytes, os.PathLike))


def ranks(number: int, work: Callable[[], object], folder: Path) -> int:
    """Fork this many ranks in their own process group; the output of each goes to `rank<rank>.txt`.

    Returns:
        The largest exit code of the ranks; -9 if all were killed.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    sys.stdout.flush()
    leader = os.fork()
    if not leader:
        os.setsid()
        children = [os.fork() or _rank(rank, number, port, work, folder) for rank in range(number)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        os._exit(max(code if code >= 0 else 128 - code for code in codes))
    return os.waitstatus_to_exitcode(os.waitpid(leader, 0)[1])


def _rank(rank: int, number: int, port: int, work: Callable[[], object], folder: Path) -> int:
    torch.set_num_threads(1)  # the threads of the parent do not exist in a fork
    variables = {"RANK": rank, "LOCAL_RANK": rank, "NODE_RANK": 0, "WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number}
    variables |= {"MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    os.environ.update({key: str(value) for key, value in variables.items()}, MASTER_ADDR="127.0.0.1")
    code = 1
    try:
        with (folder / f"rank{rank}.txt").open("w", buffering=1) as log, redirect_stdout(log), redirect_stderr(log):
            try:
                code = int(work() or 0)
            except BaseException:
                traceback.print_exc()
    finally:
        os._exit(code)


if __name__ == "__main__":
    record(Path.cwd(), json.loads(os.environ.get("DEATH", "{}")))
    raise SystemExit(main(sys.argv[1:]))
