"""Published records -> conversations in the library's own layout. Pure functions on what JSON or parquet hold.

Layouts: `conversations: [{from, value}]` of LLaVA and ShareGPT, `messages: [{role, content}]`, `texts: [{user,
assistant}]` of the Cauldron, and LRV-Instruct's `{image_id, question, answer, task}`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssmvl.errors import short

MARK = "<image>"  # processing.processor.IMAGE, whose module would bring torch into every process that converts
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
TALKS = ("conversations", "messages", "texts")

Turn = dict[str, str]  # {"role": "user" or "assistant", "content": text}


class UnusableError(Exception):
    """A record makes no sample.

    Args:
        reason: one of "missing image", "damaged image", "empty answer", "image marks", "no conversation".
        detail: what exactly is wrong.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, short(detail)


def conversation(record: Any, images: int) -> list[Turn]:
    """The conversation of a record with this number of images: user and assistant in turn, ending with an answer.

    As LLaVA reads them, a first turn that is not the user's is left out; so are system turns, and a last question
    without an answer.

    Raises:
        UnusableError: there is none, an answer is blank, or its `<image>` marks do not match the images.
    """
    turns = [turn for turn in _turns(record) if turn["role"] != "system"]
    if turns and turns[0]["role"] != "user":
        turns = turns[1:]
    for number, turn in enumerate(turns):
        if turn["role"] != ("user", "assistant")[number % 2]:
            raise UnusableError("no conversation", f"turn {number} is the {turn['role']}'s again; they must take turns")
    turns = turns[: len(turns) // 2 * 2]
    if not turns:
        raise UnusableError("no conversation", "no question with an answer")
    for number, turn in enumerate(turns):
        if turn["role"] == "assistant" and not turn["content"].strip():
            raise UnusableError("empty answer", f"turn {number} is {turn['content']!r}")
    marks = sum(turn["content"].count(MARK) for turn in turns if turn["role"] == "user")
    if marks not in (0, images):
        raise UnusableError("image marks", f"{marks} {MARK} marks, but {images} images")
    return turns


def image_names(record: Any) -> list[str]:
    """The names of a record's images, as it gives them."""
    if not isinstance(record, Mapping):
        return []
    names = record.get("image") or record.get("images") or []
    if _is_lrv(record):
        names = f"{record['image_id']}.jpg"
    return [name if isinstance(name, str) else repr(name) for name in (names if isinstance(names, list) else [names])]


def sample_type(record: Any, names: list[str]) -> str:
    """Where a sample comes from: LRV's task, the first folder of its first image unless that is a number, or `text`."""
    if isinstance(record, Mapping) and _is_lrv(record):
        return str(record.get("task") or "")
    if not names:
        return "text"
    folder, slash, _ = names[0].partition("/")
    return folder if slash and not folder.isdigit() else ""


def record_id(record: Any) -> str | None:
    """The name that a record gives itself."""
    given = record.get("image_id" if _is_lrv(record) else "id") if isinstance(record, Mapping) else None
    return None if given is None else str(given)


def _is_lrv(record: Mapping[str, Any]) -> bool:
    return record.keys() >= {"image_id", "question", "answer"} and not record.keys() & {*TALKS}


def _turns(record: Any) -> list[Turn]:
    if not isinstance(record, Mapping):
        raise UnusableError("no conversation", f"not an object, but {record!r}")
    if _is_lrv(record):
        return _pair(record["question"], record["answer"])
    field = next((field for field in TALKS if record.get(field) is not None), None)
    if field is None:
        raise UnusableError(
            "no conversation", f"none of the fields {', '.join(TALKS)}; its fields are {', '.join(record)}"
        )
    given = record[field]
    if not isinstance(given, list) or not all(isinstance(turn, Mapping) for turn in given):
        raise UnusableError("no conversation", f"{field} must be a list of objects; it is {given!r}")
    if field == "texts":
        return [turn for pair in given for turn in _pair(pair.get("user"), pair.get("assistant"))]
    return [_turn(turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))) for turn in given]


def _pair(question: Any, answer: Any) -> list[Turn]:
    return [_turn("user", question), _turn("assistant", answer)]


def _turn(role: Any, text: Any) -> Turn:
    if role not in ROLES:
        raise UnusableError("no conversation", f"a turn of {role!r}; known are {', '.join(ROLES)}")
    if not isinstance(text, str | None):
        raise UnusableError("no conversation", f"a turn must be a text; it is {text!r}")
    # half a surrogate pair, which a JSON may hold, is no UTF-8
    return {"role": ROLES[role], "content": (text or "").encode(errors="replace").decode()}
