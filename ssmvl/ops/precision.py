"""Where an op leaves the precision that surrounds it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Autocast switched off for `device`; `meta` has none."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
