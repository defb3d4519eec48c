"""The processor: a conversation and its images -> ids with places for the visual tokens. Picklable, no weights."""

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
from ssmvl.processing.tokenizers import END, beginning
from ssmvl.processing.transforms import ImageLike, read_image, to_pixels

__all__ = ["Processor", "Sample", "IMAGE"]

IMAGE = "<image>"
BEGIN = "<s>"  # in a template: the token that the tokenizer begins a text with, by whatever name; nothing without one


class Sample(TypedDict):
    """One sample, ready for a batch.

    `labels[t]` is the token that stands at t where it is supervised, else -100; `ids[t]` is -1 at image places.
    """

    ids: Tensor
    labels: Tensor
    images: dict[ImageSpec, Tensor]


@dataclass(frozen=True)
class Processor:
    """Everything between what a user has and what the model takes.

    Args:
        tokenizer: text <-> ids.
        prompt: how a conversation is written.
        image_specs: one for each different input the encoders take.
        tokens_per_image: the model's visual tokens M per image; see `tokens_of`.
        end: the tokenizer's token that ends an answer, as `load_tokenizer` gives it.
        max_text_tokens: what lies beyond is cut off where a sample is made to train on; image places are not counted,
            and all of them stay.
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
        """The number of visual tokens, and so of image places, of an image. Constant: every image is one grid."""
        return self.tokens_per_image

    def encode(
        self, conversation: Sequence[Message], images: Sequence[ImageLike] = (), *, train: bool = False
    ) -> Sample:
        """A conversation with its images as a sample.

        `<image>` marks in the user's text say where images stand. Without any mark they come first: before all text,
        or, where the prompt writes images in place, before the first question, each on a line of its own. Where the
        prompt writes them before all text, marks are left out, and blanks at the ends of their message with them. What
        the tokenizer's post-processor begins a text with, such as Llama's `<s>`, comes before the images.

        Args:
            conversation: messages, the user's first.
            images: as many as there are marks, if there are marks.
            train: cut the text at `max_text_tokens`, and refuse a sample in which nothing is supervised.

        Raises:
            DataError: marks and images differ in number, an image cannot be decoded, there is neither text nor an
                image to read, or nothing is supervised, or nothing within `max_text_tokens`.
        """
        ids, labels = self.read(conversation, images, train=train)
        return Sample(ids=ids, labels=labels, images=self.pixels(images))

    def read(
        self, conversation: Sequence[Message], images: Sequence[ImageLike], *, train: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The ids and labels of a conversation, without decoding its images; see `encode`."""
        pieces = self.prompt.pieces(conversation, self.end)  # refuses what is no conversation
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
        pieces, begin = self._beginning(pieces)
        image_tokens = [self.tokens_of(image) for image in images]
        ids = array("q", [IMAGE_PLACE]) * (0 if in_place else sum(image_tokens))
        labels = array("q", [IGNORED]) * len(ids)
        for supervised, together in groupby(pieces, key=attrgetter("supervised")):
            tokens = self._tokenise(together, image_tokens if in_place and not supervised else None)
            ids.extend(tokens)
            labels.extend(tokens if supervised else [IGNORED] * len(tokens))
        if in_place and image_tokens:
            raise DataError(f"the prompt dropped {len(image_tokens)} of {len(images)} {IMAGE} marks")
        if not ids:
            raise DataError(f"nothing to read in this sample: neither text nor image from {_plain(conversation)}")
        ids, labels = array("q", begin) + ids, array("q", [IGNORED]) * len(begin) + labels
        if train and not _teaches(labels):
            raise DataError(f"nothing to learn in this sample: no supervised token in {_plain(conversation)}")
        if train and self.max_text_tokens is not None:
            ids, labels = _cut(ids, labels, self.max_text_tokens)
        return torch.frombuffer(ids, dtype=torch.int64), torch.frombuffer(labels, dtype=torch.int64)

    def pixels(self, images: Sequence[ImageLike]) -> dict[ImageSpec, Tensor]:
        """Images -> uint8 (I, 3, S, S) for each input of the encoders.

        Raises:
            DataError: an image cannot be decoded.
        """
        decoded = [read_image(image) for image in images]
        return {spec: _stack([to_pixels(image, spec) for image in decoded], spec) for spec in self.image_specs}

    def taught(self, conversation: Sequence[Message]) -> str:
        """The conversation's last answer as training teaches it: what a model that learned it perfectly generates.

        It may differ from the message: prompts strip blanks, and a tokenizer may change a text.

        Raises:
            DataError: the messages do not alternate, beginning with the user's.
        """
        return self.decode(self.answer_ids(conversation))

    def answer_ids(self, conversation: Sequence[Message]) -> list[int]:
        """The supervised ids of the conversation's last answer, without the end; see `taught`."""
        pieces = self.prompt.pieces([_without_marks(message) for message in conversation], self.end)
        answer = list(takewhile(attrgetter("supervised"), reversed(pieces)))[::-1]
        ids = self._tokenise(answer)
        ends = [at for at, id_ in enumerate(ids) if id_ == self.end_id] or [len(ids)]
        return ids[ends[-2] + 1 if len(ends) > 1 else 0 : ends[-1]]

    def decode(self, ids: Sequence[int]) -> str:
        """Ids -> text, special tokens left out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def _beginning(self, pieces: list[Piece]) -> tuple[list[Piece], list[int]]:
        """The pieces without `BEGIN` in front, and the ids that every text of this tokenizer begins with."""
        begin = self._begin
        if pieces and pieces[0].template and pieces[0].text.startswith(BEGIN):
            pieces = [pieces[0]._replace(text=pieces[0].text.removeprefix(BEGIN)), *pieces[1:]]
            begin = begin or self._special[BEGIN]
        return pieces, begin

    def _tokenise(self, pieces: Iterable[Piece], image_tokens: list[int] | None = None) -> list[int]:
        """The ids of pieces that are read as one text.

        Special tokens are found in template text only: a user's `<|endoftext|>` stays text.

        Args:
            pieces: consecutive pieces.
            image_tokens: the visual tokens of the images still to be placed. Each `<image>` mark in a user's text takes
                the first. Marks stay text if None.
        """
        ids, text = list[int](), ""
        for piece in pieces:
            known: Collection[str] = self._special if piece.template else () if image_tokens is None else (IMAGE,)
            for stretch in re.split(f"({'|'.join(map(re.escape, known))})", piece.text) if known else [piece.text]:
                if stretch in known:
                    ids += self._ids(text)
                    ids += self._special[stretch] if piece.template else _places(image_tokens)
                    text = ""
                else:
                    text += stretch
        return ids + self._ids(text)

    @cached_property
    def _special(self) -> dict[str, list[int]]:
        added = self.tokenizer.get_added_tokens_decoder()  # slow: it makes an object of each
        named = self.tokenizer.token_to_id(BEGIN)
        begin = {BEGIN: self._begin if named is None else [named]}
        return begin | {token.content: [id_] for id_, token in added.items() if token.special}

    @cached_property
    def _begin(self) -> list[int]:
        return beginning(self.tokenizer)

    def _ids(self, text: str) -> list[int]:
        self.tokenizer.encode_special_tokens = True  # none is found
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids) if text else []


def _places(image_tokens: list[int] | None) -> list[int]:
    if not image_tokens:
        raise DataError(f"the prompt wrote more {IMAGE} marks than there are images")
    return [IMAGE_PLACE] * image_tokens.pop(0)


def _cut(ids: array[int], labels: array[int], limit: int) -> tuple[array[int], array[int]]:
    """The first `limit` text tokens with their labels, and all image places."""
    read = list(accumulate(id_ != IMAGE_PLACE for id_ in ids))  # text tokens up to and with each
    if read[-1] <= limit:
        return ids, labels
    kept = [id_ == IMAGE_PLACE or count <= limit for id_, count in zip(ids, read, strict=True)]
    left = array("q", compress(labels, kept))
    if not _teaches(left):
        before = read[next(t for t in range(1, len(ids)) if labels[t] != IGNORED)] - 1
        raise DataError(
            f"nothing to learn in this sample: the first answer begins after {before} text tokens, and only {limit} "
            f"are read; raise the stage's max_text_tokens"
        )
    return array("q", compress(ids, kept)), left


def _teaches(labels: array[int]) -> bool:
    return labels[1:].count(IGNORED) < len(labels) - 1  # nothing stands before the first that could predict it


def _without_marks(message: Message) -> Message:
    if message["role"] != "user" or IMAGE not in message["content"]:
        return message
    return {**message, "content": message["content"].replace(IMAGE, "").strip()}


def _plain(conversation: Sequence[Message]) -> str:
    return repr([dict(message) for message in conversation])


def _stack(pixels: list[Tensor], spec: ImageSpec) -> Tensor:
    if len(pixels) == 1:
        return pixels[0][None]  # nothing to copy
    return torch.stack(pixels) if pixels else torch.empty(0, 3, spec.size, spec.size, dtype=torch.uint8)
