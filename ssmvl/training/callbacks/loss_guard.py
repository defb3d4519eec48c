"""Stops a stage whose loss, gradients or weights are not finite, or whose loss jumps, and names the samples."""

from __future__ import annotations

import json
import math
from collections import deque
from typing import Any

from composer import Callback, Event, Logger, State
from composer.utils import create_interval_scheduler, dist

from ssmvl.errors import RunError, short
from ssmvl.training.gradients import GradientClipping, all_finite

BEFORE = 50  # steps that one is compared with
ADVICE = "look at the samples or try a smaller learning rate, and run again"


class LossGuard(Callback):
    """Looks at each step: its gradients before the optimizer uses them, its loss, and weights before they are saved.

    Args:
        clipping: knows the norm of the gradients.
        jump: nats by which the loss may exceed the largest of the `BEFORE` steps before; None: any.
        skips: steps in a row that are skipped because a gradient is not finite; one more stops the stage.
        checkpoint: interval between checkpoints, Composer time.

    Raises:
        RunError: gradients, loss or weights are not finite, or the loss jumps. On every rank, before a checkpoint is
            made of such a step.
    """

    def __init__(self, clipping: GradientClipping, jump: float | None, skips: int, checkpoint: str) -> None:
        self._clipping, self._skips = clipping, skips
        self._jump = math.inf if jump is None else jump
        self._before: deque[float] = deque(maxlen=BEFORE)
        self._skipped = 0  # in a row
        self._due = create_interval_scheduler(checkpoint)

    def state_dict(self) -> dict[str, Any]:
        """As text, because a sharded checkpoint is read into as many tensors and keys as are there already."""
        return {"before": json.dumps(list(self._before))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the losses before a checkpoint: what stopped a run stops it again."""
        self._before.extend(json.loads(state["before"]))

    def after_train_batch(self, state: State, logger: Logger) -> None:
        """Look at the gradients of a step, before the optimizer uses them."""
        norm = float(self._clipping.norm)
        self._skipped = 0 if math.isfinite(norm) else self._skipped + 1
        if not self._skipped:
            return
        step, samples = state.timestamp.batch.value + 1, _samples(state)
        what = f"step {step}: the gradient is not finite (norm {norm})"
        if self._skipped > self._skips:
            raise RunError(
                f"{what}; the samples of this step: {samples}. The weights were not changed, and the latest checkpoint "
                f"is of an earlier step: {ADVICE}, or let max_skipped_steps skip such steps"
            )
        for parameter in state.model.parameters():
            parameter.grad = None  # without a gradient the optimizer leaves a parameter alone
        logger.log_metrics({"skipped_steps": self._skipped})
        if dist.get_global_rank() == 0:
            print(f"{what}, skipped ({self._skipped} of at most {self._skips} in a row): {samples}", flush=True)

    def batch_end(self, state: State, logger: Logger) -> None:
        """Look at the loss of a step, which Composer has summed over all ranks."""
        if self._skipped:
            return
        loss = float(state.total_loss_dict["loss/train/total"])
        largest = max(self._before) if len(self._before) == BEFORE else math.inf
        if math.isfinite(loss) and loss <= largest + self._jump:
            self._before.append(loss)
            return
        what = f"the loss is {loss:.4g}"
        if math.isfinite(loss):
            allowed = f"at most {self._jump:g} more than the largest of the {BEFORE} steps before"
            what += f", {allowed}, {largest:.4g}, is allowed (loss_jump)"
        raise RunError(
            f"step {state.timestamp.batch.value}: {what}; the samples of this step: {_samples(state)}. The latest "
            f"checkpoint is of an earlier step: {ADVICE}"
        )

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        """Look at the weights before they are saved."""
        if self._due(state, Event.BATCH_CHECKPOINT):
            self._require_finite(state)

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        """Look at the weights before they are saved."""
        if self._due(state, Event.EPOCH_CHECKPOINT):
            self._require_finite(state)

    def _require_finite(self, state: State) -> None:
        if not all_finite(state.model):
            raise RunError(
                f"step {state.timestamp.batch.value}: the weights are not finite after it; no checkpoint is made of "
                f"them. The samples of this step: {_samples(state)}. The latest checkpoint is of an earlier "
                f"step: {ADVICE}"
            )


def _samples(state: State) -> str:
    names = [name for part in dist.all_gather_object(state.batch["sample_ids"]) for name in part]
    return short(", ".join(names))
