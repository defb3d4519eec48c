"""The progress of a conversion: a bar on a terminal, lines in a log."""

from __future__ import annotations

import sys
import time

from ssmvl.data.conversion.parts import NOTHING, Summary

LINE_EVERY = 30.0  # seconds between lines of progress where there is no terminal


class Progress:
    """A bar on a terminal, a line now and then elsewhere: share of the sources that is read, time left, rates."""

    def __init__(self, place: str) -> None:
        from tqdm import tqdm

        self.place = place
        self.found = self.earlier = NOTHING
        self.shown = time.monotonic()
        self.bar = tqdm(total=1.0, desc=place, disable=None, bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}")
        self.start, self.share, self.first = self.shown, 0.0, 0.0

    def skip(self, found: Summary, share: float) -> None:
        """Count a part that an earlier run wrote."""
        self.earlier = self.earlier.plus(found)
        self.first = self.bar.initial = share
        self.add(found, share)

    def add(self, found: Summary, share: float) -> None:
        """Count a part; parts may come in any order."""
        self.found = self.found.plus(found)
        self.share = self.bar.n = max(self.share, share)

    def show(self) -> None:
        """Update the bar, or print a line if none was printed for a while."""
        now = time.monotonic()
        seconds = now - self.start
        samples, size = self.found.samples - self.earlier.samples, self.found.bytes - self.earlier.bytes
        rates = f"{samples / seconds:,.0f} samples/s, {size / seconds / 1e6:,.1f} MB/s"
        postfix = f"{rates}, {self.found.skipped.total():,} left out"
        self.bar.set_postfix_str(postfix)
        if self.bar.disable and now - self.shown >= LINE_EVERY:
            self.shown = now
            form = "{desc}: {percentage:.0f} %, {elapsed} gone, {remaining} left{postfix}"
            line = self.bar.format_meter(
                self.share, 1.0, seconds, prefix=self.place, bar_format=form, postfix=postfix, initial=self.first
            )
            print(line, file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
