"""The check of prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ssmvl.interfaces import Message, Piece, Prompt
from ssmvl.model.blueprint import require_contract
from ssmvl.testing.common import name_of, require

END = "<|end of answer|>"  # no tokenizer's: a prompt must write the one that it is given
TALK: tuple[Message, ...] = (
    {"role": "user", "content": "<image>\nWhat is {this}? <|endoftext|> Ünd\tdas?"},
    {"role": "assistant", "content": "A cat."},
    {"role": "user", "content": "And\n\nwhere?"},
    {"role": "assistant", "content": "On a mat, {there}."},
)
PLACEMENTS = ("before_all_text", "in_place")


def check_prompt(prompt: Callable[[], Prompt]) -> None:
    """The prompt writes conversations so that answers and their ends, and nothing else, are learned.

    The user's text stands in it as it is, where special tokens are not parsed, or no word of it does, as where
    captions are learned; what stands before an answer is the same whether the answer follows or not.
    `check_prompt(MyPrompt)`.

    Args:
        prompt: called with nothing.

    Raises:
        ContractError: it does not; names the claim and the piece.
    """
    name = name_of(prompt)
    built: Prompt = require_contract(prompt(), name, Prompt)
    placement = built.image_placement
    require(placement in PLACEMENTS, f"{name}.image_placement must be one of {PLACEMENTS}, is {placement!r}")
    written = [built.pieces(TALK[:messages], END) for messages in range(1, len(TALK) + 1)]
    reads = any(_free(piece) for pieces in written for piece in pieces)
    for messages, pieces in enumerate(written, 1):
        _check_pieces(f"{name}.pieces of {messages} messages", TALK[:messages], pieces, reads)
    *_, whole = written
    for cut in written[::2]:  # before an answer
        what = f"{name}.pieces up to an answer must be what the whole conversation begins with"
        require(whole[: len(cut)] == cut, f"{what}: {cut} against {whole}")


def _free(piece: object) -> bool:
    return isinstance(piece, Piece) and not (piece.supervised or piece.template)


def _check_pieces(what: str, talk: Sequence[Message], pieces: Sequence[Piece], reads: bool) -> None:
    require(all(isinstance(piece, Piece) for piece in pieces), f"{what} must be a list of Piece, received {pieces!r}")
    answers = [message["content"] for message in talk if message["role"] == "assistant"]
    expected = [Piece(*piece) for answer in answers for piece in ((answer, True, False), (END, True, True))]
    learned = [piece for piece in pieces if piece.supervised]
    require(learned == expected, f"{what}: each answer and its end are supervised: {expected}; received {learned}")
    free = [piece.text for piece in pieces if _free(piece)]
    template = "".join(piece.text for piece in pieces if piece.template)
    for message in talk:
        asked = message["content"]
        if message["role"] == "user":
            require(
                asked not in template, f"{what}: a user's text in a template is parsed for special tokens: {asked!r}"
            )
            stands = not reads or any(asked in text for text in free)
            require(stands, f"{what}: {asked!r} must stand there as it is, in {free}")
    require("<image>" not in template, f"{what}: `<image>` marks are the user's; the template has one: {template!r}")
