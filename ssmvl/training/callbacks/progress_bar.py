"""Progress of a stage: a bar on a terminal, a line from time to time in a log."""

from __future__ import annotations

import sys
from typing import Any

from composer import Logger, State, TimeUnit
from composer.loggers import LoggerDestination
from composer.utils import dist
from tqdm.auto import tqdm

from ssmvl.training.callbacks.accuracy import WINDOW

SHOWN = {  # logged metrics that are shown
    "loss/train/total": "loss {:.4f}",
    "throughput/tokens_per_sec": "{:,.0f} tokens/s",
    "throughput/supervised_tokens_per_sec": "{:,.0f} supervised",
    "throughput/device/mfu": "MFU {:.1%}",
    "memory/peak_reserved_mem": "{:.1f} GB",
    "memory/process": "{:.2f} GB",
    "time/waiting_for_data": "{:.0%} waiting for data",
    "time/remaining_estimate": "{} left",
}


class ProgressBar(LoggerDestination):
    """Shows the metrics in `SHOWN` on the first rank: a bar on a terminal, else a line every `WINDOW` steps.

    Args:
        stage: name of the stage.
    """

    def __init__(self, stage: str) -> None:
        self._stage = stage
        self._latest: dict[str, Any] = {}
        self._bar: tqdm[Any] | None = None

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Keep the metrics that are shown."""
        self._latest |= {name: value for name, value in metrics.items() if name in SHOWN}

    def fit_start(self, state: State, logger: Logger) -> None:
        """Start a bar at the current step."""
        if dist.get_global_rank() == 0 and sys.stderr.isatty():
            self._bar = tqdm(
                total=_steps(state), initial=_step(state), bar_format="|{bar:20}| {desc}", dynamic_ncols=True
            )

    def batch_end(self, state: State, logger: Logger) -> None:
        """Show the current step."""
        step, total = _step(state), _steps(state)
        position = f"{self._stage} {step}" + (f"/{total}" if total else "")
        if self._bar is not None:
            self._bar.set_description_str(f"{position}: {self._line()}", refresh=False)
            self._bar.update()
        elif dist.get_global_rank() == 0 and (step % WINDOW == 0 or step == total):
            print(f"{position}: {self._line()}", flush=True)

    def fit_end(self, state: State, logger: Logger) -> None:
        """Close the bar."""
        self.close(state, logger)

    def close(self, state: State, logger: Logger) -> None:
        """Close the bar; called after errors too."""
        if self._bar is not None:
            self._bar.close()

    def _line(self) -> str:
        shown = dict(self._latest)
        if "time/remaining_estimate" in shown:
            seconds = int(3600 * shown["time/remaining_estimate"])
            shown["time/remaining_estimate"] = tqdm.format_interval(seconds)
        return ", ".join(text.format(shown[name]) for name, text in SHOWN.items() if name in shown)


def _step(state: State) -> int:
    return int(state.timestamp.batch.value)


def _steps(state: State) -> int | None:
    """The number of steps in the stage, if its duration determines it."""
    duration = state.max_duration
    if duration is not None and duration.unit is TimeUnit.BATCH:
        return int(duration.value)
    if duration is not None and duration.unit is TimeUnit.EPOCH and state.dataloader_len is not None:
        return int(duration.value) * int(state.dataloader_len)
    return None
