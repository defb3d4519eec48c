"""What `check_prompt` finds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from ssmvl.errors import ContractError
from ssmvl.interfaces import Message, Piece
from ssmvl.processing.prompts import MambaPrompt, PlainPrompt
from ssmvl.processing.tokenizers import END
from ssmvl.testing import check_prompt


class LearnsTheQuestion(MambaPrompt):
    def pieces(self, conversation: Sequence[Message], end: str) -> list[Piece]:
        return [piece._replace(supervised=piece.text != "In: ") for piece in super().pieces(conversation, end)]


class LearnsNoEnd(MambaPrompt):
    def pieces(self, conversation: Sequence[Message], end: str) -> list[Piece]:
        return [piece for piece in super().pieces(conversation, end) if piece.text != end]


class WritesItsOwnEnd(MambaPrompt):
    def pieces(self, conversation: Sequence[Message], end: str) -> list[Piece]:
        return super().pieces(conversation, END)


class LearnsNothing(MambaPrompt):
    def pieces(self, conversation: Sequence[Message], end: str) -> list[Piece]:
        return [piece._replace(supervised=False) for piece in super().pieces(conversation, end)]


class TrustsAnswers(MambaPrompt):
    def pieces(self, conversation: Sequence[Message], end: str) -> list[Piece]:
        return [
            piece._replace(template=piece.template or piece.supervised) for piece in super().pieces(conversation, end)
        ]


class TrustsTheUser(MambaPrompt):
    def pieces(self, conversation: Sequence[Message], end: str) -> list[Piece]:
        return [
            piece._replace(template=not piece.supervised or piece.template)
            for piece in super().pieces(conversation, end)
        ]


class RepeatsTheQuestion(MambaPrompt):
    def pieces(self, conversation: Sequence[Message], end: str) -> list[Piece]:
        return [*super().pieces(conversation, end), Piece(f"({conversation[0]['content']})", template=True)]


class TidiesTheQuestion(MambaPrompt):
    def pieces(self, conversation: Sequence[Message], end: str) -> list[Piece]:
        return [piece._replace(text=piece.text.replace("\n\n", " ")) for piece in super().pieces(conversation, end)]


class ForgetsAQuestion(MambaPrompt):
    def pieces(self, conversation: Sequence[Message], end: str) -> list[Piece]:
        return [piece for piece in super().pieces(conversation, end) if "where" not in piece.text]


class ReadsQuestionsWithAnswers(PlainPrompt):
    def pieces(self, conversation: Sequence[Message], end: str) -> list[Piece]:
        return (MambaPrompt if len(conversation) > 1 else PlainPrompt)().pieces(conversation, end)


class MarksImages(MambaPrompt):
    def pieces(self, conversation: Sequence[Message], end: str) -> list[Piece]:
        return [Piece("<image>\n", template=True), *super().pieces(conversation, end)]


class KnowsThatAnAnswerComes(MambaPrompt):
    def pieces(self, conversation: Sequence[Message], end: str) -> list[Piece]:
        return [Piece(f"{len(conversation)} messages:", template=True), *super().pieces(conversation, end)]


class GivesTexts(MambaPrompt):
    def pieces(self, conversation: Sequence[Message], end: str) -> Any:
        return [piece.text for piece in super().pieces(conversation, end)]


class PutsImagesLast(MambaPrompt):
    image_placement: Any = "after_all_text"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (LearnsTheQuestion, r"pieces of 1 messages: each answer and its end are supervised: \[\]; received \[Piece"),
        (LearnsNoEnd, r"of 2 messages: each answer and its end are supervised"),
        (WritesItsOwnEnd, r"each answer and its end .*text='<\|end of answer\|>'.*; received .*text='<\|endoftext\|>'"),
        (LearnsNothing, r"each answer and its end are supervised: .*; received \[\]"),
        (TrustsAnswers, r"received .*text='A cat.', supervised=True, template=True"),
        (TrustsTheUser, "a user's text in a template is parsed for special tokens: '<image>"),
        (RepeatsTheQuestion, "a user's text in a template is parsed for special tokens: '<image>"),
        (TidiesTheQuestion, r"pieces of 3 messages: 'And\\n\\nwhere\?' must stand there as it is"),
        (ForgetsAQuestion, r"pieces of 3 messages: 'And\\n\\nwhere\?' must stand there as it is"),
        (ReadsQuestionsWithAnswers, r"pieces of 1 messages: '<image>.* must stand there as it is, in \[\]"),
        (MarksImages, "`<image>` marks are the user's; the template has one"),
        (KnowsThatAnAnswerComes, "pieces up to an answer must be what the whole conversation begins with"),
        (GivesTexts, "must be a list of Piece, received"),
        (PutsImagesLast, r"image_placement must be one of .*, is 'after_all_text'"),
        (object, "object lacks image_placement, pieces; see ssmvl.interfaces.Prompt"),
    ],
)
def test_a_broken_prompt_is_refused(prompt: Any, message: str) -> None:
    with pytest.raises(ContractError, match=message):
        check_prompt(prompt)
