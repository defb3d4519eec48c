"""Records as a model reads them: numbers of tokens, and the text as runs of supervised and other tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

from PIL import Image

from ssmvl.drawing.sample_cards import LINES, Card, Kind, Run, wrapped
from ssmvl.errors import DataError
from ssmvl.interfaces import IGNORED, IMAGE_PLACE
from ssmvl.processing.processor import Processor, Sample
from ssmvl.processing.transforms import ImageLike


@dataclass
class Tokens:
    """Counts of the tokens that a model reads, before truncation."""

    lengths: list[int] = field(default_factory=list)
    supervised: int = 0
    truncated: int = 0
    rejected: list[tuple[str, str]] = field(default_factory=list)

    def add(self, record: dict[str, Any], processor: Processor) -> Sample | None:
        """Count one record. Returns its training sample, or None if the processor rejects it."""
        limit = processor.max_text_tokens
        try:
            sample = replace(processor, max_text_tokens=None).encode(
                record["conversation"], record["images"], train=True
            )
            length, supervised = len(sample["ids"]), sum(_supervised(sample))
            truncated = limit is not None and int((sample["ids"] != IMAGE_PLACE).sum()) > limit
            if truncated:
                sample = processor.encode(record["conversation"], record["images"], train=True)
        except DataError as error:
            self.rejected.append((record["id"], str(error)))
            return None
        self.lengths.append(length)
        self.supervised += supervised
        self.truncated += truncated
        return sample


def _supervised(sample: Sample) -> list[bool]:
    """Return True for each supervised token. The first one never is, because nothing precedes it to predict it from."""
    return [False, *(label != IGNORED for label in sample["labels"].tolist()[1:])]


def sample_card(record: dict[str, Any], sample: Sample, processor: Processor) -> Card:
    """Return a card that shows a sample, with the middle of a long text cut."""
    keep = len(sample["ids"])
    runs = read_runs(sample, record["images"], processor, keep)
    while len(wrapped(runs)) > LINES and keep > 8:
        keep = min(keep, LINES * 100) * 4 // 5
        runs = read_runs(sample, record["images"], processor, keep)
    spec = max(sample["images"], key=lambda spec: spec.size)
    images = [Image.fromarray(pixels.permute(1, 2, 0).numpy()) for pixels in sample["images"][spec]]
    return Card(record["id"], f"{len(sample['ids']):,} tokens, {sum(_supervised(sample)):,} supervised", images, runs)


def read_runs(sample: Sample, images: Sequence[ImageLike], processor: Processor, keep: int) -> list[Run]:
    """Decode a sample's ids, including special tokens, to runs. Beyond `keep` text tokens the middle is cut."""
    ids = sample["ids"].tolist()
    kinds: list[Kind] = ["supervised" if supervised else "context" for supervised in _supervised(sample)]
    text = [at for at, id_ in enumerate(ids) if id_ != IMAGE_PLACE]
    for at in text[keep * 2 // 3 : len(text) - (keep - keep * 2 // 3)] if len(text) > keep else []:
        kinds[at] = "cut"
    kinds = ["image" if id_ == IMAGE_PLACE else kind for id_, kind in zip(ids, kinds, strict=True)]
    runs: list[Run] = []
    image_tokens = map(processor.tokens_of, images)
    for group, members in groupby(
        range(len(ids)), key=lambda at: "" if kinds[at] in ("supervised", "context") else kinds[at]
    ):
        positions = list(members)
        if group == "image":
            left = len(positions)
            while left > 0:
                runs.append(Run(f"⟨image × {(count := next(image_tokens)):,}⟩", "image"))
                left -= count
        elif group == "cut":
            runs.append(Run(f" … {len(positions):,} tokens … ", "cut"))
        else:  # decode each run with its prefix, because some tokenizers drop a space at the beginning of a text
            prefix, prefix_ids = "", list[int]()
            for kind, part in groupby(positions, key=kinds.__getitem__):
                prefix_ids += [ids[at] for at in part]
                decoded = str(processor.tokenizer.decode(prefix_ids, skip_special_tokens=False))
                runs.append(Run(decoded[len(prefix) :], kind))
                prefix = decoded
    return runs
