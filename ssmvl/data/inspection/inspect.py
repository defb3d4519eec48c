"""Statistics of shards, of the tokens that a recipe's model reads, and a sheet of sample cards."""

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
from ssmvl.progress import progress

FETCHED = 8  # shards of a URL to inspect, evenly spread
CARDS, ROWS, BAR = 12, 12, 40  # samples to draw; rows of a histogram, and characters of its longest bar
Reader = Callable[[], tuple[Processor, str]]
EIGHTHS = " ▏▎▍▌▋▊▉"
REJECTED_SHOWN, TYPES_SHOWN = 10, 20


@dataclass
class Figures:
    """Statistics of records."""

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
            except DataError:  # `verify` names the damage
                self.formats["damaged"] += 1


def inspect(folder: str, reader: Reader | None, samples: int, png: Path | None) -> None:
    """Print statistics of shards; with a reader also of the tokens that its model reads, and draw samples.

    Args:
        folder: directory or URL of the shards of one split, or of a directory that contains one split. At most
            `FETCHED` shards of a URL are fetched.
        reader: called after the shards were found; returns the processor of a model and its label for the output.
        samples: number of samples to inspect, evenly spread; 0 means all.
        png: file for a sheet of 12 sample cards; needs a reader.

    Raises:
        DataError: there are no shards, a record cannot be read, or the sheet cannot be drawn or written.
    """
    require_streaming()
    if samples < 0:
        raise DataError(f"--samples must be at least 0 (0 means all), received {samples}")
    with TemporaryDirectory() as temporary:
        location, split = _one_split(folder, Path(temporary))
        entries = _check_entries(location, read_index(split / INDEX))
        processor, label = (None, "") if reader is None else reader()
        console = Console(highlight=False)
        total = sum(entry["samples"] for entry in entries)
        size = decimal(sum(entry["raw_data"]["bytes"] for entry in entries))
        shards = _counted(len(entries), "shard")
        console.print(f"{location}: {_counted(total, 'sample')}, {shards}, {size}", markup=False)
        if is_remote(location):
            entries = _fetch_some(location, split, entries)
        available = sum(entry["samples"] for entry in entries)
        count = min(samples or available, available)
        records = _records(split, entries, [number * available // count for number in range(count)])
        figures, tokens, cards = _count_records(records, count, processor, CARDS if png else 0)
    sampled = "all samples" if count == total else f"{_counted(count, 'sample')}, evenly spread"
    over = f" over {_counted(len(entries), 'shard')}" if available < total else ""
    console.print(f"From {sampled}{over}:\n")
    _print_figures(console, figures)
    if processor:
        console.print(f"\nAs {label} reads them ({processor.tokens_per_image:,} tokens per image):\n", markup=False)
        _print_tokens(console, tokens, processor)
    if png:
        if not cards:
            raise DataError(f"{png} was not drawn: none of the inspected samples can be used for training")
        draw_samples(f"{location}, as {label} reads it", cards, png)
        console.print(f"\n{png}: {_counted(len(cards), 'sample')}, as the model reads them", markup=False)


def _count_records(
    records: Iterable[dict[str, Any]], count: int, processor: Processor | None, max_cards: int
) -> tuple[Figures, Tokens, list[Card]]:
    """Return statistics of `count` records and their tokens, and up to `max_cards` sample cards, evenly spread."""
    figures, tokens = Figures(), Tokens()
    cards: list[Card] = []
    for number, record in enumerate(progress(records, desc="reading", total=count, unit=" samples")):
        figures.add(record)
        sample = tokens.add(record, processor) if processor else None
        if processor and sample and number * max_cards >= len(cards) * count and len(cards) < max_cards:
            cards.append(sample_card(record, sample, processor))
    return figures, tokens, cards


def _one_split(folder: str, temporary: Path) -> tuple[str, Path]:
    """Return the directory or URL of the shards, and the local directory of their index."""
    if is_remote(folder):
        ((url, index),) = fetch_index(folder, temporary).items()
        return url, index.parent
    splits = find_splits(Path(folder))
    if len(splits) > 1:
        names = ", ".join(path.name for path in splits)
        raise DataError(f"{folder} holds the splits {names}; give one of them, such as {splits[0]}")
    return str(splits[0]), splits[0]


def _check_entries(location: str, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for entry in entries:
        if problem := entry_problem(entry):
            raise DataError(f"{location}/{INDEX}: a shard cannot be read: {problem}")
    if not any(entry["samples"] for entry in entries):
        raise DataError(f"{location}/{INDEX} lists no samples")
    return entries


def _fetch_some(url: str, split: Path, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Fetch up to `FETCHED` shards, evenly spread, to the directory `split`. Returns their entries."""
    nonempty = [entry for entry in entries if entry["samples"]]
    count = min(FETCHED, len(nonempty))
    chosen = [nonempty[number * len(nonempty) // count] for number in range(count)]
    for entry in chosen:
        fetch_shard(url, split, entry["raw_data"])
    return chosen


def _records(split: Path, entries: Sequence[dict[str, Any]], indices: Iterable[int]) -> Iterable[dict[str, Any]]:
    """Yield the records at indices of the whole dataset."""
    from streaming.base.format import reader_from_json

    readers = [reader_from_json(str(split), None, entry) for entry in entries]
    starts = [0, *accumulate(len(reader) for reader in readers)]
    for index in indices:
        shard = bisect_right(starts, index) - 1
        try:
            yield unpack_record(readers[shard][index - starts[shard]])
        except Exception as error:  # damaged bytes may raise anything
            path = split / entries[shard]["raw_data"]["basename"]
            problem = f"sample {index - starts[shard]} cannot be read ({type(error).__name__}: {error})"
            raise DataError(f"{path}: {problem}; run `ssmvl data verify` to list all damage") from error


def _print_figures(console: Console, figures: Figures) -> None:
    count = sum(figures.images.values())
    common = figures.types.most_common(TYPES_SHOWN)
    if rest := count - sum(number for _, number in common):
        common.append((f"{len(figures.types) - TYPES_SHOWN:,} others", rest))
    _print_shares(console, "source", [(name or "(none)", number) for name, number in common])
    _print_shares(console, "images", [(f"{number:,}", figures.images[number]) for number in sorted(figures.images)])
    if figures.formats:
        _print_shares(console, "format", figures.formats.most_common())
    console.print(f"turns per conversation: median {median(figures.turns):g}, maximum {max(figures.turns):,}")
    if figures.sizes:
        ordered = sorted(figures.sizes, key=math.prod)
        middle, largest = (f"{width:,} × {height:,}" for width, height in (ordered[len(ordered) // 2], ordered[-1]))
        console.print(f"image size in pixels: median {middle}, largest {largest}")


def _print_shares(console: Console, heading: str, rows: Sequence[tuple[str, int]]) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column(heading)
    total = sum(number for _, number in rows)
    for column in ("images" if heading == "format" else "samples", "share"):
        table.add_column(column, justify="right")
    for name, number in rows:
        table.add_row(escape(name), f"{number:,}", f"{number / total:.1%}")
    console.print(table, "")


def _print_tokens(console: Console, tokens: Tokens, processor: Processor) -> None:
    count = len(tokens.lengths) + len(tokens.rejected)
    if tokens.lengths:
        table = Table("tokens", "", box=None, pad_edge=False)
        table.columns[0].justify = "right"
        for name, number, bar in histogram(tokens.lengths):
            table.add_row(name, f"{bar} {number:,}" if number else "")
        console.print(table, "")
        console.print(f"tokens per sample: median {median(tokens.lengths):,g}, maximum {max(tokens.lengths):,}")
        console.print(f"supervised: {tokens.supervised / sum(tokens.lengths):.1%} of all tokens")
    limit = f"longer than {processor.max_text_tokens:,} text tokens (max_text_tokens)"
    console.print(f"truncated: {_counted(tokens.truncated, 'sample')} ({tokens.truncated / count:.1%}), {limit}")
    console.print(f"rejected: {_counted(len(tokens.rejected), 'sample')} ({len(tokens.rejected) / count:.1%})")
    for name, reason in tokens.rejected[:REJECTED_SHOWN]:
        console.print(f"  {name}: {short(reason)}", markup=False)
    if len(tokens.rejected) > REJECTED_SHOWN:
        console.print(f"  … and {len(tokens.rejected) - REJECTED_SHOWN:,} more")


def histogram(numbers: Sequence[int]) -> list[tuple[str, int, str]]:
    """Return the rows of a histogram with round edges: range, count and bar.

    All numbers beyond the 99th percentile share one row, so that a single long sample does not flatten the others.
    """
    ordered = sorted(numbers)
    low, high = ordered[0], ordered[int(0.99 * (len(ordered) - 1))]
    min_step = max(1, (high - low + 1) / (ROWS - 1))
    power = 10 ** math.floor(math.log10(min_step))
    step = int(next(factor * power for factor in (1, 2, 5, 10) if factor * power >= min_step))
    first = low // step * step
    edges = list(range(first, high + 1, step))
    counts = Counter(min((number - first) // step, len(edges)) for number in ordered)
    names = [f"{edge:,} – {edge + step - 1:,}" if step > 1 else f"{edge:,}" for edge in edges]
    if counts[len(edges)]:
        names.append(f"{first + len(edges) * step:,} or more")
    highest = max(counts.values())
    return [(name, counts[row], _bar(counts[row] / highest)) for row, name in enumerate(names)]


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _bar(share: float) -> str:
    eighths = max(math.ceil(share > 0), round(share * BAR * 8))
    return "█" * (eighths // 8) + EIGHTHS[eighths % 8].strip()
