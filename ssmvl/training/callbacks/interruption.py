"""Ctrl-C and SIGTERM during training: a checkpoint after the current step, then the end of the run."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import torch
from composer import Callback, Event, Logger, State
from composer.utils import create_interval_scheduler, dist


class Interruption(Callback):
    """Writes a checkpoint after the step in which any rank received a signal, and ends training on every rank.

    Composer calls callbacks in order, so this one must come after `CheckpointSaver`, which calls `due`. A second SIGINT
    ends the process at once.

    Args:
        interval: Composer time between other checkpoints.

    Attributes:
        received: number of the signal that this rank received; 0 if none.

    Raises:
        KeyboardInterrupt: after the checkpoint, for SIGINT.
        SystemExit: after the checkpoint, for SIGTERM, with code 143.
    """

    def __init__(self, interval: str) -> None:
        self._scheduled = create_interval_scheduler(interval)
        self.received = 0
        self._agreed = 0  # the largest number that any rank had received at the end of the step
        self._previous: dict[int, Any] = {}

    def due(self, state: State, event: Event) -> bool:
        """Return True if a checkpoint is written at this event."""
        return bool(self._scheduled(state, event)) or self._agreed > 0

    def fit_start(self, state: State, logger: Logger) -> None:
        """Install the signal handlers, which only the main thread may do."""
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}

    def batch_end(self, state: State, logger: Logger) -> None:
        """Agree with the other ranks on whether this is the last step."""
        received = torch.tensor(self.received, device=next(state.model.parameters()).device)
        dist.all_reduce(received, reduce_operation="MAX")
        self._agreed = int(received)

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        """End training, now that the checkpoint has been written."""
        if self._agreed == signal.SIGINT:
            raise KeyboardInterrupt
        if self._agreed:
            raise SystemExit(128 + self._agreed)

    def fit_end(self, state: State, logger: Logger) -> None:
        """Restore the signal handlers."""
        self.close(state, logger)

    def close(self, state: State, logger: Logger) -> None:
        """Restore the signal handlers; called after errors too."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received == number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.received and dist.get_global_rank() == 0:
            print("stopping after this step to write a checkpoint", flush=True)
        self.received = max(self.received, number)
