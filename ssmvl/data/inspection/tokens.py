"""What a recipe's model reads of a record: its tokens counted, its text in runs."""

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
    """What a model reads of records, before anything is cut."""

    lengths: list[int] = field(default_factory=list)
    learned: int = 0
    cut: int = 0
    refused: list[tuple[str, str]] = field(default_factory=list)

    def add(self, record: dict[str, Any], processor: Processor) -> Sample | None:
        """Count one record; returns the sample to train on, None if it is refused."""
        limit = processor.max_text_tokens
        try:
            sample = replace(processor, max_text_tokens=None).encode(
                record["conversation"], record["images"], train=True
            )
            length, learned = len(sample["ids"]), sum(_learned(sample))
            cut = limit is not None and int((sample["ids"] != IMAGE_PLACE).sum()) > limit
            if cut:
                sample = processor.encode(record["conversation"], record["images"], train=True)
        except DataError as error:
            self.refused.append((record["id"], str(error)))
            return None
        self.lengths.append(length)
        self.learned += learned
        self.cut += cut
        return sample


def _learned(sample: Sample) -> list[bool]:
    """Where a token is learned; the first never is: nothing stands before it that could predict it."""
    return [False, *(label != IGNORED for label in sample["labels"].tolist()[1:])]


def sample_card(record: dict[str, Any], sample: Sample, processor: Processor) -> Card:
    """A sample to draw, its text cut in the middle as far as it must be."""
    keep = len(sample["ids"])
    runs = read_runs(sample, record["images"], processor, keep)
    while len(wrapped(runs)) > LINES and keep > 8:
        keep = min(keep, LINES * 100) * 4 // 5
        runs = read_runs(sample, record["images"], processor, keep)
    spec = max(sample["images"], key=lambda spec: spec.size)
    images = [Image.fromarray(pixels.permute(1, 2, 0).numpy()) for pixels in sample["images"][spec]]
    return Card(record["id"], f"{len(sample['ids']):,} tokens, {sum(_learned(sample)):,} learned", images, runs)


def read_runs(sample: Sample, images: Sequence[ImageLike], processor: Processor, keep: int) -> list[Run]:
    """The text of a sample's own ids, special tokens too, in runs; the middle is cut beyond `keep` text tokens."""
    ids = sample["ids"].tolist()
    kinds: list[Kind] = ["learned" if learned else "read" for learned in _learned(sample)]
    text = [at for at, id_ in enumerate(ids) if id_ != IMAGE_PLACE]
    for at in text[keep * 2 // 3 : len(text) - (keep - keep * 2 // 3)] if len(text) > keep else []:
        kinds[at] = "cut"
    kinds = ["image" if id_ == IMAGE_PLACE else kind for id_, kind in zip(ids, kinds, strict=True)]
    runs: list[Run] = []
    image_tokens = map(processor.tokens_of, images)
    for plain, stretch in groupby(
        range(len(ids)), key=lambda at: "" if kinds[at] in ("learned", "read") else kinds[at]
    ):
        places = list(stretch)
        if plain == "image":
            left = len(places)
            while left > 0:
                runs.append(Run(f"⟨image × {(count := next(image_tokens)):,}⟩", "image"))
                left -= count
        elif plain == "cut":
            runs.append(Run(f" … {len(places):,} tokens … ", "cut"))
        else:  # each run with what stands before it: some tokenizers leave out a blank at the beginning of a text
            before, read = "", list[int]()
            for kind, part in groupby(places, key=kinds.__getitem__):
                read += [ids[at] for at in part]
                decoded = str(processor.tokenizer.decode(read, skip_special_tokens=False))
                runs.append(Run(decoded[len(before) :], kind))
                before = decoded
    return runs
