"""Run by each of two machines: trains a recipe; the first rank reports through a pipe that it has reached a step."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from composer import Callback, Logger, State, Trainer

from ssmvl.training import run, session

STEP, PIPE = 7, Path("step")
make_trainer = session.Session.trainer


class Report(Callback):
    def batch_end(self, state: State, logger: Logger) -> None:
        if state.run_name.endswith("-finetune") and state.timestamp.batch.value == STEP:
            PIPE.write_text("reached")


def trainer(self: session.Session, *options: Any) -> Trainer:
    stage_trainer = make_trainer(self, *options)
    if self.rank == 0:
        stage_trainer.state.callbacks.append(Report())
    return stage_trainer


session.WAIT = 40.0  # seconds; a run waits longer
session.Session.trainer = trainer
if __name__ == "__main__":
    sys.exit(run.main(sys.argv[1:]))
