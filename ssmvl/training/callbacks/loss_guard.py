"""Loss guard: stops a stage if values are not finite or the loss jumps, and names the samples."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable
from typing import Any

from composer import Callback, Event, Logger, State
from composer.utils import dist

from ssmvl.errors import RunError, short
from ssmvl.training.gradients import GradientClipping, all_finite

HISTORY = 50  # preceding steps that a loss is compared with
ADVICE = "inspect the samples or try a smaller learning rate, then run again"


class LossGuard(Callback):
    """Checks gradients before the optimizer uses them, the loss of each step, and weights before they are saved.

    Args:
        clipping: computes the norm of the gradients.
        jump: largest allowed excess, in nats, of a loss over the largest of the `HISTORY` preceding ones; None: any.
        skips: consecutive steps that may be skipped because a gradient is not finite; one more stops the stage.
        due: returns True if a checkpoint is due at an event.

    Raises:
        RunError: gradients, loss or weights are not finite, or the loss jumps. Raised on every rank, before such a step
            is saved in a checkpoint.
    """

    def __init__(
        self, clipping: GradientClipping, jump: float | None, skips: int, due: Callable[[State, Event], bool]
    ) -> None:
        self._clipping, self._skips = clipping, skips
        self._jump = math.inf if jump is None else jump
        self._losses: deque[float] = deque(maxlen=HISTORY)
        self._skipped = 0  # consecutive steps
        self._due = due

    def state_dict(self) -> dict[str, Any]:
        """Return the recent losses as text: a sharded checkpoint is loaded only into existing keys and tensors."""
        return {"before": json.dumps(list(self._losses))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the losses before the checkpoint, so that a jump that stopped the run stops it again."""
        self._losses.extend(json.loads(state["before"]))

    def after_train_batch(self, state: State, logger: Logger) -> None:
        """Check the gradients of a step before the optimizer uses them."""
        norm = float(self._clipping.norm)
        self._skipped = 0 if math.isfinite(norm) else self._skipped + 1
        if not self._skipped:
            return
        step, samples = state.timestamp.batch.value + 1, _samples(state)
        what = f"step {step}: the gradient is not finite (norm {norm})"
        if self._skipped > self._skips:
            raise RunError(
                f"{what}; the samples of this step: {samples}. The weights were not changed, and the latest checkpoint "
                f"is from an earlier step: {ADVICE}, or raise max_skipped_steps to skip such steps"
            )
        for parameter in state.model.parameters():
            parameter.grad = None  # the optimizer skips parameters without a gradient
        logger.log_metrics({"skipped_steps": self._skipped})
        if dist.get_global_rank() == 0:
            print(f"{what}, skipped ({self._skipped} of at most {self._skips} in a row): {samples}", flush=True)

    def batch_end(self, state: State, logger: Logger) -> None:
        """Check the loss of a step, which Composer has summed over all ranks."""
        if self._skipped:
            return
        loss = float(state.total_loss_dict["loss/train/total"])
        largest = max(self._losses) if len(self._losses) == HISTORY else math.inf
        if math.isfinite(loss) and loss <= largest + self._jump:
            self._losses.append(loss)
            return
        what = f"the loss is {loss:.4g}"
        if math.isfinite(loss):
            what += f"; loss_jump allows at most {self._jump:g} more than {largest:.4g}, "
            what += f"the largest of the {HISTORY} preceding steps"
        raise RunError(
            f"step {state.timestamp.batch.value}: {what}; the samples of this step: {_samples(state)}. The latest "
            f"checkpoint is from an earlier step: {ADVICE}"
        )

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        """Check the weights before they are saved."""
        if self._due(state, Event.BATCH_CHECKPOINT):
            self._require_finite(state)

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        """Check the weights before they are saved."""
        if self._due(state, Event.EPOCH_CHECKPOINT):
            self._require_finite(state)

    def _require_finite(self, state: State) -> None:
        if not all_finite(state.model):
            raise RunError(
                f"step {state.timestamp.batch.value}: the weights are not finite after this step, so they are not "
                f"saved; the samples of this step: {_samples(state)}. The latest checkpoint is from an earlier "
                f"step: {ADVICE}"
            )


def _samples(state: State) -> str:
    names = [name for part in dist.all_gather_object(state.batch["sample_ids"]) for name in part]
    return short(", ".join(names))
