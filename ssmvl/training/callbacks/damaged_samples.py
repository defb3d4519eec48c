"""What the loader cannot read while a model trains: damaged samples, counted and listed, and failures, which end it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from composer import Callback, Logger, State
from composer.utils import dist
from tqdm.auto import tqdm

from ssmvl.data.streams import TrainLoader
from ssmvl.errors import DataError, RunError, short
from ssmvl.training.callbacks.accuracy import WINDOW

SHARE = 0.01  # of an epoch's samples; more damaged ones stop training
SHOWN = 5  # damaged samples named in a message


class DamagedSamples(Callback):
    """Lists the samples that others stand in for, over all ranks, and stops training when they are too many.

    Args:
        loader: its batches' `damaged` are counted, its `failure` ends training on every rank.
        file: one line of JSON for each: epoch, id, reason. Where a run resumes it is cut to what it was then.

    Raises:
        DataError: more than `SHARE` of an epoch's samples are damaged, or a rank's loader failed. On every rank.
        RunError: the file cannot be written.
    """

    def __init__(self, loader: TrainLoader, file: Path) -> None:
        self._loader, self._file = loader, file
        self._total = int(loader.dataset.epoch_size)
        self._new: list[tuple[str, str]] = []  # on this rank, not yet gathered
        self._epoch, self._listed = 0, 0  # epoch, and bytes of the file that are this run's
        self._names: list[str] = []  # of the epoch's damaged samples, over all ranks
        self._stage = 0  # damaged samples of all epochs

    def batch_start(self, state: State, logger: Logger) -> None:
        """Count one batch of this rank."""
        self._new += [(name, reason) for name, reason in filter(None, state.batch["damaged"])]

    def batch_end(self, state: State, logger: Logger) -> None:
        """Count over all ranks, once in `WINDOW` batches, and before the checkpoint of the last one is written."""
        last = state.max_duration is not None and state.timestamp >= state.max_duration
        if last or state.timestamp.batch.value % WINDOW == 0:
            self._gather()
            self._stop_if_many()

    def epoch_end(self, state: State, logger: Logger) -> None:
        """Say how many were damaged; raise the failure for which a rank's epoch ended early."""
        failures = [text for text in dist.all_gather_object(self._loader.failure) if text]
        if failures:
            raise DataError(failures[0])
        self._gather()
        self._stop_if_many()
        if self._names:
            self._say(f"epoch {self._epoch + 1}: {self._summary()}; all are listed in {self._file}")
        self._epoch, self._names = self._epoch + 1, []

    def fit_end(self, state: State, logger: Logger) -> None:
        """Say how many were damaged in all epochs."""
        self._gather()
        self._stop_if_many()
        if self._stage:
            self._say(f"damaged samples in the whole stage: {self._stage}; all are listed in {self._file}")

    def state_dict(self) -> dict[str, Any]:
        """What is counted so far. Composer asks all ranks at once."""
        self._gather()
        return {"epoch": self._epoch, "names": self._names, "stage": self._stage, "listed": self._listed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting; `fit_start` cuts the file."""
        self._epoch, self._names = state["epoch"], list(state["names"])
        self._stage, self._listed = state["stage"], state["listed"]

    def fit_start(self, state: State, logger: Logger) -> None:
        """Cut from the file what a killed run listed after its last checkpoint: it comes again."""
        if dist.get_global_rank() == 0 and self._file.is_file() and self._file.stat().st_size > self._listed:
            os.truncate(self._file, self._listed)

    def _gather(self) -> None:
        parts = dist.all_gather_object(self._new)
        self._new = []
        found = [one for part in parts for one in part]
        self._names += [name for name, _ in found]
        self._stage += len(found)
        lines = [json.dumps({"epoch": self._epoch, "id": name, "reason": reason}) + "\n" for name, reason in found]
        self._listed += len("".join(lines))  # JSON is ASCII
        if lines and dist.get_global_rank() == 0:
            try:
                with self._file.open("a") as file:
                    file.writelines(lines)
            except OSError as error:
                raise RunError(f"{self._file} cannot be written ({error})") from error

    def _stop_if_many(self) -> None:
        if len(self._names) > SHARE * self._total:
            allowed = f"at most {SHARE:.0%} may be"
            raise DataError(f"epoch {self._epoch + 1}: {self._summary()}; {allowed}. Reasons are in {self._file}")

    def _summary(self) -> str:
        count, first = len(self._names), short(", ".join(self._names[:SHOWN]))
        shown = f"{first}, …" if count > SHOWN else first
        return f"{count} of {self._total} samples were damaged ({count / self._total:.2%}) and replaced: {shown}"

    def _say(self, text: str) -> None:
        if dist.get_global_rank() == 0:
            tqdm.write(text)  # above a bar
