"""Media of a published record: images named in typed content parts, and media that conversion does not read.

A record whose video, audio or image is not read must not become a text sample. Media occur as fields of a record or
of a turn, as placeholders in a text, and as parts of a message.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

MARK = "<image>"  # equals processing.processor.IMAGE, whose module would import torch into every worker
IMAGE_FIELDS = ("image", "images")
IMAGE_PARTS = ("image", "image_url", "input_image")
TEXT_PARTS = ("text", "input_text", "output_text")
PLAIN_FIELDS = {
    *("id", "value", "content", "question", "answer", "caption", "original_caption", "text", "alt", "title"),
    *("user", "assistant", "url", "type"),
}
OTHER_MEDIA = {
    *("video", "videos", "audio", "audios", "speech", "sound", "sounds", "voice", "clip", "clips", "frames"),
}
IMAGE_WORDS = {
    *("image", "images", "img", "imgs", "picture", "pictures", "pic", "pics", "photo", "photos"),
    *("screenshot", "screenshots", "pixel", "pixels"),
}
OTHER_WORDS = {"video", "videos", "vid", "vids", "audio", "audios"}
FILE_WORDS = {"file", "files", "filename", "filenames", "path", "paths", "media"}
IMAGE_FILE = re.compile(
    r"[^\n]+\.(jpe?g|jfif|png|webp|gif|bmp|tiff?|heic|avif|jxl|jp2|tga|svg|ppm|ico)(\?[^\n]*)?|data:image/.*",
    re.IGNORECASE | re.DOTALL,
)
OTHER_FILE = re.compile(
    r"[^\n]+\.(mp4|m4v|avi|mov|mkv|webm|wmv|flv|3gp|mpe?g|wav|mp3|flac|ogg|opus|m4a|aac|pdf|npy|npz|pt|ply|pcd|las)(\?[^\n]*)?|"
    r"data:(video|audio)/.*",
    re.IGNORECASE | re.DOTALL,
)
SIGNATURE = re.compile(
    rb"\xff\xd8\xff|\x89PNG|GIF8|RIFF....(WEBP|WAVE|AVI )|II\*\0|MM\0\*|....ftyp|OggS|ID3|fLaC|\x1aE\xdf\xa3", re.DOTALL
)
# Placeholders of other model families that do not occur in ordinary text.
PLACEHOLDER = re.compile(
    r"<\|(?i:image|img|video|audio|vision)(?:[_ ]?(?i:pad|start|end|bos|eos|placeholder|\d+))?\|>"
    r"|<(?:ImageHere|IMG_CONTEXT|IMG_PLH|im_patch|im_start|im_end|vision_start|vision_end)>"
    r"|<(?:image|img|video|audio)_(?:placeholder|soft_token|token|pad)>|<(?:start|end)_of_(?:image|video|audio)>"
)
# Placeholders that also occur in code and HTML: they count in questions only, and not after the name of a generic type.
IN_QUESTIONS = re.compile(
    r"(?<!\w)<(?:[Ii]mage|IMAGE|[Vv]ideo|VIDEO|[Aa]udio|AUDIO|[Pp]icture|img)[ _:-]?\d+>"
    r"|(?<!\w)<(?:Image|IMAGE|[Vv]ideo|VIDEO|[Aa]udio|AUDIO|speech|sound)>"
    r"|<img>[^<]*</img>|\[(?:IMG|IMAGE|VIDEO|AUDIO)\](?!.*\[/)|(?:^|\s)data:(?:image|video|audio)/[\w.+-]+;base64,"
    r"|!\[[^\]]*\]\((?!https?:)[^)]*\.(?:jpe?g|png|webp|gif|bmp)\)",
    re.DOTALL,
)
HTML = re.compile(r"\bsrc\s*=|<source\b")  # a text about HTML, whose tags are not the record's media


class UnreadPartError(ValueError):
    """A message part that conversion does not read."""


def unread_media(record: Mapping[str, Any], names: Sequence[str], images: int) -> str:
    """Return a message about a field that names media that are not read, or an empty string.

    Args:
        record: the fields of a published record without its images and turns, or one of its turns.
        names: names of the record's images. Other fields may repeat them, or give the URL of their origin.
        images: number of images that are read. If they are stored as bytes, a field may name their original file.
    """
    for field, value in record.items():
        if value is None or value is False or value in ("", [], {}) or field.lower() in PLAIN_FIELDS:
            continue
        words = set(field_words(field))
        is_content = isinstance(value, str | bytes | list | Mapping)
        unread = field.lower() in OTHER_MEDIA and is_content
        if not images:
            unread |= bool(words & (IMAGE_WORDS | OTHER_WORDS)) and _is_reference(value, words)
        elif words & IMAGE_WORDS and re.search(r"\d", field):  # image2, image_3
            unread |= is_content and not _repeats(value, names)
        if unread or not all(_is_metadata(file, words, names, images) for file in _media_files(value)):
            return f"the field {field!r} names media that are not read: {value!r}"
    return ""


def _is_metadata(file: str, words: set[str], names: Sequence[str], images: int) -> bool:
    """Return True if a media file named by a field is one of the record's images, or only describes one."""
    if _repeats(file, names):
        return True
    if not images or file == "bytes" or OTHER_FILE.fullmatch(file):
        return False
    return file.startswith(("http://", "https://")) or not words & IMAGE_WORDS or not names


def field_words(field: str) -> list[str]:
    """Split a field's name into lowercase words: `imagePath2` -> image, path."""
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", field)]


def placeholder(text: str, *, question: bool) -> str:
    """Return the first media placeholder in a text, other than `<image>`, or an empty string.

    Args:
        text: text of a turn.
        question: True for a user's turn. An answer may quote HTML tags such as `<video>`.
    """
    patterns = [PLACEHOLDER, *([IN_QUESTIONS] if question and not HTML.search(text) else [])]
    return next((match[0].strip() for match in (pattern.search(text) for pattern in patterns) if match), "")


def join_parts(parts: Sequence[Any]) -> str:
    """Join the typed parts of a message into one text, with a mark per image. Leading marks get lines of their own.

    Raises:
        UnreadPartError: a part is neither a text nor an image, or is a text that also has media.
    """
    joined = ""
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind in IMAGE_PARTS:
            joined += MARK if joined.replace(MARK, "").strip() else f"{MARK}\n"
        elif kind in TEXT_PARTS and isinstance(text := part.get("text") or "", str):
            if part.get("value") or part.get("content"):
                raise UnreadPartError(f"a text part must store its text in `text`, received {part!r}")
            if unread_media({field: part[field] for field in part if field != "index"}, [], 0):
                raise UnreadPartError(f"a text part of a message must not have media, received {part!r}")
            joined += text.removeprefix("\n") if joined.endswith(f"{MARK}\n") else text
        else:
            raise UnreadPartError(f"a part of a message must be a text or an image, received {part!r}")
    return joined


def image_parts(content: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the image parts among the typed parts of a message."""
    for part in content if isinstance(content, list) else ():
        if isinstance(part, Mapping) and part.get("type") in IMAGE_PARTS:
            yield part


def part_name(part: Mapping[str, Any]) -> str | None:
    """Return the file or URL that an image part names, or None."""
    value = next((part[key] for key in (*IMAGE_PARTS, "url", "path") if part.get(key)), None)
    value = value.get("url") or value.get("path") or value if isinstance(value, Mapping) else value
    return None if value is None else str(value).removeprefix("file://")


def _repeats(value: Any, names: Sequence[str]) -> bool:
    """Return True if a value is the name of one of a record's images, with more or fewer leading directories."""
    return isinstance(value, str) and any(f"/{value}".endswith(f"/{n}") or f"/{n}".endswith(f"/{value}") for n in names)


def _is_reference(value: Any, words: set[str]) -> bool:
    """Return True if a field named after media refers to one: its value is not a number, or is an index or positive."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return bool(words & {"id", "index", "idx"}) or value > 0
    return True


def _media_files(value: Any) -> Iterator[str]:
    """Yield the names of media files in a value, at any depth. Bytes of media yield "bytes"."""
    if isinstance(value, str):
        if IMAGE_FILE.fullmatch(value) or OTHER_FILE.fullmatch(value):
            yield value
    elif isinstance(value, bytes):
        if SIGNATURE.match(value):
            yield "bytes"
    elif isinstance(value, Mapping | list | tuple):
        for child in value.values() if isinstance(value, Mapping) else value:
            yield from _media_files(child)
