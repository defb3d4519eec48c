"""The processor: a conversation and its images -> ids with places for the visual tokens. Picklable, no weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
from tokenizers import Tokenizer
from torch import Tensor

from ssmvl.errors import DataError
from ssmvl.interfaces import ImageSpec, Message, Prompt
from ssmvl.text.tokenizers import END
from ssmvl.vision.transforms import ImageLike, read_image, to_pixels

IMAGE, IMAGE_PLACE, IGNORED = "<image>", -1, -100


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
        places: visual tokens of one image, the connector's `num_tokens(grid)`.
    """

    tokenizer: Tokenizer
    prompt: Prompt
    image_specs: tuple[ImageSpec, ...]
    places: int

    @property
    def end_id(self) -> int:
        """The id that ends an answer."""
        return int(self.tokenizer.token_to_id(END))

    def encode(
        self, conversation: Sequence[Message], images: Sequence[ImageLike] = (), *, train: bool = False
    ) -> Sample:
        """A conversation with its images as a sample.

        `<image>` marks in the user's text say where images stand; without any mark they come first.

        Args:
            conversation: messages, the user's first.
            images: as many as there are marks, if there are marks.
            train: refuse a sample in which nothing is supervised.

        Raises:
            DataError: marks and images differ in number, an image cannot be decoded, or nothing is supervised.
        """
        marks = sum(
            message.get("content", "").count(IMAGE) for message in conversation if message.get("role") == "user"
        )
        if marks not in (0, len(images)):
            raise DataError(f"{marks} {IMAGE} marks in the text, but {len(images)} images; they must match in number")
        in_place = self.prompt.image_placement == "in_place" and marks > 0
        ids: list[int] = [] if in_place else [IMAGE_PLACE] * (self.places * len(images))
        labels = [IGNORED] * len(ids)
        for piece in self.prompt.pieces(conversation, END):
            for number, text in enumerate(piece.text.split(IMAGE) if marks and not piece.supervised else [piece.text]):
                if number and in_place:
                    ids += [IMAGE_PLACE] * self.places
                    labels += [IGNORED] * self.places
                # A mark leaves with the line it stands on, as in LLaVA's data, when images come first.
                text = text.removeprefix("\n") if number and not in_place else text
                tokens = self._tokenise(text, piece.template)
                ids += tokens
                labels += tokens if piece.supervised else [IGNORED] * len(tokens)
        if train and all(label == IGNORED for label in labels[1:]):
            raise DataError(
                f"nothing to learn in this sample: no supervised token in {list(map(dict, conversation))!r}"
            )
        decoded = [read_image(image) for image in images]
        pixels = {
            spec: torch.stack([to_pixels(image, spec) for image in decoded])
            if decoded
            else torch.empty(0, 3, spec.size, spec.size, dtype=torch.uint8)
            for spec in self.image_specs
        }
        return Sample(ids=torch.tensor(ids), labels=torch.tensor(labels), images=pixels)

    def decode(self, ids: Sequence[int]) -> str:
        """Ids -> text, special tokens left out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def _tokenise(self, text: str, template: bool) -> list[int]:
        self.tokenizer.encode_special_tokens = not template  # a user's `<|endoftext|>` stays text
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)
