"""Broken prompts that `check_prompt` must reject."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from ssmvl.errors import ContractError
from ssmvl.interfaces import Message, Piece
from ssmvl.processing.prompts import MambaPrompt, PlainPrompt
from ssmvl.processing.tokenizers import END
from ssmvl.testing import check_prompt


class SupervisesTheQuestion(MambaPrompt):
    def pieces(self, conversation: Sequence[Message], end: str) -> list[Piece]:
        return [piece._replace(supervised=piece.text != "In: ") for piece in super().pieces(conversation, end)]


class OmitsTheEnd(MambaPrompt):
    def pieces(self, conversation: Sequence[Message], end: str) -> list[Piece]:
        return [piece for piece in super().pieces(conversation, end) if piece.text != end]


class WritesItsOwnEnd(MambaPrompt):
    def pieces(self, conversation: Sequence[Message], end: str) -> list[Piece]:
        return super().pieces(conversation, END)


class SupervisesNothing(MambaPrompt):
    def pieces(self, conversation: Sequence[Message], end: str) -> list[Piece]:
        return [piece._replace(supervised=False) for piece in super().pieces(conversation, end)]


class MakesAnswersTemplate(MambaPrompt):
    def pieces(self, conversation: Sequence[Message], end: str) -> list[Piece]:
        return [
            piece._replace(template=piece.template or piece.supervised) for piece in super().pieces(conversation, end)
        ]


class MakesUserTextTemplate(MambaPrompt):
    def pieces(self, conversation: Sequence[Message], end: str) -> list[Piece]:
        return [
            piece._replace(template=not piece.supervised or piece.template)
            for piece in super().pieces(conversation, end)
        ]


class RepeatsTheQuestion(MambaPrompt):
    def pieces(self, conversation: Sequence[Message], end: str) -> list[Piece]:
        return [*super().pieces(conversation, end), Piece(f"({conversation[0]['content']})", template=True)]


class NormalizesTheQuestion(MambaPrompt):
    def pieces(self, conversation: Sequence[Message], end: str) -> list[Piece]:
        return [piece._replace(text=piece.text.replace("\n\n", " ")) for piece in super().pieces(conversation, end)]


class DropsAQuestion(MambaPrompt):
    def pieces(self, conversation: Sequence[Message], end: str) -> list[Piece]:
        return [piece for piece in super().pieces(conversation, end) if "where" not in piece.text]


class WritesQuestionsOnlyWithAnswers(PlainPrompt):
    def pieces(self, conversation: Sequence[Message], end: str) -> list[Piece]:
        return (MambaPrompt if len(conversation) > 1 else PlainPrompt)().pieces(conversation, end)


class AddsImageMarks(MambaPrompt):
    def pieces(self, conversation: Sequence[Message], end: str) -> list[Piece]:
        return [Piece("<image>\n", template=True), *super().pieces(conversation, end)]


class CountsMessages(MambaPrompt):
    def pieces(self, conversation: Sequence[Message], end: str) -> list[Piece]:
        return [Piece(f"{len(conversation)} messages:", template=True), *super().pieces(conversation, end)]


class ReturnsStrings(MambaPrompt):
    def pieces(self, conversation: Sequence[Message], end: str) -> Any:
        return [piece.text for piece in super().pieces(conversation, end)]


class PutsImagesLast(MambaPrompt):
    image_placement: Any = "after_all_text"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (
            SupervisesTheQuestion,
            r"pieces of 1 messages: exactly the answers and their ends .*; expected \[\], received \[Piece",
        ),
        (OmitsTheEnd, r"of 2 messages: exactly the answers and their ends must be supervised"),
        (WritesItsOwnEnd, r"and their ends .*text='<\|end of answer\|>'.*, received .*text='<\|endoftext\|>'"),
        (SupervisesNothing, r"exactly the answers and their ends must be supervised; .*, received \[\]"),
        (MakesAnswersTemplate, r"received .*text='A cat.', supervised=True, template=True"),
        (MakesUserTextTemplate, "in a template piece, which is parsed for special tokens: '<image>"),
        (RepeatsTheQuestion, "in a template piece, which is parsed for special tokens: '<image>"),
        (NormalizesTheQuestion, r"pieces of 3 messages: 'And\\n\\nwhere\?' must appear unchanged"),
        (DropsAQuestion, r"pieces of 3 messages: 'And\\n\\nwhere\?' must appear unchanged"),
        (WritesQuestionsOnlyWithAnswers, r"pieces of 1 messages: '<image>.* must appear unchanged, received \[\]"),
        (AddsImageMarks, "template pieces must not contain `<image>` marks"),
        (CountsMessages, "pieces up to an answer must be a prefix of the full conversation's pieces"),
        (ReturnsStrings, "must be a list of Piece, received"),
        (PutsImagesLast, r"image_placement must be one of .*, is 'after_all_text'"),
        (object, "object lacks image_placement, pieces; see ssmvl.interfaces.Prompt"),
    ],
)
def test_a_broken_prompt_is_rejected(prompt: Any, message: str) -> None:
    with pytest.raises(ContractError, match=message):
        check_prompt(prompt)
