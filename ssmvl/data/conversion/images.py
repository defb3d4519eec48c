"""Image bytes in files, zips and tars: lookup by name, reading, and a check for damage."""

from __future__ import annotations

import copy
import errno
import os
import posixpath
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple
from unicodedata import normalize

from ssmvl.errors import DataError
from ssmvl.processing.image_decoding import MAX_PIXELS, PNG, opened, read_image

LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip entry: signature, lengths of name and extra field
ENTRY = struct.Struct("<QQBI")  # stored fields of a zip entry: offset, size, method, crc
MAX_DECOMPRESSED = 1 << 29  # bytes; no image is larger
TAIL = 4096  # bytes at the end that are searched for an end marker: some cameras write data after it
GRAY_16, GRAY_16_OFFSET = b"\x10\0", 24  # bit depth and color type in a PNG header; such values may be out of range
MISSING = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)  # other errors are disk errors


class EntryError(DataError):
    """Damaged bytes of one image. Other images may still be readable."""


class Place(NamedTuple):
    """Location of the bytes of one file.

    Args:
        path: the file itself, or the zip or tar that contains it.
        offset: of the bytes; with `crc`, of the entry's local header in a zip.
        size: number of stored bytes; None for all of `path`.
        deflated: the bytes are compressed.
        crc: of the decompressed bytes.
    """

    path: Path
    offset: int = 0
    size: int | None = None
    deflated: bool = False
    crc: int | None = None

    def read(self) -> bytes:
        """Return the decompressed bytes.

        Raises:
            FileNotFoundError: the file itself does not exist, but its directory does.
            EntryError: the bytes are truncated or damaged; names file and offset.
            DataError: the zip, the tar or the file's directory no longer exists, or the disk has an error.
        """
        try:
            if self.size is None:
                return self.path.read_bytes()
            with self.path.open("rb", buffering=0) as file:
                data = self._read_stored(file.fileno(), self.size)
        except FileNotFoundError as error:
            container = self.path.parent if self.size is None else self.path
            if container.is_dir():
                raise
            raise _missing_error(container) from error
        except OSError as error:
            raise DataError(f"{self.path} cannot be read at offset {self.offset} ({error})") from error
        try:
            if self.deflated:
                decompressor = zlib.decompressobj(-zlib.MAX_WBITS)
                data = decompressor.decompress(data, MAX_DECOMPRESSED)
                if decompressor.unconsumed_tail:
                    raise EntryError(
                        f"{self.path}: the entry at offset {self.offset} has more than {MAX_DECOMPRESSED:,} bytes"
                    )
        except zlib.error as error:
            raise EntryError(
                f"{self.path}: the entry at offset {self.offset} cannot be decompressed ({error})"
            ) from error
        if self.crc not in (None, zlib.crc32(data)):
            raise EntryError(
                f"{self.path}: the checksum of the entry at offset {self.offset} does not match the zip's directory"
            )
        return data

    def _read_stored(self, file: int, size: int) -> bytes:
        start = self.offset
        if self.crc is not None:
            header = os.pread(file, LOCAL_HEADER.size, start)
            if len(header) < LOCAL_HEADER.size or not header.startswith(b"PK\3\4"):
                raise EntryError(
                    f"{self.path}: no entry begins at offset {start}, although the zip's directory lists one"
                )
            start += LOCAL_HEADER.size + sum(LOCAL_HEADER.unpack(header)[1:])
        data = os.pread(file, size, start)
        if len(data) < size:
            raise EntryError(f"{self.path} ends at byte {start + len(data)}, expected {size} bytes at offset {start}")
        return data


class ImageFolders:
    """Directories and zips that are searched for the image names in records.

    Args:
        specs: each `PATH`, or `PREFIX=PATH` for names that begin with the directory PREFIX. A PATH with a prefix is
            searched for the name without the prefix, then with it. The longest prefix comes first, then the given
            order.
        default: directory that is searched last.

    Raises:
        DataError: a path is neither a directory nor a zip, or a zip is damaged or has unsupported entries.
    """

    def __init__(self, specs: Sequence[str], default: Path) -> None:
        pairs = [prefix_and_path(spec) for spec in specs]
        opened = [(prefix, _Folder(path) if path.is_dir() else _Zip(path)) for prefix, path in pairs]
        self._specified: list[tuple[str, _Folder | _Zip]] = sorted(opened, key=lambda pair: -len(pair[0]))
        self._searched = [*self._specified, ("", _Folder(default))]

    def with_default(self, default: Path) -> ImageFolders:
        """Return a copy with another default. Zips are not read again."""
        other = copy.copy(self)
        other._searched = [*self._specified, ("", _Folder(default))]
        return other

    def find(self, name: str) -> Place | None:
        """Return the location of an image; None if it is not found or its name is not allowed (see `is_outside`).

        An absolute name is found if it is in one of the directories, or if it begins with a PREFIX.

        Raises:
            DataError: a directory no longer exists or cannot be searched.
        """
        name = posixpath.normpath(name)
        if name.startswith("/"):
            return self._find_absolute(name)
        if is_outside(name):
            return None
        for prefix, container in self._searched:
            if name.startswith(prefix):
                for relative in dict.fromkeys((name[len(prefix) :], name)):
                    if location := container.find(relative):
                        return location
        return None

    def _find_absolute(self, name: str) -> Place | None:
        for prefix, container in self._searched:
            roots = [f"/{prefix}"] if prefix else []
            if isinstance(container, _Folder):
                roots.append(f"{container.path.absolute()}/")
            for root in roots:
                if name.startswith(root) and (location := container.find(name.removeprefix(root))):
                    return location
        return None

    def __str__(self) -> str:
        return ", ".join(
            f"{container.path}" + (f" (for {prefix})" if prefix else "") for prefix, container in self._searched
        )


class _Folder:
    def __init__(self, path: Path) -> None:
        self.path = path

    def find(self, name: str) -> Place | None:
        for form in unicode_forms(name):
            path = Path(f"{self.path}/{form}")
            try:
                if stat.S_ISREG(path.stat().st_mode):
                    return Place(path)
            except ValueError:  # such a name cannot exist, e.g. one with a null byte
                return None
            except OSError as error:
                if error.errno not in MISSING:
                    raise DataError(f"{path} cannot be accessed ({error})") from error
        if not self.path.is_dir():
            raise _missing_error(self.path)
        return None


class _Zip:
    """The directory of a zip, in about 205 bytes per entry: published zips have 558,000 entries."""

    def __init__(self, path: Path) -> None:
        self.path, self.entries = path, dict[str, bytes]()
        try:
            with zipfile.ZipFile(path) as opened:
                entries = opened.infolist()
            self.size = path.stat().st_size
        except FileNotFoundError as error:
            raise DataError(f"the image directory or zip {path} does not exist") from error
        except Exception as error:  # zipfile raises many types for a damaged directory
            raise DataError(f"{path} is neither a directory nor a complete zip ({error})") from error
        for entry in entries:
            self._add(entry)

    def _add(self, entry: zipfile.ZipInfo) -> None:
        name = posixpath.normpath(entry.filename)
        if is_outside(name):
            raise DataError(
                f"{self.path}: the entry {entry.filename!r} is outside of the zip's root; such a zip is rejected"
            )
        if "\\" in name or ":" in name.split("/", maxsplit=1)[0]:
            return  # a Windows path, which may be outside
        if entry.flag_bits & 1:
            raise DataError(
                f"{self.path}: the entry {entry.filename!r} is encrypted; only unencrypted zips are supported"
            )
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise DataError(
                f"{self.path}: the entry {entry.filename!r} has compression method {entry.compress_type}; "
                "allowed: 0 (stored), 8 (deflated)"
            )
        if not 0 <= entry.header_offset <= entry.header_offset + entry.compress_size <= self.size:
            raise DataError(
                f"{self.path}: the entry {entry.filename!r}, {entry.compress_size} bytes at offset "
                f"{entry.header_offset}, is outside of the zip; the zip is truncated or damaged"
            )
        if not entry.filename.endswith("/"):  # is_dir() fails for an empty name
            self.entries[name] = ENTRY.pack(entry.header_offset, entry.compress_size, entry.compress_type, entry.CRC)

    def find(self, name: str) -> Place | None:
        entry = next((self.entries[form] for form in unicode_forms(name) if form in self.entries), None)
        if entry is None:
            return None
        offset, size, method, crc = ENTRY.unpack(entry)
        return Place(self.path, offset, size, method == zipfile.ZIP_DEFLATED, crc)


def unicode_forms(name: str) -> Iterable[str]:
    """The name as it is, composed and decomposed: macOS writes `é` into zips as `e` and an accent."""
    return (name,) if name.isascii() else dict.fromkeys((name, *(normalize(form, name) for form in ("NFC", "NFD"))))


def is_outside(name: str) -> bool:
    """Return True for an absolute name, and for one that leaves its directory through `..`."""
    name = posixpath.normpath(name)
    return name.startswith(("/", "../")) or name == ".."


def _missing_error(path: Path) -> DataError:
    return DataError(f"{path} no longer exists; restore it and run the same command again")


def prefix_and_path(spec: str) -> tuple[str, Path]:
    """Split `PREFIX=PATH` into "PREFIX/" and the path. The prefix of a plain PATH is empty."""
    prefix, equals, path = spec.partition("=")
    if not equals or Path(spec).exists():
        return "", Path(spec)
    return f"{prefix.strip('/')}/".lstrip("/"), Path(path).expanduser()


def damage(data: bytes) -> str:
    """Return what is wrong with the bytes of an image, or an empty string.

    A JPEG, PNG or GIF with its end marker near the end, and a WebP of the size in its header, are accepted without
    decoding, unless the header states more than `MAX_PIXELS` pixels. All others are decoded and accepted if that
    succeeds: bytes may follow the end marker.
    """
    if not data:
        return "empty"
    tail = data[-TAIL:]
    if data.startswith(b"\xff\xd8\xff"):
        kind, complete = "JPEG", b"\xff\xd9" in tail
    elif data.startswith(PNG):
        has_end = b"IEND\xae\x42\x60\x82" in tail
        kind, complete = "PNG", has_end and not data.startswith(GRAY_16, GRAY_16_OFFSET)
    elif data.startswith((b"GIF87a", b"GIF89a")):
        kind, complete = "GIF", tail.rstrip(b"\0").endswith(b";")
    elif data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        kind, complete = "WebP", len(data) >= int.from_bytes(data[4:8], "little") + 8
    else:
        kind, complete = "image", False
    try:
        if not complete:
            read_image(data)
        else:
            with opened(data) as image:
                if image.width * image.height > MAX_PIXELS:
                    return f"{image.width} x {image.height} pixels; at most {MAX_PIXELS:,} are allowed"
    except DataError as error:
        reason = str(error).removeprefix("image bytes: ")
        return f"not a valid {kind} ({len(data)} bytes, beginning with {data[:16]!r}): {reason}"
    return ""
