"""Prompt formats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import zip_longest
from typing import TYPE_CHECKING, Literal

from ssmvl._moved import moved_name
from ssmvl.errors import DataError
from ssmvl.interfaces import Message, Piece
from ssmvl.processing.processor import IMAGE

__all__ = ["turns", "stripped", "supervised_pieces", "PlainPrompt", "MambaPrompt", "VicunaPrompt"]

if not TYPE_CHECKING:
    __getattr__ = partial(moved_name, __name__)

MEDIA = {"image", "images", "image_url", "video", "videos", "audio", "audios"}
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def turns(conversation: Sequence[Message]) -> list[tuple[str, str | None]]:
    """A conversation as (question, answer) pairs; None for an answer still to be generated.

    Raises:
        DataError: there is no message, or the messages do not alternate, starting with the user's.
    """
    if not conversation:
        raise DataError("the conversation is empty; it needs at least one user message")
    for i, message in enumerate(conversation):
        fields, role = message if isinstance(message, Mapping) else {}, ("user", "assistant")[i % 2]
        if fields.get("role") != role or not isinstance(fields.get("content"), str):
            expected = f"{{'role': {role!r}, 'content': a string}}"
            raise DataError(f"message {i} must be {expected}; received {message!r}. User and assistant must alternate")
        if media := sorted(fields.keys() & MEDIA):
            raise DataError(f"message {i} has {', '.join(media)}, which would be ignored; pass images as an argument")
    texts = [message["content"] for message in conversation]
    return list(zip_longest(texts[::2], texts[1::2]))


def stripped(conversation: Sequence[Message]) -> list[tuple[str, str | None]]:
    """`turns` without leading and trailing whitespace; an empty answer becomes one space.

    Source: the released code of Cobra (arXiv 2403.14520) and of ML-Mamba (arXiv 2407.19832), which is based on it.
    """
    return [
        (question.strip(), None if answer is None else answer.strip() or " ")
        for question, answer in turns(conversation)
    ]


def supervised_pieces(answer: str | None, end: str) -> list[Piece]:
    """The supervised pieces of a turn, its answer and the end; none if the answer is still to be generated."""
    return [] if answer is None else [Piece(answer, supervised=True), Piece(end, supervised=True, template=True)]


class PlainPrompt:
    """`{caption}<end>`: images, then the assistant's text; the user's text is omitted.

    Captions are stripped of leading and trailing whitespace. Without an answer there is no text at all: the model
    generates a caption right after the images. The captions of a longer conversation are concatenated.

    Source: the first stage of LLaVA (arXiv 2304.08485), with the tokenizer's end token instead of a line break; the
    released AlignDataset of Prismatic (arXiv 2402.07865), Cobra and ML-Mamba.
    """

    image_placement: Literal["before_all_text", "in_place"] = "before_all_text"

    def pieces(self, conversation: Sequence[Message], end: str) -> list[Piece]:
        """The captions only.

        Raises:
            DataError: see `turns`.
        """
        captions = [None if caption is None else caption.strip() for _, caption in turns(conversation)]
        return [piece for caption in captions for piece in supervised_pieces(caption, end)]


class MambaPrompt:
    r"""`In: {question}\nOut: {answer}<end>`, one line break between turns; images before all text.

    Answers are supervised. Texts are stripped of leading and trailing whitespace; an empty answer becomes one space.

    Source: the released code of Cobra (arXiv 2403.14520), its prompt for language models without a chat format.
    """

    image_placement: Literal["before_all_text", "in_place"] = "before_all_text"

    def pieces(self, conversation: Sequence[Message], end: str) -> list[Piece]:
        """The text of the conversation; it ends with `Out: ` if the last message is the user's.

        Raises:
            DataError: see `turns`.
        """
        pieces, opening = [], "In: "
        for question, answer in stripped(conversation):
            pieces += [Piece(opening, template=True), Piece(question), Piece("\nOut: ", template=True)]
            pieces += supervised_pieces(answer, end)
            opening = "\nIn: "
        return pieces


class VicunaPrompt:
    """`<s>{system} USER: {question} ASSISTANT: {answer}<end>USER: …` for each turn; images before their question.

    For LLaMA tokenizers, which add the space before an answer and before the next question themselves. `<s>` stands for
    the tokenizer's BOS token and is omitted if the tokenizer has none. Images are moved to the beginning of their
    question, as in LLaVA-1.5, so the ids equal LLaVA's.

    Source: Vicuna v1.5 (arXiv 2306.05685); with images, LLaVA-1.5 (arXiv 2310.03744).
    """

    image_placement: Literal["before_all_text", "in_place"] = "in_place"

    def pieces(self, conversation: Sequence[Message], end: str) -> list[Piece]:
        """The text of the conversation; it ends with `ASSISTANT:` if the last message is the user's.

        Raises:
            DataError: see `turns`.
        """
        pieces, opening = [], f"<s>{VICUNA_SYSTEM} USER: "
        for question, answer in turns(conversation):
            if IMAGE in question:
                marks = f"{IMAGE}\n" * question.count(IMAGE)
                question = (marks + question.replace(IMAGE, "").strip()).strip()
            pieces += [Piece(opening, template=True), Piece(question), Piece(" ASSISTANT:", template=True)]
            pieces += supervised_pieces(answer, end)
            opening = "USER: "
        return pieces
