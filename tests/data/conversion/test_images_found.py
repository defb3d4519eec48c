"""Lookup of images in directories and zips by name, and exact reading of their bytes."""

from __future__ import annotations

import errno
import io
import os
import pickle
import random
import struct
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any
from unicodedata import normalize

import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmvl.data.conversion import images
from ssmvl.data.conversion.images import EntryError, ImageFolders, Place, damage, is_outside
from ssmvl.errors import DataError

ASCII = st.text(st.characters(codec="utf-8", exclude_characters="/\\:\0"), min_size=1, max_size=8)
NAMES = st.lists(ASCII.filter(lambda part: part not in (".", "..")), min_size=1, max_size=3).map("/".join)


def zipped(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as packed:
        for name, data in files.items():
            packed.writestr(name, data)
    return path


def read(folders: ImageFolders, name: str) -> bytes:
    location = folders.find(name)
    assert location, name
    return pickle.loads(pickle.dumps(location)).read()


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(NAMES, st.binary(max_size=300), min_size=1), st.sampled_from([0, 8]), st.binary(max_size=20))
def test_a_zip_returns_the_bytes_that_were_written(
    tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes], method: int, prefix: bytes
) -> None:
    path = zipped(tmp_path_factory.mktemp("zip") / "a.zip", files, method)
    path.write_bytes(prefix + path.read_bytes())  # offsets are relative to the start of the zip
    folders = ImageFolders([str(path)], Path("/nowhere"))
    assert {name: read(folders, name) for name in files} == files


def test_streamed_zips_with_zip64_fields_and_comments_are_read(tmp_path: Path) -> None:
    class Pipe(io.BytesIO):  # makes zipfile write sizes and checksum after the data
        def seekable(self) -> bool:
            return False

        def tell(self) -> int:
            raise OSError

    pipe = Pipe()
    with zipfile.ZipFile(pipe, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.comment = b"a comment"
        with packed.open(zipfile.ZipInfo("large.jpg"), "w", force_zip64=True) as entry:
            entry.write(b"abc" * 1_000)
        packed.mkdir("folder")
        packed.writestr("folder/é.jpg", b"def")
    (tmp_path / "a.zip").write_bytes(pipe.getvalue())
    folders = ImageFolders([str(tmp_path / "a.zip")], tmp_path)
    assert read(folders, "large.jpg") == b"abc" * 1_000
    assert read(folders, "folder/é.jpg") == b"def"
    assert folders.find("folder") is None
    assert folders.find("folder/") is None


def test_the_directory_of_a_zip_uses_little_memory(tmp_path: Path) -> None:
    total = 20_000
    path = zipped(tmp_path / "a.zip", {f"{n % 660:05}/{n % 660:05}{n:04}.jpg": b"" for n in range(total)})
    tracemalloc.start()
    folders = ImageFolders([str(path)], tmp_path)
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert read(folders, "00001/000010001.jpg") == b""
    assert used / total < 250


def test_the_longest_prefix_is_searched_first_and_the_default_last(tmp_path: Path) -> None:
    for name in ("coco/train2017/1.jpg", "coco/train2017/2.jpg", "coco/val/1.jpg", "gqa/1.jpg", "cocoa/1.jpg"):
        (tmp_path / "own" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "own" / name).write_bytes(b"own " + name.encode())
    with_folder = zipped(tmp_path / "coco.zip", {"coco/val/1.jpg": b"zip full", "train2017/1.jpg": b"zip rest"})
    without = zipped(tmp_path / "train.zip", {"1.jpg": b"longest"})
    folders = ImageFolders([f"coco={with_folder}", f"coco/train2017/={without}"], tmp_path / "own")
    assert read(folders, "coco/train2017/1.jpg") == b"longest"
    assert read(folders, "coco/train2017/2.jpg") == b"own coco/train2017/2.jpg"
    assert read(folders, "coco/val/1.jpg") == b"zip full"
    assert read(folders, "./gqa//1.jpg") == b"own gqa/1.jpg"
    assert read(folders, "cocoa/1.jpg") == b"own cocoa/1.jpg"
    assert folders.find("gqa/2.jpg") is None
    assert f"{with_folder} (for coco/)" in str(folders)
    assert str(tmp_path / "own") in str(folders)
    assert read(folders.with_default(tmp_path / "own" / "gqa"), "1.jpg") == b"own gqa/1.jpg"


def test_a_name_is_searched_without_and_with_its_prefix(tmp_path: Path) -> None:
    for name in ("rest/images/1.jpg", "full/gqa/images/2.jpg"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(name.encode())
    folders = ImageFolders([f"gqa={tmp_path / 'rest'}", f"gqa={tmp_path / 'full'}"], tmp_path)
    assert read(folders, "gqa/images/1.jpg") == b"rest/images/1.jpg"
    assert read(folders, "gqa/images/2.jpg") == b"full/gqa/images/2.jpg"


def test_directories_without_prefix_are_searched_in_order_before_the_default(tmp_path: Path) -> None:
    for name in ("VG=100K/1.jpg", "VG_100K_2/1.jpg", "VG_100K_2/2.jpg", "own/2.jpg", "own/3.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    folders = ImageFolders([str(tmp_path / "VG=100K"), f"={tmp_path / 'VG_100K_2'}"], tmp_path / "own")
    assert read(folders, "1.jpg") == b"VG=100K/1.jpg"
    assert read(folders, "2.jpg") == b"VG_100K_2/2.jpg"
    assert read(folders, "3.jpg") == b"own/3.jpg"
    assert folders.find("4.jpg") is None


@pytest.mark.parametrize("name", ["/etc/passwd", "../secret.jpg", "a/../../secret.jpg", "..", "//etc/passwd"])
def test_names_outside_of_the_directory_are_not_found(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    (tmp_path / "in" / "a").mkdir(parents=True)
    assert is_outside(name)
    assert ImageFolders([f"a={tmp_path / 'in'}"], tmp_path / "in").find(name) is None


@pytest.mark.parametrize("name", ["", ".", "a", "a\0b", "a" * 300])
def test_names_that_are_not_files_are_not_found(tmp_path: Path, name: str) -> None:
    (tmp_path / "a").mkdir()
    assert not is_outside(name)
    assert ImageFolders([], tmp_path).find(name) is None


def test_a_name_may_contain_dotdot_inside_the_directory(tmp_path: Path) -> None:
    (tmp_path / "b.jpg").write_bytes(b"b")
    assert read(ImageFolders([], tmp_path), "a/../b.jpg") == b"b"


@pytest.mark.parametrize("name", ["/etc/a.jpg", "../a.jpg", "a/../../b.jpg"])
def test_zips_with_entries_outside_of_their_root_are_rejected(tmp_path: Path, name: str) -> None:
    path = zipped(tmp_path / "evil.zip", {"good.jpg": b"", name: b""})
    with pytest.raises(DataError, match=r"evil\.zip: the entry .*is outside of the zip's root") as raised:
        ImageFolders([str(path)], tmp_path)
    assert repr(name) in str(raised.value)


@pytest.mark.parametrize("name", ["C:/a.jpg", "12:30.jpg", "a\\..\\b.jpg", "images\\a.jpg"])
def test_a_zip_entry_with_a_windows_path_costs_only_that_entry(tmp_path: Path, name: str) -> None:
    path = zipped(tmp_path / "a.zip", {"good.jpg": b"good", name: b"bad"})
    folders = ImageFolders([str(path)], tmp_path / "none")
    (tmp_path / "none").mkdir()
    assert read(folders, "good.jpg") == b"good"
    assert folders.find(name) is None


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("stored", ["NFC", "NFD"])
@pytest.mark.parametrize("in_zip", [True, False])
def test_names_are_found_in_either_unicode_normalization(tmp_path: Path, form: Any, stored: Any, in_zip: bool) -> None:
    name = normalize(stored, "café/Ünïcode.jpg")
    if in_zip:
        specs = [str(zipped(tmp_path / "a.zip", {name: b"x"}))]
    else:
        specs = [str(tmp_path / "images")]
        (tmp_path / "images" / name).parent.mkdir(parents=True)
        (tmp_path / "images" / name).write_bytes(b"x")
    assert read(ImageFolders(specs, tmp_path), normalize(form, name)) == b"x"


def test_absolute_names_are_found_below_a_directory_or_a_prefix(tmp_path: Path) -> None:
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco" / "a.jpg").write_bytes(b"a")
    (tmp_path / "secret.jpg").write_bytes(b"s")
    folders = ImageFolders([str(tmp_path / "coco"), f"/data/train={tmp_path / 'coco'}"], tmp_path / "coco")
    assert read(folders, f"{tmp_path}/coco/a.jpg") == b"a"
    assert read(folders, "/data/train/a.jpg") == b"a"
    for name in (f"{tmp_path}/secret.jpg", f"{tmp_path}/coco/../secret.jpg", "/data/train/../secret.jpg", "/a.jpg"):
        assert folders.find(name) is None


def test_a_symlink_loop_is_a_missing_image(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").symlink_to("b.jpg")
    (tmp_path / "b.jpg").symlink_to("a.jpg")
    assert ImageFolders([], tmp_path).find("a.jpg") is None


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_images_over_the_pixel_limit_are_found_without_decoding(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.BytesIO()
    PIL.Image.new("L", (30, 20)).save(file, kind)
    assert damage(file.getvalue()) == ""
    monkeypatch.setattr(images, "MAX_PIXELS", 599)
    assert damage(file.getvalue()) == "30 x 20 pixels; at most 599 are allowed"


def test_encrypted_and_unsupported_compressed_entries_are_rejected(tmp_path: Path) -> None:
    path = zipped(tmp_path / "a.zip", {"a.jpg": b"abc"})
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\1\2") + 8] |= 1
    (tmp_path / "locked.zip").write_bytes(data)
    with pytest.raises(DataError, match=r"locked\.zip: the entry 'a\.jpg' is encrypted"):
        ImageFolders([str(tmp_path / "locked.zip")], tmp_path)
    zipped(tmp_path / "bzip.zip", {"a.jpg": b"abc"}, zipfile.ZIP_BZIP2)
    with pytest.raises(DataError, match=r"bzip\.zip: the entry 'a\.jpg' has compression method 12"):
        ImageFolders([str(tmp_path / "bzip.zip")], tmp_path)


def test_a_path_that_is_neither_directory_nor_zip_is_reported(tmp_path: Path) -> None:
    path = zipped(tmp_path / "cut.zip", {f"{n}.jpg": b"abc" * 100 for n in range(20)})
    path.write_bytes(path.read_bytes()[:-700])
    (tmp_path / "a.txt").write_text("text")
    for name, message in (
        ("cut.zip", "neither"),
        ("a.txt", "neither"),
        ("b.zip", "the image directory or zip .* does not exist"),
    ):
        with pytest.raises(DataError, match=message) as raised:
            ImageFolders([f"coco={tmp_path / name}"], tmp_path)
        assert name in str(raised.value)


def test_damage_in_a_zip_is_reported_with_file_and_offset(tmp_path: Path) -> None:
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        path = zipped(tmp_path / "a.zip", {"a.jpg": b"", "b.jpg": bytes(range(256)) * 9}, method)
        location = ImageFolders([str(path)], tmp_path).find("b.jpg")
        assert location
        assert location.size
        original = path.read_bytes()
        for at, message in ((location.offset + 50, "checksum|decompressed"), (location.offset, "no entry begins")):
            path.write_bytes(original[:at] + bytes([original[at] ^ 255]) + original[at + 1 :])
            with pytest.raises(DataError, match=message) as raised:
                location.read()
            assert f"{path}" in str(raised.value)
            assert f"offset {location.offset}" in str(raised.value)
        path.write_bytes(original[: location.offset + 60])
        with pytest.raises(DataError, match=f"ends at byte {location.offset + 60}"):
            location.read()


def test_reading_a_byte_range_and_a_complete_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"0123456789")
    assert Place(tmp_path / "a").read() == b"0123456789"
    assert Place(tmp_path / "a", 2, 3).read() == b"234"
    with pytest.raises(EntryError, match="ends at byte 10, expected 5 bytes at offset 8"):
        Place(tmp_path / "a", 8, 5).read()
    with pytest.raises(FileNotFoundError):
        Place(tmp_path / "b").read()
    with pytest.raises(DataError, match="cannot be read") as raised:
        Place(tmp_path).read()
    assert not isinstance(raised.value, EntryError)


def test_a_directory_or_zip_that_no_longer_exists_raises(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(b"a")
    packed = zipped(tmp_path / "a.zip", {"b.jpg": b"b"})
    folders = ImageFolders([str(packed)], tmp_path / "in")
    locations = folders.find("a.jpg"), folders.find("b.jpg")
    assert folders.find("c.jpg") is None
    (tmp_path / "in").rename(tmp_path / "away")
    packed.unlink()
    for location, name in zip(locations, ("in", "a.zip"), strict=True):
        assert location
        with pytest.raises(DataError, match=rf"{name} no longer exists; restore it and run the same command again"):
            location.read()
    with pytest.raises(DataError, match="in no longer exists; restore it"):
        folders.find("a.jpg")


def test_a_disk_error_is_not_a_missing_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(Path, "stat", fail)
    with pytest.raises(DataError, match=rf"a\.jpg cannot be accessed .*{os.strerror(errno.EIO)}"):
        ImageFolders([], tmp_path).find("a.jpg")


def test_entries_beyond_the_end_of_a_zip_are_rejected(tmp_path: Path) -> None:
    original = zipped(tmp_path / "a.zip", {"a.jpg": bytes(300), "b.jpg": bytes(300)}).read_bytes()
    directory = original.index(b"PK\1\2")
    name = directory + 46
    wide = struct.pack("<HHQQQ", 1, 24, 300, 1 << 45, (1 << 63) + 5)
    header = bytearray(original[directory : name + 5])
    header[20:28], header[42:46], header[30:32] = b"\xff" * 8, b"\xff" * 4, struct.pack("<H", len(wide))
    end = bytearray(original[name + 5 :])
    at = end.index(b"PK\5\6")
    end[at + 12 : at + 16] = struct.pack("<I", len(header) + len(wide) + at)
    large = bytearray(original)
    large[directory + 20 : directory + 24] = struct.pack("<I", 5_000)
    for data in (original[100:], original[:directory] + header + wide + end, large):
        (tmp_path / "b.zip").write_bytes(data)
        with pytest.raises(
            DataError, match=r"b\.zip: the entry 'a\.jpg', .* is outside of the zip; the zip is truncated or damaged"
        ):
            ImageFolders([str(tmp_path / "b.zip")], tmp_path)


@pytest.mark.parametrize("seed", range(4))
def test_any_damage_of_a_zip_directory_is_reported_or_harmless(tmp_path: Path, seed: int) -> None:
    original = zipped(tmp_path / "a.zip", {"a.jpg": bytes(300), "b.jpg": bytes(300)}).read_bytes()
    rng, start, rejected = random.Random(seed), original.index(b"PK\1\2"), 0
    for _ in range(300):
        data = bytearray(original)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(start, len(data))] = rng.choice([0, 255, rng.randrange(256)])
        (tmp_path / "b.zip").write_bytes(data)
        try:
            folders = ImageFolders([str(tmp_path / "b.zip")], tmp_path)
            assert all(len(image.read()) <= 300 for name in ("a.jpg", "b.jpg") if (image := folders.find(name)))
        except DataError:
            rejected += 1
    assert rejected
