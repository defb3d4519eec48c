"""Training accuracy: the share of correct answers, by type of question."""

from __future__ import annotations

import torch
from composer import Callback, Logger, State
from composer.utils import dist
from torch import Tensor

WINDOW = 10  # batches per logged value; reading a value makes the CPU wait for the device


class AnswerAccuracy(Callback):
    """Logs `accuracy/<type>` (`accuracy/all` for questions without a type): the share of correct answers.

    A sample is correct if each of its supervised tokens, end tokens included, is the most likely one given the tokens
    before it. If it has one answer, greedy decoding with these weights would generate it. The logits are those of the
    training step, before its update.
    """

    def __init__(self) -> None:
        self._types: list[str] = []
        self._correct: list[Tensor] = []

    def after_loss(self, state: State, logger: Logger) -> None:
        """Score one micro-batch without waiting for the device."""
        correct = state.outputs["logits"].argmax(-1) == state.outputs["labels"]
        answers = correct.split(state.batch["num_labels"])
        self._correct.append(torch.stack([answer.all() for answer in answers]))
        self._types += state.batch["types"]

    def batch_end(self, state: State, logger: Logger) -> None:
        """Log the shares over all ranks, every `WINDOW` batches."""
        if state.timestamp.batch.value % WINDOW:
            return
        own = list(zip(self._types, torch.cat(self._correct).tolist(), strict=True))
        self._types, self._correct = [], []
        by_type: dict[str, list[bool]] = {}
        for type_, correct in (pair for part in dist.all_gather_object(own) for pair in part):
            by_type.setdefault(type_ or "all", []).append(correct)
        logger.log_metrics({f"accuracy/{type_}": sum(answers) / len(answers) for type_, answers in by_type.items()})
