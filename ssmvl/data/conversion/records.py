"""Published records and their images, grouped into chunks that any process can read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from ssmvl.data.conversion.conversations import UnusableError, conversation
from ssmvl.data.conversion.images import EntryError, Place, damage, leaves
from ssmvl.errors import MissingDependencyError

Record = dict[str, Any]  # {"id", "type", "conversation", "images": list[bytes]}, as shards.pack_record takes it


class Skipped(NamedTuple):
    """A record that makes no sample, and why."""

    id: str
    source: str
    record: int  # its number in the source, from 0
    reason: str
    detail: str


class Image(NamedTuple):
    """An image of a record: its name, for messages, and its bytes or where they lie; None if they are nowhere."""

    name: str
    data: Place | bytes | None

    def read(self) -> bytes:
        """The bytes, which look like those of a whole image.

        Raises:
            UnusableError: they are missing or damaged.
            DataError: nothing can be read any more, see `Place.read`.
        """
        try:
            data = self.data.read() if isinstance(self.data, Place) else self.data
        except FileNotFoundError:
            data = None
        except EntryError as error:
            raise UnusableError("damaged image", f"{self.name}: {error}") from error
        if data is None:
            why = "leaves the image folder" if leaves(self.name) else "is not there"
            raise UnusableError("missing image", f"{self.name} {why}")
        if wrong := damage(data):
            raise UnusableError("damaged image", f"{self.name}: {wrong}")
        return data


class Published(NamedTuple):
    """A record as it was published, and media of it that the reader of its file does not read."""

    record: Any
    images: Sequence[Image]
    type: str
    unread: str = ""


@dataclass(frozen=True)
class Chunk(ABC):
    """Records of one file in a row; picklable, so that any process can read it.

    Args:
        source: the file.
        first: number of its first record in that file, from 0.
        done: share of all sources (0 to 1) that is read once this chunk is read.
        ids: of its records.
    """

    source: str
    first: int
    done: float
    ids: Sequence[str]

    def read(self) -> Iterator[Record | Skipped]:
        """One item for each record of the source, in order, with its image bytes.

        Raises:
            DataError: the file itself cannot be read, or what holds the images cannot.
        """
        for number, (id_, published) in enumerate(zip(self.ids, self._records(), strict=True), self.first):
            try:
                if published.unread:
                    raise UnusableError("unread media", published.unread)
                talk = conversation(published.record, len(published.images))
                images = [image.read() for image in published.images]
            except UnusableError as error:
                yield Skipped(id_, self.source, number, error.reason, error.detail)
            else:
                yield {"id": id_, "type": published.type, "conversation": talk, "images": images}

    @abstractmethod
    def _records(self) -> Iterable[Published]: ...


@dataclass(frozen=True)
class SourceFile:
    """A file to be read in chunks.

    Args:
        path: of the file.
        size: at most so many records a chunk.
        unique: an id -> the same, or another one if it was there before.
        done: share of this file that is read -> share of all sources.
    """

    path: Path
    size: int
    unique: Callable[[str], str]
    done: Callable[[float], float]

    def id(self, given: Any, number: int) -> str:
        """The id of a record, after the file if it has none of its own."""
        return self.unique(f"{self.path.name}:{number}" if given is None else str(given))


def require(package: str, what: str) -> None:
    """Raise a clear error where a package is not installed."""
    if find_spec(package) is None:
        raise MissingDependencyError(f"reading {what} needs {package}: pip install 'ssmvl[data]'")
