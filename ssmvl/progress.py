"""Progress display: a bar on a terminal, periodic lines in a log."""

from __future__ import annotations

import os
import sys
from typing import Any

from tqdm.auto import tqdm

LINE_INTERVAL = 30.0  # seconds between lines when stderr is not a terminal
LINE = "{desc}: {n_fmt}/{total_fmt}, {elapsed} elapsed, {remaining} left{postfix}"


class _Lines(tqdm):
    """tqdm that writes a line every `LINE_INTERVAL` seconds instead of redrawing a bar."""

    def __init__(self, *args: Any, **options: Any) -> None:
        options |= {"mininterval": LINE_INTERVAL, "delay": LINE_INTERVAL, "miniters": 1, "leave": False}
        super().__init__(*args, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Write the line."""
        if msg is None:
            print(self, file=sys.stderr, flush=True)
        return True


def progress(*args: Any, **options: Any) -> tqdm[Any]:
    """Return a `tqdm` with these arguments, shown on the first rank only. Lines in a log have the format `LINE`."""
    disable = os.environ.get("RANK", "0") != "0"
    if sys.stderr.isatty():
        return tqdm(*args, **options, disable=disable, dynamic_ncols=True)
    return _Lines(*args, **{"bar_format": LINE, **options}, disable=disable)
