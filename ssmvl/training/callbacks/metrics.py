"""What a run logs beside its loss: what it waits for, how fast it learns, and norms of its parts."""

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

    The second is the share of the time, 0 to 1, that the rank which waits longest for its loader waits; the third is
    the memory, in GB, of the largest of the ranks' processes, without that of a GPU and of loaders.
    """

    def __init__(self) -> None:
        self._begun = False
        self._start(time.perf_counter())

    def _start(self, now: float) -> None:
        self._since, self._waited, self._supervised = now, 0.0, 0

    def before_dataloader(self, state: State, logger: Logger) -> None:
        """A batch is asked for."""
        self._asked = time.perf_counter()

    def after_dataloader(self, state: State, logger: Logger) -> None:
        """It is there."""
        self._waited += time.perf_counter() - self._asked
        self._supervised += len(state.batch["labels"])

    def batch_end(self, state: State, logger: Logger) -> None:
        """Log once in `WINDOW` steps; the first ones of a launch, in which everything starts, are left out."""
        if state.timestamp.batch.value % WINDOW:
            return
        now = time.perf_counter()
        if self._begun:
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
        self._begun = True
        self._start(now)


class Norms(Callback):
    """Logs `norm/weight/<part>`, and `norm/gradient/<part>` before it is clipped, of each part that is trained.

    Parts are `connector`, `language` and each of the `encoders`. Composer's OptimizerMonitor does not know what FSDP2
    shards.
    """

    def __init__(self) -> None:
        self._left = 0

    def batch_start(self, state: State, logger: Logger) -> None:
        """A step begins, of one micro-batch or several."""
        self._left = num_samples(state.batch)

    def after_backward(self, state: State, logger: Logger) -> None:
        """Log once in `WINDOW` steps, when the gradients of the last micro-batch are there."""
        self._left -= num_samples(state.batch)
        if self._left or (state.timestamp.batch.value + 1) % WINDOW:
            return
        parts: dict[str, list[torch.nn.Parameter]] = {}
        for name, parameter in state.model.named_parameters():
            if parameter.grad is not None:
                path = name.removeprefix("module.").removeprefix("model.").split(".")
                parts.setdefault(".".join(path[: 2 if path[0] == "encoders" else 1]), []).append(parameter)
        for part, parameters in parts.items():
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            norms = {"weight": total_norm(parameters), "gradient": total_norm(gradients)}
            logger.log_metrics({f"norm/{what}/{part}": norm for what, norm in norms.items()})
