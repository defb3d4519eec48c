"""Whether a checkpoint is of this run: it says whose it is, and another's is refused."""

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
    """Puts the run's identity into each checkpoint, and refuses one with another.

    Args:
        recipe: of the run.

    Raises:
        RunError: the checkpoint is of a run with another model, seed, data or trained parts.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._identity = identity(recipe)

    def state_dict(self) -> dict[str, Any]:
        """As text, because torch takes a mapping in a sharded checkpoint apart and wants the same keys back."""
        return {"identity": json.dumps(self._identity)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Compare."""
        if found := differences(write_out(json.loads(state["identity"]), saved=True), self._identity):
            raise RunError("it is of another run:\n  " + "\n  ".join(found))


@contextmanager
def resuming(checkpoint: str | None) -> Iterator[None]:
    """While Composer reads a checkpoint: what it cannot use is named.

    Args:
        checkpoint: None where there is none.

    Raises:
        RunError: tensors, names or the identity in it are another model's or run's.
    """
    try:
        yield
    except (RunError, RuntimeError, ValueError, KeyError, CheckpointException) as error:
        elsewhere = (torch.OutOfMemoryError, torch.distributed.DistError)
        if checkpoint is None or isinstance(error, elsewhere) or "gloo/transport" in str(error):
            raise
        why = str(error) if isinstance(error, RunError) else _first(error)
        advice = "put this run's own there, or none to begin the stage anew"
        raise RunError(f"{checkpoint} cannot be resumed from; {advice}: {why}") from error


def _first(error: BaseException) -> str:
    """The first difference that torch lists."""
    if isinstance(error, CheckpointException):
        error = next(found for found, _ in error.failures.values())
    lines = [line.strip() for line in str(error).splitlines()] or [type(error).__name__]
    return short(next((line for line in lines if "mismatch" in line), lines[0]))
