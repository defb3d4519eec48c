"""Progress of a conversion: a bar on a terminal, lines in a log."""

from __future__ import annotations

import sys
import time

from ssmvl.data.conversion.parts import EMPTY_SUMMARY, Summary
from ssmvl.progress import LINE_INTERVAL


class Progress:
    """A bar on a terminal, or occasional lines in a log: share of the sources read, time left, rates."""

    def __init__(self, target: str) -> None:
        from tqdm import tqdm

        self.target = target
        self.summary = self.earlier = EMPTY_SUMMARY
        self.last_shown = time.monotonic()
        bar_format = "{l_bar}{bar}| {elapsed}<{remaining}{postfix}"
        self.bar = tqdm(total=1.0, desc=target, disable=None, bar_format=bar_format)
        self.start, self.share, self.initial_share = self.last_shown, 0.0, 0.0

    def skip(self, part: Summary, share: float) -> None:
        """Count a part that an earlier run wrote."""
        self.earlier = self.earlier.plus(part)
        self.initial_share = self.bar.initial = share
        self.add(part, share)

    def add(self, part: Summary, share: float) -> None:
        """Count a part. Parts may arrive in any order."""
        self.summary = self.summary.plus(part)
        self.share = self.bar.n = max(self.share, share)

    def show(self) -> None:
        """Update the bar, or print a line every `LINE_INTERVAL` seconds."""
        now = time.monotonic()
        seconds = now - self.start
        samples, size = self.summary.samples - self.earlier.samples, self.summary.bytes - self.earlier.bytes
        rates = f"{samples / seconds:,.0f} samples/s, {size / seconds / 1e6:,.1f} MB/s"
        postfix = f"{rates}, {self.summary.skipped.total():,} skipped"
        self.bar.set_postfix_str(postfix)
        if self.bar.disable and now - self.last_shown >= LINE_INTERVAL:
            self.last_shown = now
            line = self.bar.format_meter(
                self.share,
                1.0,
                seconds,
                prefix=self.target,
                bar_format="{desc}: {percentage:.0f} %, {elapsed} elapsed, {remaining} left{postfix}",
                postfix=postfix,
                initial=self.initial_share,
            )
            print(line, file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
