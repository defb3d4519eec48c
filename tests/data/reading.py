"""Helpers for tests of sources: read source files completely, or up to an error."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from published import draw

from ssmvl.data.conversion.sources import open_sources
from ssmvl.errors import DataError

TALK = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]  # in LLaVA's format
CHAT = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]  # in ours
IMAGE = draw(0).data
PYTHON = """
import resource, sys
from pathlib import Path
from ssmvl.data.conversion.sources import open_sources
"""


def opened(*sources: Path | str, images: list[str] | None = None, size: int = 5) -> Iterator[Any]:
    return open_sources([Path(source) for source in sources], images or [], size)


def read(*sources: Path | str, images: list[str] | None = None, size: int = 5) -> list[Any]:
    """Read all records, each chunk as in another process."""
    return [
        item
        for chunk in opened(*sources, images=images, size=size)
        for item in pickle.loads(pickle.dumps(chunk)).read()
    ]


def until_error(path: Path, size: int) -> tuple[list[Any], str]:
    """Return the records before the error, and its message."""
    records: list[Any] = []
    try:
        for chunk in opened(path, size=size):
            records += chunk.read()
    except DataError as error:
        return records, str(error)
    raise AssertionError(f"{path} was read without an error")


def write_json(path: Path, records: Any) -> Path:
    path.write_text(json.dumps(records))
    return path
