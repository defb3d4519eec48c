"""Check of prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ssmvl.interfaces import Message, Piece, Prompt
from ssmvl.model.blueprint import require_contract
from ssmvl.testing.common import name_of, require

END = "<|end of answer|>"  # not a real end token: a prompt must write the one that it receives
TALK: tuple[Message, ...] = (
    {"role": "user", "content": "<image>\nWhat is {this}? <|endoftext|> Ünd\tdas?"},
    {"role": "assistant", "content": "A cat."},
    {"role": "user", "content": "And\n\nwhere?"},
    {"role": "assistant", "content": "On a mat, {there}."},
)
PLACEMENTS = ("before_all_text", "in_place")


def check_prompt(prompt: Callable[[], Prompt]) -> None:
    """Check that a prompt supervises exactly the answers and their ends.

    The user's text must appear verbatim outside template pieces, where special tokens are not parsed, or not at all,
    as for captions. The pieces before an answer must not depend on whether the answer follows.
    `check_prompt(MyPrompt)`.

    Args:
        prompt: called without arguments.

    Raises:
        ContractError: the prompt violates its contract; names the requirement and the piece.
    """
    name = name_of(prompt)
    built: Prompt = require_contract(prompt(), name, Prompt)
    placement = built.image_placement
    require(placement in PLACEMENTS, f"{name}.image_placement must be one of {PLACEMENTS}, is {placement!r}")
    prefixes = [built.pieces(TALK[:messages], END) for messages in range(1, len(TALK) + 1)]
    includes_user_text = any(_is_user_text(piece) for pieces in prefixes for piece in pieces)
    for messages, pieces in enumerate(prefixes, 1):
        _check_pieces(f"{name}.pieces of {messages} messages", TALK[:messages], pieces, includes_user_text)
    *_, full = prefixes
    for prefix in prefixes[::2]:  # ends before an answer
        what = f"{name}.pieces up to an answer must be a prefix of the full conversation's pieces"
        require(full[: len(prefix)] == prefix, f"{what}: {prefix} against {full}")


def _is_user_text(piece: object) -> bool:
    return isinstance(piece, Piece) and not (piece.supervised or piece.template)


def _check_pieces(what: str, talk: Sequence[Message], pieces: Sequence[Piece], includes_user_text: bool) -> None:
    require(all(isinstance(piece, Piece) for piece in pieces), f"{what} must be a list of Piece, received {pieces!r}")
    answers = [message["content"] for message in talk if message["role"] == "assistant"]
    expected = [Piece(*piece) for answer in answers for piece in ((answer, True, False), (END, True, True))]
    supervised = [piece for piece in pieces if piece.supervised]
    difference = f"expected {expected}, received {supervised}"
    require(supervised == expected, f"{what}: exactly the answers and their ends must be supervised; {difference}")
    user_texts = [piece.text for piece in pieces if _is_user_text(piece)]
    template = "".join(piece.text for piece in pieces if piece.template)
    for question in (message["content"] for message in talk if message["role"] == "user"):
        require(
            question not in template,
            f"{what}: user text must not be in a template piece, which is parsed for special tokens: {question!r}",
        )
        included = not includes_user_text or any(question in text for text in user_texts)
        require(included, f"{what}: {question!r} must appear unchanged, received {user_texts}")
    require("<image>" not in template, f"{what}: template pieces must not contain `<image>` marks: {template!r}")
