"""How many checkpoints of a stage stay: older ones go once a newer one has been saved."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from composer import Callback, Logger, State
from composer.callbacks import CheckpointSaver
from composer.utils import dist
from tqdm.auto import tqdm

from ssmvl.errors import RunError
from ssmvl.training.checkpoints.stores import Store


class OldCheckpoints(Callback):
    """Removes them, on the first rank, once a newer one has been saved. Composer forgets those of earlier launches.

    On every rank also what Composer made on this machine to send it to a bucket: it removes the first rank's alone.

    Args:
        store: where they are.
        kept: how many whole ones stay.
    """

    def __init__(self, store: Store, kept: int) -> None:
        self._store, self._kept = store, kept
        self._saved: Any = None

    def batch_start(self, state: State, logger: Logger) -> None:
        """Look whether one was saved after the step before."""
        (saver,) = (callback for callback in state.callbacks if isinstance(callback, CheckpointSaver))
        if saver.last_checkpoint_batch != self._saved:
            self._saved = saver.last_checkpoint_batch
            self._clean(Path(saver.folder))

    def fit_end(self, state: State, logger: Logger) -> None:
        """After the last; others may still be on their way to a bucket."""
        (saver,) = (callback for callback in state.callbacks if isinstance(callback, CheckpointSaver))
        self._clean(Path(saver.folder))

    def _clean(self, made: Path) -> None:
        for path in made.iterdir() if self._store.local_copies == 0 else ():
            shutil.rmtree(path, ignore_errors=True)
        if dist.get_global_rank() == 0:
            remove_old(self._store, self._kept)


def remove_old(store: Store, kept: int) -> None:
    """Remove those older than the newest `kept` whole ones, or say why not: the next save tries again."""
    try:
        store.remove_old(kept)
    except (RunError, OSError) as error:
        tqdm.write(f"an old checkpoint could not be removed: {error}")
