"""Damaged samples in training: counted, listed and limited. A failure of the loader ends training."""

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

SHOWN = 5  # damaged samples named in a message


class DamagedSamples(Callback):
    """Lists the damaged samples of all ranks, which are replaced by others, and stops training if there are too many.

    Args:
        loader: states damaged samples in each batch's `damaged`; its `failure` ends training on every rank.
        file: one line of JSON per sample: epoch, id, reason. Resuming truncates it to its length at the checkpoint.
        limit: largest share of an epoch's samples that may be damaged.

    Raises:
        DataError: more than `limit` of an epoch's samples are damaged, or a rank's loader failed. Raised on every rank.
        RunError: the file cannot be written.
    """

    def __init__(self, loader: TrainLoader, file: Path, limit: float) -> None:
        self._loader, self._file, self._limit = loader, file, limit
        self._total = int(loader.dataset.epoch_size)
        self._new: list[tuple[str, str]] = []  # of this rank, not yet gathered
        self._epoch, self._listed = 0, 0  # epoch; bytes of the file that this run has written
        self._names: list[str] = []  # of the epoch's damaged samples on all ranks
        self._stage = 0  # damaged samples of all epochs

    def batch_start(self, state: State, logger: Logger) -> None:
        """Collect the damaged samples of this rank's batch."""
        self._new += [(name, reason) for name, reason in filter(None, state.batch["damaged"])]

    def batch_end(self, state: State, logger: Logger) -> None:
        """Gather from all ranks, every `WINDOW` batches and after the last, before its checkpoint is written."""
        last = state.max_duration is not None and state.timestamp >= state.max_duration
        if last or state.timestamp.batch.value % WINDOW == 0:
            self._gather()
            self._stop_if_many()

    def epoch_end(self, state: State, logger: Logger) -> None:
        """Print the number of damaged samples. Raises the failure that ended a rank's epoch early."""
        failures = [text for text in dist.all_gather_object(self._loader.failure) if text]
        if failures:
            raise DataError(failures[0])
        self._gather()
        self._stop_if_many()
        if self._names:
            self._print(f"epoch {self._epoch + 1}: {self._summary()}; all are listed in {self._file}")
        self._epoch, self._names = self._epoch + 1, []

    def fit_end(self, state: State, logger: Logger) -> None:
        """Print the number of damaged samples in all epochs."""
        self._gather()
        self._stop_if_many()
        if self._stage:
            self._print(f"damaged samples in the whole stage: {self._stage}; all are listed in {self._file}")

    def state_dict(self) -> dict[str, Any]:
        """Return the counts so far. Composer calls this on all ranks together."""
        self._gather()
        return {"epoch": self._epoch, "names": self._names, "stage": self._stage, "listed": self._listed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the counts; `fit_start` truncates the file."""
        self._epoch, self._names = state["epoch"], list(state["names"])
        self._stage, self._listed = state["stage"], state["listed"]

    def fit_start(self, state: State, logger: Logger) -> None:
        """Truncate the file: samples listed after the checkpoint are read and listed again."""
        if dist.get_global_rank() == 0 and self._file.is_file() and self._file.stat().st_size > self._listed:
            os.truncate(self._file, self._listed)

    def _gather(self) -> None:
        parts = dist.all_gather_object(self._new)
        self._new = []
        samples = [sample for part in parts for sample in part]
        self._names += [name for name, _ in samples]
        self._stage += len(samples)
        lines = [json.dumps({"epoch": self._epoch, "id": name, "reason": reason}) + "\n" for name, reason in samples]
        self._listed += len("".join(lines))  # JSON is ASCII
        if lines and dist.get_global_rank() == 0:
            try:
                with self._file.open("a") as file:
                    file.writelines(lines)
            except OSError as error:
                raise RunError(f"{self._file} cannot be written ({error})") from error

    def _stop_if_many(self) -> None:
        if len(self._names) > self._limit * self._total:
            allowed = f"at most {self._limit:.2%} may be damaged (max_damaged)"
            raise DataError(f"epoch {self._epoch + 1}: {self._summary()}; {allowed}. Reasons are in {self._file}")

    def _summary(self) -> str:
        count, first = len(self._names), short(", ".join(self._names[:SHOWN]))
        shown = f"{first}, …" if count > SHOWN else first
        return f"{count} of {self._total} samples were damaged ({count / self._total:.2%}) and replaced: {shown}"

    def _print(self, text: str) -> None:
        if dist.get_global_rank() == 0:
            tqdm.write(text)  # above the progress bar
