"""Media of a published record: images named in typed content parts, and media that conversion does not read.

A record whose video, audio or image is not read must not become a text sample. Media show up as fields of a record or
of a turn, as placeholders in a text, and as parts of a message.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

MARK = "<image>"  # processing.processor.IMAGE, whose module would bring torch into every process that converts
IMAGE_FIELDS = ("image", "images")
IMAGE_PARTS = ("image", "image_url", "input_image")
TEXT_PARTS = ("text", "input_text", "output_text")
PLAIN_FIELDS = ("id", "value", "content", "question", "answer", "caption", "text", "title", "user", "assistant")
OTHER_MEDIA = {"video", "videos", "audio", "audios", "speech", "sound", "sounds", "voice", "clip", "clips", "frames"}
MEDIA_FIELD = re.compile(r"image|img|picture|photo|screenshot|video|audio|speech|sound|voice|frames|media|pixel")
MEDIA_FILE = re.compile(
    r"[^\n]+\.(jpe?g|jfif|png|webp|gif|bmp|tiff?|heic|avif|jxl|svg|ppm|ico|mp4|m4v|avi|mov|mkv|webm|mpe?g|wav|mp3|flac|"
    r"ogg|opus|m4a|aac)(\?[^\n]*)?|data:(image|video|audio)/.*",
    re.IGNORECASE | re.DOTALL,
)
_NAME = r"images?|img|picture|photo|videos?|vid|audios?|speech|sound|vision|point_?cloud"
_SUFFIX = r"here|placeholder|content|context|token|soft_token|pad|patch|start|begin|\d+"
# Placeholders that occur in no other kind of text, and those that are also tags of HTML, which an answer may quote.
PLACEHOLDER = re.compile(
    rf"<\|(?:{_NAME})[ _-]?(?:{_SUFFIX})?\|>|<(?:{_NAME})[ _-]?(?:{_SUFFIX})>|<(?:start|begin)_of_(?:{_NAME})>",
    re.IGNORECASE,
)
TAG = re.compile(
    rf"<(?:{_NAME}) ?/?>|\[(?:IMG|IMAGE|VIDEO|AUDIO)\]|data:(?:image|video|audio)/[\w.+-]+;base64,", re.IGNORECASE
)


class UnreadPartError(ValueError):
    """A part of a message is neither a text nor an image."""


def unread_media(record: Mapping[str, Any], names: Sequence[str]) -> str:
    """Why a record has media that are not read, by its fields; empty if it has none.

    Args:
        record: the fields of a published record, but for its images and turns; or one turn of it.
        names: of the record's images that are read. Other fields may repeat them, and give the URL they came from.
    """
    known = {posixpath.basename(name) for name in names}
    for field, value in record.items():
        if not value or field in PLAIN_FIELDS:
            continue
        files = [name for name in _media_files(value) if not (names and name.startswith(("http://", "https://")))]
        unread = (
            any(posixpath.basename(name) not in known for name in files)
            or field.lower() in OTHER_MEDIA
            or (not names and MEDIA_FIELD.search(field.lower()))
        )
        if unread:
            return f"the field {field!r} names media that are not read: {value!r}"
    return ""


def placeholder(text: str, *, question: bool) -> str:
    """A placeholder of media in a text, other than `<image>`; empty if there is none.

    Args:
        text: of a turn.
        question: whether the turn is the user's. An answer may quote tags of HTML such as `<video>`.
    """
    for found in PLACEHOLDER.finditer(text):
        return found[0]
    for found in TAG.finditer(text) if question else ():
        if found[0] != MARK:
            return found[0]
    return ""


def join_parts(parts: Sequence[Any]) -> str:
    """Join the typed parts of a message into one text, with a mark for each image; leading marks get their own lines.

    Raises:
        UnreadPartError: a part is neither a text nor an image.
    """
    text = ""
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind in IMAGE_PARTS:
            text += MARK if text.replace(MARK, "").strip() else f"{MARK}\n"
        elif kind in TEXT_PARTS and isinstance(said := part.get("text") or "", str):
            text += said.removeprefix("\n") if text.endswith(f"{MARK}\n") else said
        else:
            raise UnreadPartError(f"a part of a message must be a text or an image; it is {part!r}")
    return text


def part_images(content: Any) -> Iterator[str | None]:
    """The name of each image among the typed parts of a message; None for a part that names none."""
    for part in content if isinstance(content, list) else ():
        if isinstance(part, Mapping) and part.get("type") in IMAGE_PARTS:
            given = next((part[key] for key in (*IMAGE_PARTS, "url", "path") if part.get(key)), None)
            given = given.get("url") or given.get("path") or given if isinstance(given, Mapping) else given
            yield None if given is None else str(given).removeprefix("file://")


def _media_files(value: Any) -> Iterator[str]:
    """Names of media files in a value, at any depth; bytes count as one."""
    if isinstance(value, str):
        if MEDIA_FILE.fullmatch(value):
            yield value
    elif isinstance(value, bytes):
        yield "bytes"
    elif isinstance(value, Mapping | list | tuple):
        for inside in value.values() if isinstance(value, Mapping) else value:
            yield from _media_files(inside)
