"""Saving of figures as PNG."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from ssmvl.files import written_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns, for example, about its cache directory


def save_png(figure: Figure, png: Path, dpi: int) -> None:
    """Write a figure atomically, without matplotlib's warnings: characters missing in the font are drawn as boxes."""
    with written_whole(png) as partial, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        figure.savefig(partial, dpi=dpi, format="png")
