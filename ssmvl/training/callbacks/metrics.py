"""Metrics logged besides the loss: throughput, waiting time, memory, and norms of weights and gradients."""

from __future__ import annotations

import time

import psutil
import torch
from composer import Callback, Logger, State
from composer.utils import dist

from ssmvl.processing.batch import num_samples
from ssmvl.training.callbacks.accuracy import WINDOW
from ssmvl.training.gradients import total_norm


class Pace(Callback):
    """Logs `throughput/supervised_tokens_per_sec`, over all ranks, `time/waiting_for_data` and `memory/process`.

    `time/waiting_for_data` is the share of time, 0 to 1, that ranks wait for their loaders; the maximum over ranks.
    `memory/process` is the memory of the largest rank process in GB, without GPU memory and loader processes.
    """

    def __init__(self) -> None:
        self._warm = False  # True after the first window of this launch
        self._reset(time.perf_counter())

    def _reset(self, now: float) -> None:
        self._since, self._waited, self._supervised = now, 0.0, 0

    def before_dataloader(self, state: State, logger: Logger) -> None:
        """Note the time at which a batch is requested."""
        self._requested = time.perf_counter()

    def after_dataloader(self, state: State, logger: Logger) -> None:
        """Add the waiting time and the supervised tokens of the batch."""
        self._waited += time.perf_counter() - self._requested
        self._supervised += len(state.batch["labels"])

    def batch_end(self, state: State, logger: Logger) -> None:
        """Log every `WINDOW` steps, except for the first window of a launch, which includes startup."""
        if state.timestamp.batch.value % WINDOW:
            return
        now = time.perf_counter()
        if self._warm:
            parts = dist.all_gather_object((self._waited, self._supervised, psutil.Process().memory_info().rss))
            waited, supervised, memory = (list(column) for column in zip(*parts, strict=True))
            elapsed = now - self._since
            logger.log_metrics(
                {
                    "time/waiting_for_data": max(waited) / elapsed,
                    "throughput/supervised_tokens_per_sec": sum(supervised) / elapsed,
                    "memory/process": max(memory) / 1e9,
                }
            )
        self._warm = True
        self._reset(now)


class Norms(Callback):
    """Logs `norm/weight/<part>` and, before clipping, `norm/gradient/<part>` of each trained part.

    Parts are `connector`, `language` and each of the `encoders`. Composer's OptimizerMonitor does not support FSDP2.
    """

    def __init__(self) -> None:
        self._remaining = 0  # samples of the step whose backward has not run yet

    def batch_start(self, state: State, logger: Logger) -> None:
        """Begin a step of one or more micro-batches."""
        self._remaining = num_samples(state.batch)

    def after_backward(self, state: State, logger: Logger) -> None:
        """Log every `WINDOW` steps, after the backward of the last micro-batch."""
        self._remaining -= num_samples(state.batch)
        if self._remaining or (state.timestamp.batch.value + 1) % WINDOW:
            return
        parts: dict[str, list[torch.nn.Parameter]] = {}
        for name, parameter in state.model.named_parameters():
            if parameter.grad is not None:
                path = name.removeprefix("module.").removeprefix("model.").split(".")
                parts.setdefault(".".join(path[: 2 if path[0] == "encoders" else 1]), []).append(parameter)
        for part, parameters in parts.items():
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            norms = {"weight": total_norm(parameters), "gradient": total_norm(gradients)}
            logger.log_metrics({f"norm/{kind}/{part}": norm for kind, norm in norms.items()})
