"""Stops a stage whose loss is no number or jumps, before a checkpoint is made of it, and names the samples."""

from __future__ import annotations

import json
import math
from collections import deque
from typing import Any

from composer import Callback, Logger, State
from composer.utils import dist

from ssmvl.errors import RunError, short

BEFORE = 50  # steps that one is compared with


class LossGuard(Callback):
    """Looks at the loss of each step, which Composer has summed over all ranks.

    Args:
        jump: nats by which it may exceed the largest of the `BEFORE` steps before; None: any.

    Raises:
        RunError: it is no number, or exceeds that. On every rank, after the step and before its checkpoint.
    """

    def __init__(self, jump: float | None) -> None:
        self._jump = math.inf if jump is None else jump
        self._before: deque[float] = deque(maxlen=BEFORE)

    def state_dict(self) -> dict[str, Any]:
        """As text, because a sharded checkpoint is read into as many tensors and keys as are there already."""
        return {"before": json.dumps(list(self._before))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the losses before a checkpoint: what stopped a run stops it again."""
        self._before.extend(json.loads(state["before"]))

    def batch_end(self, state: State, logger: Logger) -> None:
        """Look at one step."""
        loss = float(state.total_loss_dict["loss/train/total"])
        largest = max(self._before) if len(self._before) == BEFORE else math.inf
        if math.isfinite(loss) and loss <= largest + self._jump:
            self._before.append(loss)
            return
        what = f"the loss is {loss:.4g}"
        if math.isfinite(loss):
            allowed = f"at most {self._jump:g} more than the largest of the {BEFORE} steps before"
            what += f", {allowed}, {largest:.4g}, is allowed (loss_jump)"
        names = [name for part in dist.all_gather_object(state.batch["sample_ids"]) for name in part]
        listed = short(", ".join(names))
        raise RunError(
            f"step {state.timestamp.batch.value}: {what}; the samples of this step: {listed}. The newest checkpoint is "
            "of an earlier step: look at the samples or try a smaller learning rate, and run again"
        )
