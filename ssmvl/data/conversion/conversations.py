"""Published records -> conversations in the library's layout. Pure functions of parsed JSON or parquet.

Layouts: `conversations: [{from, value}]` of LLaVA and ShareGPT, `messages: [{role, content}]`, `texts: [{user,
assistant}]` of the Cauldron, and LRV-Instruction's `{image_id, question, answer, task}`. A content is a text or a list
of typed parts, `{"type": "text", "text": …}` and `{"type": "image"}`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ssmvl.data.conversion.media import (
    IMAGE_FIELDS,
    IMAGE_FILE,
    MARK,
    UnreadPartError,
    image_parts,
    join_parts,
    part_name,
    placeholder,
    unread_media,
)
from ssmvl.errors import short

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
CONVERSATION_FIELDS = ("conversations", "messages", "texts")

Turn = dict[str, str]  # {"role": "user" or "assistant", "content": text}


class UnusableError(Exception):
    """A record that cannot be used as a sample.

    Args:
        reason: one of "missing image", "damaged image", "unread media", "empty answer", "image marks",
            "no conversation".
        detail: the cause.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, short(detail)


def conversation(record: Any, images: int) -> list[Turn]:
    """Return a record's conversation: user and assistant turns alternate, and the last turn is an answer.

    As in LLaVA, a first turn that is not the user's is dropped. So are system turns and a final unanswered question.

    Args:
        record: a published record.
        images: number of its images.

    Raises:
        UnusableError: the record has no conversation, an answer is blank, the `<image>` marks do not match the images,
            or the record has media that are not read.
    """
    all_turns = _turns(record)
    _require_only_images(record, all_turns, images)
    turns = [turn for turn in all_turns if turn["role"] != "system"]
    if turns and turns[0]["role"] != "user":
        turns = turns[1:]
    for number, turn in enumerate(turns):
        if turn["role"] != ("user", "assistant")[number % 2]:
            raise UnusableError("no conversation", f"turn {number} is the {turn['role']}'s again; roles must alternate")
    turns = turns[: len(turns) // 2 * 2]
    if not turns:
        raise UnusableError("no conversation", "no question with an answer")
    for number, turn in enumerate(turns):
        if turn["role"] == "assistant" and not turn["content"].strip():
            raise UnusableError("empty answer", f"turn {number} is {turn['content']!r}")
    marks = sum(turn["content"].count(MARK) for turn in turns if turn["role"] == "user")
    if marks not in (0, images):
        raise UnusableError("image marks", f"{marks} {MARK} marks, but {images} images")
    outside = (turn["content"] for turn in all_turns if turn["role"] != "user" or turn not in turns)
    if not marks and any(MARK in text and "</image>" not in text for text in outside):
        raise UnusableError("image marks", f"{MARK} marks only outside the user's questions")
    return turns


def image_names(record: Any) -> list[str]:
    """Return the names of a record's images, unchanged: from its fields, or else from typed parts of its messages."""
    if not isinstance(record, Mapping):
        return []
    if _is_lrv(record):
        name = str(record["image_id"])
        return [name if IMAGE_FILE.fullmatch(name) else f"{name}.jpg"]
    names = record.get("image") or record.get("images") or []
    names = names if isinstance(names, list) else [names]
    return [name if isinstance(name, str) else repr(name) for name in names] or _names_of_parts(record)


def sample_type(record: Any, names: list[str]) -> str:
    """Return LRV's task, the top directory of the first image unless it is a number, or `text` without images."""
    if isinstance(record, Mapping) and _is_lrv(record):
        return str(record.get("task") or "")
    if not names:
        return "text"
    folder, slash, _ = names[0].partition("/")
    return folder if slash and not folder.isdigit() else ""


def record_id(record: Any) -> str | None:
    """Return the id that is stored in a record, or None."""
    id_ = record.get("image_id" if _is_lrv(record) else "id") if isinstance(record, Mapping) else None
    return None if id_ is None else str(id_)


def _require_only_images(record: Mapping[str, Any], turns: list[Turn], images: int) -> None:
    """Reject media that are not read: other fields, other placeholders, contradictory names of images."""
    names = image_names(record)
    values = [record[field] for field in IMAGE_FIELDS if record.get(field)]
    first, *others = [value if isinstance(value, list) else [value] for value in values] or [[]]
    if others and first != others[0]:
        raise UnusableError("unread media", f"image and images differ: {first!r} and {others[0]!r}")
    parts = _names_of_parts(record)
    if parts and parts != names:
        raise UnusableError("unread media", f"typed parts and record name different images: {parts!r} and {names!r}")
    indices = [part["index"] for part in _image_parts(record) if isinstance(part.get("index"), int)]
    if indices != sorted(indices):
        raise UnusableError("image marks", f"typed parts use the images out of order: {indices}")
    if len(names) > images:
        raise UnusableError("missing image", f"{names[images]} not found")
    fields = {field: value for field, value in record.items() if field not in (*CONVERSATION_FIELDS, *IMAGE_FIELDS)}
    for part in (fields, *_raw_turns(record)):
        if problem := unread_media(part, names, images):
            raise UnusableError("unread media", problem)
    for number, turn in enumerate(turns):
        if mark := placeholder(turn["content"], question=turn["role"] != "assistant"):
            raise UnusableError("unread media", f"turn {number} has the placeholder {mark}; only {MARK} is supported")


def _raw_turns(record: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the turns of a record, unchanged. Turns that are not objects are dropped."""
    for field in CONVERSATION_FIELDS:
        turns = record.get(field)
        yield from (turn for turn in turns if isinstance(turn, Mapping)) if isinstance(turns, list) else ()


def _image_parts(record: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for turn in _raw_turns(record):
        yield from image_parts(turn.get("value", turn.get("content")))


def _names_of_parts(record: Mapping[str, Any]) -> list[str]:
    return [name for part in _image_parts(record) if (name := part_name(part)) is not None]


def _is_lrv(record: Mapping[str, Any]) -> bool:
    return record.keys() >= {"image_id", "question", "answer"} and not record.keys() & {*CONVERSATION_FIELDS}


def _turns(record: Any) -> list[Turn]:
    if not isinstance(record, Mapping):
        raise UnusableError("no conversation", f"a record must be an object, received {record!r}")
    if _is_lrv(record):
        return _pair(record["question"], record["answer"])
    present = [field for field in CONVERSATION_FIELDS if record.get(field) is not None]
    field = next((field for field in present if record[field] != []), next(iter(present), None))
    if field is None:
        raise UnusableError(
            "no conversation",
            f"the record has none of the fields {', '.join(CONVERSATION_FIELDS)}; its fields are {', '.join(record)}",
        )
    entries = record[field]
    if not isinstance(entries, list) or not all(isinstance(turn, Mapping) for turn in entries):
        raise UnusableError("no conversation", f"{field} must be a list of objects, received {entries!r}")
    if field == "texts":
        turns = [turn for pair in entries for turn in _pair(pair.get("user"), pair.get("assistant"))]
        return turns[:-1] if entries and entries[-1].get("assistant") is None else turns
    for number, turn in enumerate(entries):
        if not turn.keys() & {"value", "content"}:
            raise UnusableError("no conversation", f"turn {number} has no text; its fields are {', '.join(turn)}")
    return [_turn(turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))) for turn in entries]


def _pair(question: Any, answer: Any) -> list[Turn]:
    return [_turn("user", question), _turn("assistant", answer)]


def _turn(role: Any, text: Any) -> Turn:
    if role not in ROLES:
        raise UnusableError("no conversation", f"unknown role {role!r}; allowed: {', '.join(ROLES)}")
    if isinstance(text, list):
        try:
            text = join_parts(text)
        except UnreadPartError as error:
            raise UnusableError("unread media", str(error)) from error
    if not isinstance(text, str | None):
        raise UnusableError("no conversation", f"the text of a turn must be a string, received {text!r}")
    # a lone surrogate, valid in JSON, cannot be encoded as UTF-8
    return {"role": ROLES[role], "content": (text or "").encode(errors="replace").decode()}
