"""Prompt format of the released ML-Mamba."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from ssmvl.interfaces import Message, Piece
from ssmvl.processing.prompts import stripped, supervised_pieces


class ZephyrPrompt:
    r"""`<|user|>\n{question}<end>\n<|assistant|>\n{answer}<end>`, one line break between turns; images before all text.

    Texts are stripped of leading and trailing whitespace; an empty answer becomes one space.

    Source: the released code of ML-Mamba (arXiv 2407.19832) and of Cobra (arXiv 2403.14520).
    """

    image_placement: Literal["before_all_text", "in_place"] = "before_all_text"

    def pieces(self, conversation: Sequence[Message], end: str) -> list[Piece]:
        r"""The text of the conversation; it ends with `<|assistant|>\n` if the last message is the user's.

        Raises:
            DataError: see `ssmvl.processing.prompts.turns`.
        """
        pieces, opening = [], "<|user|>\n"
        for question, answer in stripped(conversation):
            pieces += [Piece(opening, template=True), Piece(question)]
            pieces += [Piece(f"{end}\n<|assistant|>\n", template=True), *supervised_pieces(answer, end)]
            opening = "\n<|user|>\n"
        return pieces
