"""Published records and their images, in chunks that any process can read."""

from __future__ import annotations

import posixpath
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from ssmvl.data.conversion.conversations import UnusableError, conversation
from ssmvl.data.conversion.images import EntryError, Place, damage, is_outside
from ssmvl.errors import MissingDependencyError

Record = dict[str, Any]  # {"id", "type", "conversation", "images": list[bytes]}, the input of shards.pack_record


class Skipped(NamedTuple):
    """A record that cannot be used, and the reason."""

    id: str
    source: str
    record: int  # index in the source, from 0
    reason: str
    detail: str


class Image(NamedTuple):
    """An image of a record: its name, for messages, and its bytes or their location; None if it was not found."""

    name: str
    data: Place | bytes | None

    def read(self) -> bytes:
        """Return the bytes, checked by `damage`.

        Raises:
            UnusableError: the image is missing or damaged.
            DataError: neither this image nor others from the same directory, zip or tar can be read, see `Place.read`.
        """
        try:
            data = self.data.read() if isinstance(self.data, Place) else self.data
        except FileNotFoundError:
            data = None
        except EntryError as error:
            raise UnusableError("damaged image", f"{self.name}: {error}") from error
        if data is None:
            problem = "is outside of the image directory" if is_outside(self.name) else "not found"
            if self.name.startswith("/"):
                problem = f"is in none of the image directories; give --images {posixpath.dirname(self.name)}=DIRECTORY"
            raise UnusableError("missing image", f"{self.name} {problem}")
        if problem := damage(data):
            raise UnusableError("damaged image", f"{self.name}: {problem}")
        return data


class Published(NamedTuple):
    """A record as published, and a message about media that the reader of its file does not read."""

    record: Any
    images: Sequence[Image]
    type: str
    unread: str = ""


@dataclass(frozen=True)
class Chunk(ABC):
    """Consecutive records of one file; picklable, so that any process can read it.

    Args:
        source: the file.
        first: index of the first record in the file, from 0.
        done: share of all sources (0 to 1) that is read after this chunk.
        ids: ids of the records.
    """

    source: str
    first: int
    done: float
    ids: Sequence[str]

    def read(self) -> Iterator[Record | Skipped]:
        """Yield one item for each record, in order, with its image bytes.

        Raises:
            DataError: the file, or the directory or zip of its images, cannot be read.
        """
        for number, (id_, published) in enumerate(zip(self.ids, self._records(), strict=True), self.first):
            try:
                if published.unread:
                    raise UnusableError("unread media", published.unread)
                turns = conversation(published.record, len(published.images))
                images = [image.read() for image in published.images]
            except UnusableError as error:
                yield Skipped(id_, self.source, number, error.reason, error.detail)
            else:
                yield {"id": id_, "type": published.type, "conversation": turns, "images": images}

    @abstractmethod
    def _records(self) -> Iterable[Published]: ...


@dataclass(frozen=True)
class SourceFile:
    """A file to be read in chunks.

    Args:
        path: path of the file.
        size: maximum number of records in a chunk.
        unique: id -> the same id, or a new one if it occurred before.
        done: share of this file that is read -> share of all sources.
    """

    path: Path
    size: int
    unique: Callable[[str], str]
    done: Callable[[float], float]

    def id(self, stored: Any, number: int) -> str:
        """Return the unique id of a record, made of file name and index if it stores none."""
        return self.unique(f"{self.path.name}:{number}" if stored is None else str(stored))


def require(package: str, file_format: str) -> None:
    """Check that a package is installed.

    Raises:
        MissingDependencyError: names the extra that installs it.
    """
    if find_spec(package) is None:
        raise MissingDependencyError(f"reading {file_format} needs {package}: pip install 'ssmvl[data]'")
