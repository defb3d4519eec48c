"""The scan order `hilbert` for ssmvl."""

from __future__ import annotations

from ssmvl import hookimpl
from ssmvl.registry import Register


@hookimpl
def ssmvl_register(register: Register) -> None:
    """Register the scan order; its module and torch are imported on first use."""
    register("scan_order", "hilbert", "ssmvl_hilbert.order:hilbert")
