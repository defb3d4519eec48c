"""Published records -> conversations in the library's own layout. Pure functions on what JSON or parquet hold.

Layouts: `conversations: [{from, value}]` of LLaVA and ShareGPT, `messages: [{role, content}]`, `texts: [{user,
assistant}]` of the Cauldron, and LRV-Instruction's `{image_id, question, answer, task}`. A content may be a text or a
list of typed parts, `{"type": "text", "text": …}` and `{"type": "image"}`.
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
TALKS = ("conversations", "messages", "texts")

Turn = dict[str, str]  # {"role": "user" or "assistant", "content": text}


class UnusableError(Exception):
    """A record makes no sample.

    Args:
        reason: one of "missing image", "damaged image", "unread media", "empty answer", "image marks",
            "no conversation".
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
        UnusableError: the record has no conversation, an answer is blank, the `<image>` marks do not match the images,
            or the record has media that are not read.
    """
    everything = _turns(record)
    _require_only_images(record, everything, images)
    turns = [turn for turn in everything if turn["role"] != "system"]
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
    outside = (turn["content"] for turn in everything if turn["role"] != "user" or turn not in turns)
    if not marks and any(MARK in text and "</image>" not in text for text in outside):
        raise UnusableError("image marks", f"{MARK} marks only outside the user's questions")
    return turns


def image_names(record: Any) -> list[str]:
    """The names of a record's images, as it gives them: in its fields, or else in the typed parts of its messages."""
    if not isinstance(record, Mapping):
        return []
    if _is_lrv(record):
        name = str(record["image_id"])
        return [name if IMAGE_FILE.fullmatch(name) else f"{name}.jpg"]
    names = record.get("image") or record.get("images") or []
    names = names if isinstance(names, list) else [names]
    return [name if isinstance(name, str) else repr(name) for name in names] or _names_of_parts(record)


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


def _require_only_images(record: Mapping[str, Any], turns: list[Turn], images: int) -> None:
    """Raise where a record has media that are not read: other fields, other placeholders, images named twice."""
    names = image_names(record)
    given = [record[field] for field in IMAGE_FIELDS if record.get(field)]
    image, *more = [one if isinstance(one, list) else [one] for one in given] or [[]]
    if more and image != more[0]:
        raise UnusableError("unread media", f"image and images differ: {image!r} and {more[0]!r}")
    parts = _names_of_parts(record)
    if parts and parts != names:
        raise UnusableError("unread media", f"typed parts name other images than the record: {parts!r} and {names!r}")
    indices = [part["index"] for part in _image_parts(record) if isinstance(part.get("index"), int)]
    if indices != sorted(indices):
        raise UnusableError("image marks", f"typed parts take images in another order: {indices}")
    if len(names) > images:
        raise UnusableError("missing image", f"{names[images]} is not there")
    fields = {field: value for field, value in record.items() if field not in (*TALKS, *IMAGE_FIELDS)}
    for part in (fields, *_told(record)):
        if why := unread_media(part, names, images):
            raise UnusableError("unread media", why)
    for number, turn in enumerate(turns):
        if mark := placeholder(turn["content"], question=turn["role"] != "assistant"):
            raise UnusableError("unread media", f"turn {number} has the placeholder {mark}; only {MARK} is read")


def _told(record: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the turns of a record as they are, leaving out what is not an object."""
    for field in TALKS:
        turns = record.get(field)
        yield from (turn for turn in turns if isinstance(turn, Mapping)) if isinstance(turns, list) else ()


def _image_parts(record: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for turn in _told(record):
        yield from image_parts(turn.get("value", turn.get("content")))


def _names_of_parts(record: Mapping[str, Any]) -> list[str]:
    return [name for part in _image_parts(record) if (name := part_name(part)) is not None]


def _is_lrv(record: Mapping[str, Any]) -> bool:
    return record.keys() >= {"image_id", "question", "answer"} and not record.keys() & {*TALKS}


def _turns(record: Any) -> list[Turn]:
    if not isinstance(record, Mapping):
        raise UnusableError("no conversation", f"not an object, but {record!r}")
    if _is_lrv(record):
        return _pair(record["question"], record["answer"])
    there = [field for field in TALKS if record.get(field) is not None]
    field = next((field for field in there if record[field] != []), next(iter(there), None))
    if field is None:
        raise UnusableError(
            "no conversation", f"none of the fields {', '.join(TALKS)}; its fields are {', '.join(record)}"
        )
    given = record[field]
    if not isinstance(given, list) or not all(isinstance(turn, Mapping) for turn in given):
        raise UnusableError("no conversation", f"{field} must be a list of objects; it is {given!r}")
    if field == "texts":
        pairs = [turn for pair in given for turn in _pair(pair.get("user"), pair.get("assistant"))]
        return pairs[:-1] if given and given[-1].get("assistant") is None else pairs
    for number, turn in enumerate(given):
        if not turn.keys() & {"value", "content"}:
            raise UnusableError("no conversation", f"turn {number} has no text; its fields are {', '.join(turn)}")
    return [_turn(turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))) for turn in given]


def _pair(question: Any, answer: Any) -> list[Turn]:
    return [_turn("user", question), _turn("assistant", answer)]


def _turn(role: Any, text: Any) -> Turn:
    if role not in ROLES:
        raise UnusableError("no conversation", f"a turn of {role!r}; known are {', '.join(ROLES)}")
    if isinstance(text, list):
        try:
            text = join_parts(text)
        except UnreadPartError as error:
            raise UnusableError("unread media", str(error)) from error
    if not isinstance(text, str | None):
        raise UnusableError("no conversation", f"a turn must be a text; it is {text!r}")
    # half a surrogate pair, which a JSON may hold, is no UTF-8
    return {"role": ROLES[role], "content": (text or "").encode(errors="replace").decode()}
