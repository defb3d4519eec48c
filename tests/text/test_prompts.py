"""How conversations are written."""

from __future__ import annotations

from typing import Any

import pytest

from ssmvl.errors import DataError
from ssmvl.interfaces import Piece, Prompt
from ssmvl.text.prompts import MambaPrompt

QUESTION = [Piece("In: ", False, True), Piece("why?", False, False), Piece("\nOut: ", False, True)]
ANSWER = [Piece("so.", True, False), Piece("<end>", True, True)]


def user(text: str = "why?") -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str = "so.") -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_keeps_the_contract() -> None:
    assert isinstance(MambaPrompt(), Prompt)
    assert MambaPrompt().image_placement == "before_all_text"


def test_question_ends_where_the_answer_begins() -> None:
    assert MambaPrompt().pieces([user()], "<end>") == QUESTION


def test_answer_and_its_end_are_supervised() -> None:
    assert MambaPrompt().pieces([user(), assistant()], "<end>") == QUESTION + ANSWER


def test_turns_follow_each_other() -> None:
    pieces = MambaPrompt().pieces([user(), assistant(), user("why?"), assistant("so.")], "<end>")
    assert pieces == (QUESTION + ANSWER) * 2


def test_an_empty_conversation_is_refused() -> None:
    with pytest.raises(DataError, match="an empty conversation"):
        MambaPrompt().pieces([], "<end>")


@pytest.mark.parametrize(
    ("conversation", "place"),
    [
        ([assistant()], 0),
        ([{"role": "system", "content": "be kind"}, user()], 0),
        ([user(), user()], 1),
        ([user(), assistant(), assistant()], 2),
        ([{"content": "why?"}], 0),
        ([{"role": "user"}], 0),
        ([user(), {"role": "assistant", "content": None}], 1),
        ([{"role": "user", "content": ["why?"]}], 0),
    ],
)
def test_bad_message_is_named(conversation: list[dict[str, Any]], place: int) -> None:
    with pytest.raises(DataError, match=f"message {place} .*'{('user', 'assistant')[place % 2]}'"):
        MambaPrompt().pieces(conversation, "<end>")
