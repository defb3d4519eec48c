"""How often training answers are right, by type of question, while the model trains."""

from __future__ import annotations

import torch
from composer import Callback, Logger, State
from composer.utils import dist
from torch import Tensor

WINDOW = 10  # batches that one logged share is taken over, so that devices are waited for rarely


class AnswerAccuracy(Callback):
    """Logs `accuracy/<type>` (`accuracy/all` where questions have no type): the share of answers that are right.

    A sample counts as right if each of its supervised tokens, ends included, is the likeliest after those
    before it: where there is one answer, greedy decoding with these weights gives it. Taken from the logits of the
    training step, before the step's update.
    """

    def __init__(self) -> None:
        self._types: list[str] = []
        self._right: list[Tensor] = []

    def after_loss(self, state: State, logger: Logger) -> None:
        """Count one micro-batch; nothing is read back from the device."""
        right = state.outputs["logits"].argmax(-1) == state.outputs["labels"]
        answers = right.split(state.batch["num_labels"])
        self._right.append(torch.stack([answer.all() for answer in answers]))
        self._types += state.batch["types"]

    def batch_end(self, state: State, logger: Logger) -> None:
        """Log the shares over all ranks, once in `WINDOW` batches."""
        if state.timestamp.batch.value % WINDOW:
            return
        mine = list(zip(self._types, torch.cat(self._right).tolist(), strict=True))
        self._types, self._right = [], []
        by_type: dict[str, list[bool]] = {}
        for type_, right in (pair for part in dist.all_gather_object(mine) for pair in part):
            by_type.setdefault(type_ or "all", []).append(right)
        logger.log_metrics({f"accuracy/{type_}": sum(found) / len(found) for type_, found in by_type.items()})
