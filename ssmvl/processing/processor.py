"""Processor: a conversation and its images -> ids with image places, and pixels. Picklable, without weights."""

from __future__ import annotations

import re
from array import array
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, compress, groupby, takewhile
from operator import attrgetter
from typing import TypedDict

import torch
from tokenizers import Tokenizer
from torch import Tensor

from ssmvl.errors import DataError
from ssmvl.interfaces import IGNORED, IMAGE_PLACE, ImageSpec, Message, Piece, Prompt
from ssmvl.processing.tokenizers import END, bos_ids
from ssmvl.processing.transforms import ImageLike, read_image, to_pixels

__all__ = ["Processor", "Sample", "IMAGE"]

IMAGE = "<image>"
BEGIN = "<s>"  # in a template: the tokenizer's BOS token, whatever its name; nothing if it has none


class Sample(TypedDict):
    """One sample, ready for a batch.

    `labels[t]` is the token at position t if it is supervised, else -100; `ids[t]` is -1 at image places.
    """

    ids: Tensor
    labels: Tensor
    images: dict[ImageSpec, Tensor]


@dataclass(frozen=True)
class Processor:
    """Conversion of a user's conversation and images to model inputs.

    Args:
        tokenizer: text <-> ids.
        prompt: the prompt format.
        image_specs: one per distinct encoder input.
        tokens_per_image: M, the model's visual tokens per image; see `tokens_of`.
        end: the token that ends an answer, as returned by `load_tokenizer`.
        max_text_tokens: training samples are truncated to it; image places are not counted and never removed.
    """

    tokenizer: Tokenizer
    prompt: Prompt
    image_specs: tuple[ImageSpec, ...]
    tokens_per_image: int
    end: str = END
    max_text_tokens: int | None = None

    @property
    def end_id(self) -> int:
        """The id that ends an answer."""
        return int(self.tokenizer.token_to_id(self.end))

    def tokens_of(self, image: ImageLike) -> int:
        """Number of visual tokens, and thus image places, of an image. Constant, because every image is one grid."""
        return self.tokens_per_image

    def encode(
        self, conversation: Sequence[Message], images: Sequence[ImageLike] = (), *, train: bool = False
    ) -> Sample:
        """Convert a conversation with its images to a sample.

        `<image>` marks in the user's text set the positions of the images. Without marks, images come first: before
        all text, or, if the prompt places images in the text, before the first question, each on its own line. If the
        prompt places images before all text, marks are removed, and the message's leading and trailing whitespace with
        them. The ids that the tokenizer's post-processor prepends, such as Llama's `<s>`, precede the images.

        Args:
            conversation: messages; the first is the user's.
            images: as many as there are marks, if there are marks.
            train: truncate the text to `max_text_tokens`, and reject a sample without supervised tokens.

        Raises:
            DataError: the numbers of marks and images differ, an image cannot be decoded, there is neither text nor an
                image, or no token is supervised, in the whole sample or within `max_text_tokens`.
        """
        ids, labels = self.read(conversation, images, train=train)
        return Sample(ids=ids, labels=labels, images=self.pixels(images))

    def read(
        self, conversation: Sequence[Message], images: Sequence[ImageLike], *, train: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The ids and labels of a conversation, without decoding its images; see `encode`."""
        pieces = self.prompt.pieces(conversation, self.end)  # rejects an invalid conversation
        for number, message in enumerate(conversation):
            text = message["content"]
            if text != text.encode(errors="replace").decode():
                raise DataError(f"message {number} contains an unpaired surrogate, which is not valid text: {text!r}")
        marks = sum(message["content"].count(IMAGE) for message in conversation if message["role"] == "user")
        if marks not in (0, len(images)):
            raise DataError(f"{marks} {IMAGE} marks in the text, but {len(images)} images; they must match in number")
        in_place = self.prompt.image_placement == "in_place"
        if in_place and images and not marks:
            first, *rest = conversation
            marked: Message = {**first, "content": f"{IMAGE}\n" * len(images) + first["content"]}
            pieces = self.prompt.pieces([marked, *rest], self.end)
        elif marks and not in_place:
            pieces = self.prompt.pieces([_without_marks(message) for message in conversation], self.end)
        pieces, bos = self._split_bos(pieces)
        image_tokens = [self.tokens_of(image) for image in images]
        ids = array("q", [IMAGE_PLACE]) * (0 if in_place else sum(image_tokens))
        labels = array("q", [IGNORED]) * len(ids)
        for supervised, group in groupby(pieces, key=attrgetter("supervised")):
            tokens = self._tokenize(group, image_tokens if in_place and not supervised else None)
            ids.extend(tokens)
            labels.extend(tokens if supervised else [IGNORED] * len(tokens))
        if in_place and image_tokens:
            raise DataError(f"the prompt dropped {len(image_tokens)} of {len(images)} {IMAGE} marks")
        if not ids:
            raise DataError(f"no text and no image in this sample: {_plain(conversation)}")
        ids, labels = array("q", bos) + ids, array("q", [IGNORED]) * len(bos) + labels
        if train and not _is_supervised(labels):
            raise DataError(f"no supervised token in this sample: {_plain(conversation)}")
        if train and self.max_text_tokens is not None:
            ids, labels = _truncate(ids, labels, self.max_text_tokens)
        return torch.frombuffer(ids, dtype=torch.int64), torch.frombuffer(labels, dtype=torch.int64)

    def pixels(self, images: Sequence[ImageLike]) -> dict[ImageSpec, Tensor]:
        """Images -> uint8 (I, 3, S, S) for each distinct encoder input.

        Raises:
            DataError: an image cannot be decoded.
        """
        decoded = [read_image(image) for image in images]
        return {spec: _stack([to_pixels(image, spec) for image in decoded], spec) for spec in self.image_specs}

    def taught(self, conversation: Sequence[Message]) -> str:
        """The training target of the conversation's last answer: the output of a model that has learned it perfectly.

        It may differ from the message: prompts strip whitespace, and a tokenizer may change a text.

        Raises:
            DataError: the messages do not alternate, starting with the user's.
        """
        return self.decode(self.answer_ids(conversation))

    def answer_ids(self, conversation: Sequence[Message]) -> list[int]:
        """The supervised ids of the conversation's last answer, without the end token; see `taught`."""
        pieces = self.prompt.pieces([_without_marks(message) for message in conversation], self.end)
        answer = list(takewhile(attrgetter("supervised"), reversed(pieces)))[::-1]
        ids = self._tokenize(answer)
        ends = [index for index, id_ in enumerate(ids) if id_ == self.end_id] or [len(ids)]
        return ids[ends[-2] + 1 if len(ends) > 1 else 0 : ends[-1]]

    def decode(self, ids: Sequence[int]) -> str:
        """Ids -> text without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def _split_bos(self, pieces: list[Piece]) -> tuple[list[Piece], list[int]]:
        """The pieces without a leading `BEGIN`, and the ids that precede every text of this tokenizer."""
        bos = self._bos
        if pieces and pieces[0].template and pieces[0].text.startswith(BEGIN):
            pieces = [pieces[0]._replace(text=pieces[0].text.removeprefix(BEGIN)), *pieces[1:]]
            bos = bos or self._special[BEGIN]
        return pieces, bos

    def _tokenize(self, pieces: Iterable[Piece], image_tokens: list[int] | None = None) -> list[int]:
        """Tokenize pieces as one text.

        Special tokens are recognized in template text only: a user's `<|endoftext|>` stays text.

        Args:
            pieces: consecutive pieces.
            image_tokens: numbers of visual tokens of the remaining images. Each `<image>` mark in a user's text takes
                the first number. None: marks stay text.
        """
        ids, text = list[int](), ""
        for piece in pieces:
            special: Collection[str] = self._special if piece.template else () if image_tokens is None else (IMAGE,)
            for span in re.split(f"({'|'.join(map(re.escape, special))})", piece.text) if special else [piece.text]:
                if span in special:
                    ids += self._ids(text)
                    ids += self._special[span] if piece.template else _next_places(image_tokens)
                    text = ""
                else:
                    text += span
        return ids + self._ids(text)

    @cached_property
    def _special(self) -> dict[str, list[int]]:
        added = self.tokenizer.get_added_tokens_decoder()  # slow: creates an object per token
        begin_id = self.tokenizer.token_to_id(BEGIN)
        begin = {BEGIN: self._bos if begin_id is None else [begin_id]}
        return begin | {token.content: [id_] for id_, token in added.items() if token.special}

    @cached_property
    def _bos(self) -> list[int]:
        return bos_ids(self.tokenizer)

    def _ids(self, text: str) -> list[int]:
        self.tokenizer.encode_special_tokens = True  # special tokens in the text are encoded as text
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids) if text else []


def _next_places(image_tokens: list[int] | None) -> list[int]:
    if not image_tokens:
        raise DataError(f"the prompt wrote more {IMAGE} marks than there are images")
    return [IMAGE_PLACE] * image_tokens.pop(0)


def _truncate(ids: array[int], labels: array[int], limit: int) -> tuple[array[int], array[int]]:
    """The first `limit` text tokens with their labels, and all image places."""
    counts = list(accumulate(id_ != IMAGE_PLACE for id_ in ids))  # text tokens up to and including each position
    if counts[-1] <= limit:
        return ids, labels
    kept = [id_ == IMAGE_PLACE or count <= limit for id_, count in zip(ids, counts, strict=True)]
    kept_labels = array("q", compress(labels, kept))
    if not _is_supervised(kept_labels):
        before = counts[next(t for t in range(1, len(ids)) if labels[t] != IGNORED)] - 1
        raise DataError(
            f"no supervised token in this sample: the first answer begins after {before} text tokens, but only {limit} "
            f"are read; raise the stage's max_text_tokens"
        )
    return array("q", compress(ids, kept)), kept_labels


def _is_supervised(labels: array[int]) -> bool:
    return labels[1:].count(IGNORED) < len(labels) - 1  # no position precedes the first token to predict it


def _without_marks(message: Message) -> Message:
    if message["role"] != "user" or IMAGE not in message["content"]:
        return message
    return {**message, "content": message["content"].replace(IMAGE, "").strip()}


def _plain(conversation: Sequence[Message]) -> str:
    return repr([dict(message) for message in conversation])


def _stack(pixels: list[Tensor], spec: ImageSpec) -> Tensor:
    if len(pixels) == 1:
        return pixels[0][None]  # no copy
    return torch.stack(pixels) if pixels else torch.empty(0, 3, spec.size, spec.size, dtype=torch.uint8)
