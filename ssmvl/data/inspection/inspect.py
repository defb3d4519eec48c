"""What shards hold, and what a recipe's model would read of it and learn: figures, and a contact sheet."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from ssmvl.data.cache import fetch_shard
from ssmvl.data.conversion.parts import INDEX
from ssmvl.data.inspection.problems import entry_problem
from ssmvl.data.inspection.tokens import Tokens, sample_card
from ssmvl.data.inspection.verify import fetch_index, find_splits, read_index
from ssmvl.data.remote import is_remote
from ssmvl.data.shards import require_streaming, unpack_record
from ssmvl.drawing.sample_cards import Card, draw_samples
from ssmvl.errors import DataError, short
from ssmvl.processing.image_decoding import open_image, read_image
from ssmvl.processing.processor import Processor

FETCHED = 8  # shards of a URL that are looked at, evenly spread
CARDS, ROWS, BAR = 12, 12, 40  # samples of a contact sheet; rows of a histogram, and letters of its longest bar
Reader = Callable[[], tuple[Processor, str]]
EIGHTHS = " ▏▎▍▌▋▊▉"
REFUSED_SHOWN, TYPES_SHOWN = 10, 20


@dataclass
class Figures:
    """What records hold."""

    types: Counter[str] = field(default_factory=Counter)
    images: Counter[int] = field(default_factory=Counter)  # samples by their number of images
    turns: list[int] = field(default_factory=list)
    formats: Counter[str] = field(default_factory=Counter)
    sizes: list[tuple[int, int]] = field(default_factory=list)

    def add(self, record: dict[str, Any]) -> None:
        """Count one record."""
        self.types[record["type"]] += 1
        self.images[len(record["images"])] += 1
        self.turns.append((len(record["conversation"]) + 1) // 2)
        for image in record["images"]:
            try:
                read_image(image)
                with open_image(image) as opened:
                    self.sizes.append(opened.size)
                    self.formats[str(opened.format)] += 1
            except DataError:  # `verify` says what is wrong
                self.formats["damaged"] += 1


def inspect(folder: str, reader: Reader | None, samples: int, png: Path | None) -> None:
    """Print what shards hold; with a reader also what its model reads, and draw it.

    Args:
        folder: of the shards of one split, or one that holds one split. Of a URL, `FETCHED` shards are fetched.
        reader: called once the shards are found; returns the processor of a model and its label in the output.
        samples: to look at, evenly spread; 0 looks at all.
        png: where a contact sheet of 12 samples goes; needs a reader.

    Raises:
        DataError: there are no shards, a record cannot be read, or the picture cannot be drawn or written.
    """
    require_streaming()
    if samples < 0:
        raise DataError(f"{samples} samples cannot be looked at; 0 looks at all")
    with TemporaryDirectory() as temporary:
        place, split = _one_split(folder, Path(temporary))
        entries = _readable(place, read_index(split / INDEX))
        processor, how = (None, "") if reader is None else reader()
        console = Console(highlight=False)
        total = sum(entry["samples"] for entry in entries)
        size = decimal(sum(entry["raw_data"]["bytes"] for entry in entries))
        console.print(f"{place}: {_counted(total, 'sample')}, {_counted(len(entries), 'shard')}, {size}", markup=False)
        if is_remote(place):
            entries = _fetched(place, split, entries)
        here = sum(entry["samples"] for entry in entries)
        count = min(samples or here, here)
        records = _records(split, entries, [number * here // count for number in range(count)])
        figures, tokens, cards = _look(records, count, processor, CARDS if png else 0)
    spread = "all samples" if count == total else f"{_counted(count, 'sample')}, evenly spread"
    of = f" over {_counted(len(entries), 'shard')}" if here < total else ""
    console.print(f"From {spread}{of}:\n")
    _print_figures(console, figures)
    if processor:
        console.print(f"\nAs {how} reads them, {processor.tokens_per_image:,} tokens for an image:\n", markup=False)
        _print_tokens(console, tokens, processor)
    if png:
        if not cards:
            raise DataError(f"{png}: not drawn; no sample that was looked at can be trained on")
        draw_samples(f"{place}, as {how} reads it", cards, png)
        console.print(f"\n{png}: {_counted(len(cards), 'sample')}, as the model reads them", markup=False)


def _look(
    records: Iterable[dict[str, Any]], count: int, processor: Processor | None, most: int
) -> tuple[Figures, Tokens, list[Card]]:
    """What records hold, what a model reads of them, and cards of `most` of them, evenly spread."""
    from tqdm import tqdm

    figures, tokens = Figures(), Tokens()
    cards: list[Card] = []
    for number, record in enumerate(tqdm(records, desc="reading", total=count, unit=" samples", disable=None)):
        figures.add(record)
        sample = tokens.add(record, processor) if processor else None
        if processor and sample and number * most >= len(cards) * count and len(cards) < most:
            cards.append(sample_card(record, sample, processor))
    return figures, tokens, cards


def _one_split(folder: str, temporary: Path) -> tuple[str, Path]:
    """The folder or URL of the shards, and where their index lies."""
    if is_remote(folder):
        ((url, index),) = fetch_index(folder, temporary).items()
        return url, index.parent
    splits = find_splits(Path(folder))
    if len(splits) > 1:
        raise DataError(f"{folder} holds the splits {', '.join(path.name for path in splits)}; give one: {splits[0]}")
    return str(splits[0]), splits[0]


def _readable(place: str, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for entry in entries:
        if problem := entry_problem(entry):
            raise DataError(f"{place}/{INDEX}: a shard cannot be read: {problem}")
    if not any(entry["samples"] for entry in entries):
        raise DataError(f"{place}/{INDEX} lists no sample")
    return entries


def _fetched(url: str, split: Path, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Some shards of a URL, evenly spread, that now lie in `split`."""
    filled = [entry for entry in entries if entry["samples"]]
    count = min(FETCHED, len(filled))
    chosen = [filled[number * len(filled) // count] for number in range(count)]
    for entry in chosen:
        fetch_shard(url, split, entry["raw_data"])
    return chosen


def _records(split: Path, entries: Sequence[dict[str, Any]], places: Iterable[int]) -> Iterable[dict[str, Any]]:
    """Records at places of the whole data set."""
    from streaming.base.format import reader_from_json

    readers = [reader_from_json(str(split), None, entry) for entry in entries]
    starts = [0, *accumulate(len(reader) for reader in readers)]
    for place in places:
        shard = bisect_right(starts, place) - 1
        try:
            yield unpack_record(readers[shard][place - starts[shard]])
        except Exception as error:  # any byte may be any other
            path = split / entries[shard]["raw_data"]["basename"]
            what = f"sample {place - starts[shard]} cannot be read ({type(error).__name__}: {error})"
            raise DataError(f"{path}: {what}; `ssmvl data verify` finds everything that is damaged") from error


def _print_figures(console: Console, figures: Figures) -> None:
    count = sum(figures.images.values())
    common = figures.types.most_common(TYPES_SHOWN)
    if rest := count - sum(number for _, number in common):
        common.append((f"{len(figures.types) - TYPES_SHOWN:,} others", rest))
    _print_shares(console, "source", [(name or "(none)", number) for name, number in common])
    _print_shares(console, "images", [(f"{number:,}", figures.images[number]) for number in sorted(figures.images)])
    if figures.formats:
        _print_shares(console, "format", figures.formats.most_common())
    console.print(f"turns of a conversation: median {median(figures.turns):g}, most {max(figures.turns):,}")
    if figures.sizes:
        ordered = sorted(figures.sizes, key=math.prod)
        middle, largest = (f"{width:,} × {height:,}" for width, height in (ordered[len(ordered) // 2], ordered[-1]))
        console.print(f"pixels of an image: median {middle}, largest {largest}")


def _print_shares(console: Console, heading: str, rows: Sequence[tuple[str, int]]) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column(heading)
    total = sum(number for _, number in rows)
    for other in (f"{'images' if heading == 'format' else 'samples'}", "share"):
        table.add_column(other, justify="right")
    for name, number in rows:
        table.add_row(escape(name), f"{number:,}", f"{number / total:.1%}")
    console.print(table, "")


def _print_tokens(console: Console, tokens: Tokens, processor: Processor) -> None:
    count = len(tokens.lengths) + len(tokens.refused)
    if tokens.lengths:
        table = Table("tokens", "", box=None, pad_edge=False)
        table.columns[0].justify = "right"
        for name, number, bar in histogram(tokens.lengths):
            table.add_row(name, f"{bar} {number:,}" if number else "")
        console.print(table, "")
        console.print(f"tokens of a sample: median {median(tokens.lengths):,g}, most {max(tokens.lengths):,}")
        console.print(f"learned: {tokens.learned / sum(tokens.lengths):.1%} of all tokens")
    limit = f"longer than {processor.max_text_tokens:,} text tokens (max_text_tokens)"
    console.print(f"cut: {_counted(tokens.cut, 'sample')} ({tokens.cut / count:.1%}), {limit}")
    console.print(f"refused: {_counted(len(tokens.refused), 'sample')} ({len(tokens.refused) / count:.1%})")
    for name, reason in tokens.refused[:REFUSED_SHOWN]:
        console.print(f"  {name}: {short(reason)}", markup=False)
    if len(tokens.refused) > REFUSED_SHOWN:
        console.print(f"  … and {len(tokens.refused) - REFUSED_SHOWN:,} more")


def histogram(numbers: Sequence[int]) -> list[tuple[str, int, str]]:
    """Rows of a histogram with rounded edges: a range, how many numbers it has, and a bar.

    What lies beyond the 99th percentile is one row, so that a single long sample does not flatten all others.
    """
    ordered = sorted(numbers)
    low, high = ordered[0], ordered[int(0.99 * (len(ordered) - 1))]
    least = max(1, (high - low + 1) / (ROWS - 1))
    power = 10 ** math.floor(math.log10(least))
    step = int(next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least))
    first = low // step * step
    edges = list(range(first, high + 1, step))
    counts = Counter(min((number - first) // step, len(edges)) for number in ordered)
    names = [f"{edge:,} – {edge + step - 1:,}" if step > 1 else f"{edge:,}" for edge in edges]
    if counts[len(edges)]:
        names.append(f"from {first + len(edges) * step:,}")
    most = max(counts.values())
    return [(name, counts[row], _bar(counts[row] / most)) for row, name in enumerate(names)]


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def _bar(share: float) -> str:
    eighths = max(math.ceil(share > 0), round(share * BAR * 8))
    return "█" * (eighths // 8) + EIGHTHS[eighths % 8].strip()
