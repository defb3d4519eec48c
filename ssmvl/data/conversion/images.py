"""Image bytes in files, zips and tars: lookup by name, reading, and a check that they are complete."""

from __future__ import annotations

import copy
import errno
import os
import posixpath
import stat
import struct
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ssmvl.errors import DataError
from ssmvl.processing.image_decoding import PNG, read_image

LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip's entry: signature, lengths of its name and of its extra field
ENTRY = struct.Struct("<QQBI")  # what is kept of a zip's entry: offset, size, method, crc
MAX_INFLATED = 1 << 29  # bytes; an entry that grows beyond them is no image
TAIL = 4096  # bytes at the end in which a marker is looked for: some cameras write on after it
GREY_16, GREY_16_AT = b"\x10\0", 24  # bit depth and colour type in a PNG's header; its values may be out of range
NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)  # other errors are trouble of the disk


class EntryError(DataError):
    """The bytes of one image are damaged; the others may be whole."""


class Place(NamedTuple):
    """Where the bytes of one file lie.

    Args:
        path: a whole file, or a zip or tar.
        offset: of the bytes; with `crc`, of the entry's local header in a zip.
        size: number of bytes as they lie there; None for the whole file.
        deflated: the bytes are compressed.
        crc: of the bytes once inflated.
    """

    path: Path
    offset: int = 0
    size: int | None = None
    deflated: bool = False
    crc: int | None = None

    def read(self) -> bytes:
        """The bytes.

        Raises:
            FileNotFoundError: this one whole file is not there.
            EntryError: the bytes end too early, or are damaged; names file and offset.
            DataError: nothing can be read: the zip, the tar or the file's folder is gone, or the disk has trouble.
        """
        try:
            if self.size is None:
                return self.path.read_bytes()
            with self.path.open("rb", buffering=0) as file:
                data = self._stretch(file.fileno(), self.size)
        except FileNotFoundError as error:
            holder = self.path.parent if self.size is None else self.path
            if holder.is_dir():
                raise
            raise _gone(holder) from error
        except OSError as error:
            raise DataError(f"{self.path} cannot be read at offset {self.offset} ({error})") from error
        try:
            if self.deflated:
                inflating = zlib.decompressobj(-zlib.MAX_WBITS)
                data = inflating.decompress(data, MAX_INFLATED)
                if inflating.unconsumed_tail:
                    raise EntryError(
                        f"{self.path}: the entry at offset {self.offset} has more than {MAX_INFLATED:,} bytes"
                    )
        except zlib.error as error:
            raise EntryError(f"{self.path}: the entry at offset {self.offset} cannot be inflated ({error})") from error
        if self.crc not in (None, zlib.crc32(data)):
            raise EntryError(
                f"{self.path}: the entry at offset {self.offset} does not have the checksum in its directory"
            )
        return data

    def _stretch(self, file: int, size: int) -> bytes:
        start = self.offset
        if self.crc is not None:
            header = os.pread(file, LOCAL_HEADER.size, start)
            if len(header) < LOCAL_HEADER.size or not header.startswith(b"PK\3\4"):
                raise EntryError(f"{self.path}: no entry begins at offset {start}, where the zip's directory has one")
            start += LOCAL_HEADER.size + sum(LOCAL_HEADER.unpack(header)[1:])
        data = os.pread(file, size, start)
        if len(data) < size:
            raise EntryError(f"{self.path} ends at byte {start + len(data)}; {size} bytes should lie at offset {start}")
        return data


class ImageFolders:
    """Folders and zips in which images are looked up by the name that a record gives.

    Args:
        specs: each `PATH`, or `PREFIX=PATH` for the names that begin with the folder PREFIX. In a PATH with a prefix a
            name is looked for without the prefix, then with it; the longest prefix comes first, then the order given.
        default: a folder that is looked in last.

    Raises:
        DataError: a path is neither a folder nor a zip, or the zip is damaged or holds what is not read from it.
    """

    def __init__(self, specs: Sequence[str], default: Path) -> None:
        pairs = [prefix_and_path(spec) for spec in specs]
        opened = [(prefix, _Folder(path) if path.is_dir() else _Zip(path)) for prefix, path in pairs]
        self._given: list[tuple[str, _Folder | _Zip]] = sorted(opened, key=lambda pair: -len(pair[0]))
        self._searched = [*self._given, ("", _Folder(default))]

    def beside(self, default: Path) -> ImageFolders:
        """The same folders and zips, not read again, with another default."""
        other = copy.copy(self)
        other._searched = [*self._given, ("", _Folder(default))]
        return other

    def find(self, name: str) -> Place | None:
        """Where the image of this name lies; None if it is nowhere, or the name leaves the folder (see `leaves`).

        Raises:
            DataError: a folder is gone or cannot be looked into.
        """
        name = posixpath.normpath(name)
        if leaves(name):
            return None
        for prefix, place in self._searched:
            if name.startswith(prefix):
                for inside in dict.fromkeys((name[len(prefix) :], name)):
                    if found := place.find(inside):
                        return found
        return None

    def __str__(self) -> str:
        return ", ".join(f"{place.path}" + (f" (for {prefix})" if prefix else "") for prefix, place in self._searched)


class _Folder:
    def __init__(self, path: Path) -> None:
        self.path = path

    def find(self, name: str) -> Place | None:
        path = Path(f"{self.path}/{name}")
        try:
            if stat.S_ISREG(path.stat().st_mode):
                return Place(path)
        except ValueError:  # no file can have this name
            return None
        except OSError as error:
            if error.errno not in NOT_THERE:
                raise DataError(f"{path} cannot be looked for ({error})") from error
        if not self.path.is_dir():
            raise _gone(self.path)
        return None


class _Zip:
    """The directory of a zip, in some 205 bytes an entry: the papers' have 558,000."""

    def __init__(self, path: Path) -> None:
        self.path, self.entries = path, dict[str, bytes]()
        try:
            with zipfile.ZipFile(path) as opened:
                entries = opened.infolist()
            self.size = path.stat().st_size
        except FileNotFoundError as error:
            raise DataError(f"images are looked for in {path}, but there is no such folder or zip") from error
        except Exception as error:  # a damaged directory may make zipfile raise anything
            raise DataError(
                f"{path}: images are read from a folder or a whole zip, this is neither ({error})"
            ) from error
        for entry in entries:
            self._keep(entry)

    def _keep(self, entry: zipfile.ZipInfo) -> None:
        name = posixpath.normpath(entry.filename)
        if leaves(name) or "\\" in name or ":" in name.split("/", maxsplit=1)[0]:
            raise DataError(
                f"{self.path}: the entry {entry.filename!r} leaves the folder it is in; such a zip is not read"
            )
        if entry.flag_bits & 1:
            raise DataError(f"{self.path}: the entry {entry.filename!r} is encrypted; only plain entries are read")
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise DataError(
                f"{self.path}: the entry {entry.filename!r} has the compression method {entry.compress_type}; "
                "0 (stored) and 8 (deflated) are read"
            )
        if not 0 <= entry.header_offset <= entry.header_offset + entry.compress_size <= self.size:
            raise DataError(
                f"{self.path}: the entry {entry.filename!r}, {entry.compress_size} bytes at offset "
                f"{entry.header_offset}, lies outside of the zip: it is cut or damaged"
            )
        if not entry.filename.endswith("/"):  # is_dir() fails where there is no name
            self.entries[name] = ENTRY.pack(entry.header_offset, entry.compress_size, entry.compress_type, entry.CRC)

    def find(self, name: str) -> Place | None:
        if (entry := self.entries.get(name)) is None:
            return None
        offset, size, method, crc = ENTRY.unpack(entry)
        return Place(self.path, offset, size, method == zipfile.ZIP_DEFLATED, crc)


def leaves(name: str) -> bool:
    """Whether a name is absolute, or leaves the folder it is in through `..`."""
    name = posixpath.normpath(name)
    return name.startswith(("/", "../")) or name == ".."


def _gone(path: Path) -> DataError:
    return DataError(f"{path} is gone; make it available and run the same command again")


def prefix_and_path(spec: str) -> tuple[str, Path]:
    """`PREFIX=PATH` -> "PREFIX/" and the path; a PATH alone has no prefix."""
    prefix, equals, path = spec.partition("=")
    if not equals or Path(spec).exists():
        return "", Path(spec)
    return f"{prefix.strip('/')}/".lstrip("/"), Path(path).expanduser()


def damage(data: bytes) -> str:
    """Return why the bytes of an image cannot be used, or an empty string.

    A JPEG, PNG or GIF with its end marker near the end, and a WebP of the size in its header, are taken as whole
    without decoding. All others are decoded, so that whatever decodes is kept: bytes may follow the end marker.
    """
    if not data:
        return "empty"
    tail = data[-TAIL:]
    if data.startswith(b"\xff\xd8\xff"):
        kind, whole = "JPEG", b"\xff\xd9" in tail
    elif data.startswith(PNG):
        kind, whole = "PNG", b"IEND\xae\x42\x60\x82" in tail and not data.startswith(GREY_16, GREY_16_AT)
    elif data.startswith((b"GIF87a", b"GIF89a")):
        kind, whole = "GIF", tail.rstrip(b"\0").endswith(b";")
    elif data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        kind, whole = "WebP", len(data) >= int.from_bytes(data[4:8], "little") + 8
    else:
        kind, whole = "image", False
    if whole:
        return ""
    try:
        read_image(data)
    except DataError as error:
        why = str(error).removeprefix("image bytes: ")
        return f"no usable {kind}, {len(data)} bytes that begin with {data[:16]!r}: {why}"
    return ""
