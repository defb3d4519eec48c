"""How conversations are written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from ssmvl.errors import DataError
from ssmvl.interfaces import Message, Piece


class MambaPrompt:
    r"""`In: {question}\nOut: {answer}<end>`, turn after turn; images before all text; answers are supervised.

    Source: the plain prompt of Cobra (arXiv 2403.14520) and its relatives for language models without a chat format.
    """

    image_placement: Literal["before_all_text", "in_place"] = "before_all_text"

    def pieces(self, conversation: Sequence[Message], end: str) -> list[Piece]:
        """The text to read; after a last message of the user it ends at `Out: `.

        Raises:
            DataError: there is no message, or they do not alternate, beginning with the user's.
        """
        if not conversation:
            raise DataError("an empty conversation; at least one message of the user is needed")
        pieces = []
        for i, message in enumerate(conversation):
            role, content, expected = message.get("role"), message.get("content"), ("user", "assistant")[i % 2]
            if role != expected or not isinstance(content, str):
                raise DataError(f"message {i} needs a text and the role {expected!r}; received {dict(message)!r}")
            if role == "user":
                pieces += [Piece("In: ", template=True), Piece(content), Piece("\nOut: ", template=True)]
            else:
                pieces += [Piece(content, supervised=True), Piece(end, supervised=True, template=True)]
        return pieces
