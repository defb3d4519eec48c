"""Print the peak of anonymous memory while a model is built and loaded, as a share of its parameters' size.

python memory_script.py RECIPE WEIGHTS DTYPE [override …]
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import torch

import ssmvl


def anonymous() -> int:
    """Return the bytes of this process in memory that are not backed by a file."""
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssAnon")]
    return int(line.split()[1]) * 1024


def main(recipe: str, weights: str, dtype: str, *overrides: str) -> None:
    ssmvl.build_model(recipe, *overrides, device="meta")  # do not count imports and compilation
    before, sizes, stop = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.002):
            sizes.append(anonymous())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    model = ssmvl.build_model(recipe, *overrides, weights=weights, dtype=getattr(torch, dtype))
    sizes.append(anonymous())
    stop.set()
    watcher.join()
    print((max(sizes) - before) / sum(p.nbytes for p in model.parameters()))


main(*sys.argv[1:])
