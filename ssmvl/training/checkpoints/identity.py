"""Identity of a run, saved in its checkpoints and compared on resuming."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from composer import Callback
from torch.distributed.checkpoint.api import CheckpointException

from ssmvl.errors import RunError, short
from ssmvl.recipes.merge import Recipe
from ssmvl.recipes.norm_groups import write_out
from ssmvl.training.run_folder import differences, identity


class Identity(Callback):
    """Saves the run's identity in each checkpoint, and rejects checkpoints of other runs.

    Args:
        recipe: of the run.
        optimizer: class name of the stage's optimizer.

    Raises:
        RunError: the checkpoint belongs to a run with a different model, seed, data, trained parts or optimizer.
    """

    def __init__(self, recipe: Recipe, optimizer: str) -> None:
        self._identity = {**identity(recipe), "optimizer": optimizer}

    def state_dict(self) -> dict[str, Any]:
        """Return the identity as text: torch flattens mappings in sharded checkpoints and requires the same keys."""
        return {"identity": json.dumps(self._identity)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Compare the saved identity with this run's."""
        saved = {"optimizer": "AdamW", **json.loads(state["identity"])}
        if lines := differences(write_out(saved, saved=True), self._identity):
            raise RunError("it belongs to a different run:\n  " + "\n  ".join(lines))


@contextmanager
def resuming(checkpoint: str | None) -> Iterator[None]:
    """Raise the errors of loading a checkpoint as a `RunError` that names it.

    Args:
        checkpoint: its path or URL; None if the stage starts from the beginning.

    Raises:
        RunError: tensors, names or identity in the checkpoint do not match this model or run.
    """
    try:
        yield
    except (RunError, RuntimeError, ValueError, KeyError, CheckpointException) as error:
        unrelated = (torch.OutOfMemoryError, torch.distributed.DistError)
        if checkpoint is None or isinstance(error, unrelated) or "gloo/transport" in str(error):
            raise
        why = str(error) if isinstance(error, RunError) else _first_difference(error)
        advice = "replace it with this run's own, or remove it to start the stage again"
        raise RunError(f"{checkpoint} cannot be resumed from; {advice}: {why}") from error


def _first_difference(error: BaseException) -> str:
    """Return the first difference that torch lists."""
    if isinstance(error, CheckpointException):
        error = next(failure for failure, _ in error.failures.values())
    lines = [line.strip() for line in str(error).splitlines()] or [type(error).__name__]
    return short(next((line for line in lines if "mismatch" in line), lines[0]))
