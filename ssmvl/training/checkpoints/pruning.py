"""Pruning of a stage's old checkpoints after a newer one has been saved."""

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
    """Removes old checkpoints once a newer one is saved. Composer does not know those of earlier launches.

    The first rank prunes the store. With a bucket, every rank also removes its local copies after uploading; Composer
    removes only the first rank's.

    Args:
        store: the stage's checkpoints.
        kept: number of complete checkpoints to keep.
    """

    def __init__(self, store: Store, kept: int) -> None:
        self._store, self._kept = store, kept
        self._saved: Any = None

    def batch_start(self, state: State, logger: Logger) -> None:
        """Prune if a checkpoint was saved after the previous step."""
        (saver,) = (callback for callback in state.callbacks if isinstance(callback, CheckpointSaver))
        if saver.last_checkpoint_batch != self._saved:
            self._saved = saver.last_checkpoint_batch
            self._clean(Path(saver.folder))

    def fit_end(self, state: State, logger: Logger) -> None:
        """Prune after the last checkpoint; uploads to a bucket may still be in progress."""
        (saver,) = (callback for callback in state.callbacks if isinstance(callback, CheckpointSaver))
        self._clean(Path(saver.folder))

    def _clean(self, local: Path) -> None:
        for path in local.iterdir() if self._store.local_copies == 0 else ():
            shutil.rmtree(path, ignore_errors=True)
        if dist.get_global_rank() == 0:
            remove_old(self._store, self._kept)


def remove_old(store: Store, kept: int) -> None:
    """Remove checkpoints older than the latest `kept` complete ones. Failures are printed; the next save retries."""
    try:
        store.remove_old(kept)
    except (RunError, OSError) as error:
        tqdm.write(f"an old checkpoint could not be removed: {error}")
