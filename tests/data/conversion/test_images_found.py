"""Image bytes are found under the right name and read exactly."""

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

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmvl.data.conversion.images import EntryError, ImageFolders, Place, leaves
from ssmvl.errors import DataError

ASCII = st.text(st.characters(codec="utf-8", exclude_characters="/\\:\0"), min_size=1, max_size=8)
NAMES = st.lists(ASCII.filter(lambda part: part not in (".", "..")), min_size=1, max_size=3).map("/".join)


def zipped(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as packed:
        for name, data in files.items():
            packed.writestr(name, data)
    return path


def found(folders: ImageFolders, name: str) -> bytes:
    place = folders.find(name)
    assert place, name
    return pickle.loads(pickle.dumps(place)).read()


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(NAMES, st.binary(max_size=300), min_size=1), st.sampled_from([0, 8]), st.binary(max_size=20))
def test_a_zip_gives_the_bytes_it_was_made_of(
    tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes], method: int, before: bytes
) -> None:
    path = zipped(tmp_path_factory.mktemp("zip") / "a.zip", files, method)
    path.write_bytes(before + path.read_bytes())  # offsets count from where the zip begins
    folders = ImageFolders([str(path)], Path("/nowhere"))
    assert {name: found(folders, name) for name in files} == files


def test_zips_written_as_streams_with_large_fields_and_comments_are_read(tmp_path: Path) -> None:
    class Pipe(io.BytesIO):  # sizes and checksum then come after the data
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
    assert found(folders, "large.jpg") == b"abc" * 1_000
    assert found(folders, "folder/é.jpg") == b"def"
    assert folders.find("folder") is None
    assert folders.find("folder/") is None


def test_a_directory_of_a_zip_is_small(tmp_path: Path) -> None:
    total = 20_000
    path = zipped(tmp_path / "a.zip", {f"{n % 660:05}/{n % 660:05}{n:04}.jpg": b"" for n in range(total)})
    tracemalloc.start()
    folders = ImageFolders([str(path)], tmp_path)
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found(folders, "00001/000010001.jpg") == b""
    assert used / total < 250


def test_the_longest_prefix_comes_first_and_the_rest_is_the_default(tmp_path: Path) -> None:
    for name in ("coco/train2017/1.jpg", "coco/train2017/2.jpg", "coco/val/1.jpg", "gqa/1.jpg", "cocoa/1.jpg"):
        (tmp_path / "own" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "own" / name).write_bytes(b"own " + name.encode())
    with_folder = zipped(tmp_path / "coco.zip", {"coco/val/1.jpg": b"zip whole", "train2017/1.jpg": b"zip rest"})
    without = zipped(tmp_path / "train.zip", {"1.jpg": b"longest"})
    folders = ImageFolders([f"coco={with_folder}", f"coco/train2017/={without}"], tmp_path / "own")
    assert found(folders, "coco/train2017/1.jpg") == b"longest"
    assert found(folders, "coco/train2017/2.jpg") == b"own coco/train2017/2.jpg"
    assert found(folders, "coco/val/1.jpg") == b"zip whole"
    assert found(folders, "./gqa//1.jpg") == b"own gqa/1.jpg"
    assert found(folders, "cocoa/1.jpg") == b"own cocoa/1.jpg"
    assert folders.find("gqa/2.jpg") is None
    assert f"{with_folder} (for coco/)" in str(folders)
    assert str(tmp_path / "own") in str(folders)
    assert found(folders.beside(tmp_path / "own" / "gqa"), "1.jpg") == b"own gqa/1.jpg"


def test_a_prefixed_folder_holds_the_rest_or_the_whole_name(tmp_path: Path) -> None:
    for name in ("rest/images/1.jpg", "whole/gqa/images/2.jpg"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(name.encode())
    folders = ImageFolders([f"gqa={tmp_path / 'rest'}", f"gqa={tmp_path / 'whole'}"], tmp_path)
    assert found(folders, "gqa/images/1.jpg") == b"rest/images/1.jpg"
    assert found(folders, "gqa/images/2.jpg") == b"whole/gqa/images/2.jpg"


def test_several_folders_without_prefix_are_searched_in_order_and_then_the_default(tmp_path: Path) -> None:
    for name in ("VG=100K/1.jpg", "VG_100K_2/1.jpg", "VG_100K_2/2.jpg", "own/2.jpg", "own/3.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    folders = ImageFolders([str(tmp_path / "VG=100K"), f"={tmp_path / 'VG_100K_2'}"], tmp_path / "own")
    assert found(folders, "1.jpg") == b"VG=100K/1.jpg"
    assert found(folders, "2.jpg") == b"VG_100K_2/2.jpg"
    assert found(folders, "3.jpg") == b"own/3.jpg"
    assert folders.find("4.jpg") is None


@pytest.mark.parametrize("name", ["/etc/passwd", "../secret.jpg", "a/../../secret.jpg", "..", "//etc/passwd"])
def test_names_that_leave_the_folder_find_nothing(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    (tmp_path / "in" / "a").mkdir(parents=True)
    assert leaves(name)
    assert ImageFolders([f"a={tmp_path / 'in'}"], tmp_path / "in").find(name) is None


@pytest.mark.parametrize("name", ["", ".", "a", "a\0b", "a" * 300])
def test_names_that_are_no_file_find_nothing(tmp_path: Path, name: str) -> None:
    (tmp_path / "a").mkdir()
    assert not leaves(name)
    assert ImageFolders([], tmp_path).find(name) is None


def test_a_name_may_go_up_inside_the_folder(tmp_path: Path) -> None:
    (tmp_path / "b.jpg").write_bytes(b"b")
    assert found(ImageFolders([], tmp_path), "a/../b.jpg") == b"b"


@pytest.mark.parametrize("name", ["/etc/a.jpg", "../a.jpg", "a/../../b.jpg", "C:/a.jpg", "a\\..\\b.jpg"])
def test_zips_with_names_that_leave_are_refused(tmp_path: Path, name: str) -> None:
    path = zipped(tmp_path / "evil.zip", {"good.jpg": b"", name: b""})
    with pytest.raises(DataError, match=r"evil\.zip: the entry .*leaves the folder") as raised:
        ImageFolders([str(path)], tmp_path)
    assert repr(name) in str(raised.value)


def test_encrypted_and_oddly_compressed_entries_are_refused(tmp_path: Path) -> None:
    path = zipped(tmp_path / "a.zip", {"a.jpg": b"abc"})
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\1\2") + 8] |= 1
    (tmp_path / "locked.zip").write_bytes(data)
    with pytest.raises(DataError, match=r"locked\.zip: the entry 'a\.jpg' is encrypted"):
        ImageFolders([str(tmp_path / "locked.zip")], tmp_path)
    zipped(tmp_path / "bzip.zip", {"a.jpg": b"abc"}, zipfile.ZIP_BZIP2)
    with pytest.raises(DataError, match=r"bzip\.zip: the entry 'a\.jpg' has the compression method 12"):
        ImageFolders([str(tmp_path / "bzip.zip")], tmp_path)


def test_what_is_neither_folder_nor_zip_is_named(tmp_path: Path) -> None:
    path = zipped(tmp_path / "cut.zip", {f"{n}.jpg": b"abc" * 100 for n in range(20)})
    path.write_bytes(path.read_bytes()[:-700])
    (tmp_path / "a.txt").write_text("text")
    for name, message in (("cut.zip", "neither"), ("a.txt", "neither"), ("b.zip", "no such folder or zip")):
        with pytest.raises(DataError, match=message) as raised:
            ImageFolders([f"coco={tmp_path / name}"], tmp_path)
        assert name in str(raised.value)


def test_damage_inside_a_zip_names_file_and_offset(tmp_path: Path) -> None:
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        path = zipped(tmp_path / "a.zip", {"a.jpg": b"", "b.jpg": bytes(range(256)) * 9}, method)
        place = ImageFolders([str(path)], tmp_path).find("b.jpg")
        assert place
        assert place.size
        whole = path.read_bytes()
        for at, message in ((place.offset + 50, "checksum|inflated"), (place.offset, "no entry begins")):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
            with pytest.raises(DataError, match=message) as raised:
                place.read()
            assert f"{path}" in str(raised.value)
            assert f"offset {place.offset}" in str(raised.value)
        path.write_bytes(whole[: place.offset + 60])
        with pytest.raises(DataError, match=f"ends at byte {place.offset + 60}"):
            place.read()


def test_a_stretch_of_a_file_and_a_whole_one(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"0123456789")
    assert Place(tmp_path / "a").read() == b"0123456789"
    assert Place(tmp_path / "a", 2, 3).read() == b"234"
    with pytest.raises(EntryError, match="ends at byte 10; 5 bytes should lie at offset 8"):
        Place(tmp_path / "a", 8, 5).read()
    with pytest.raises(FileNotFoundError):
        Place(tmp_path / "b").read()
    with pytest.raises(DataError, match="cannot be read") as raised:
        Place(tmp_path).read()
    assert not isinstance(raised.value, EntryError)


def test_a_folder_or_zip_that_is_gone_stops_the_reading(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(b"a")
    packed = zipped(tmp_path / "a.zip", {"b.jpg": b"b"})
    folders = ImageFolders([str(packed)], tmp_path / "in")
    places = folders.find("a.jpg"), folders.find("b.jpg")
    assert folders.find("c.jpg") is None
    (tmp_path / "in").rename(tmp_path / "away")
    packed.unlink()
    for place, name in zip(places, ("in", "a.zip"), strict=True):
        assert place
        with pytest.raises(DataError, match=rf"{name} is gone; make it available and run the same command again"):
            place.read()
    with pytest.raises(DataError, match="in is gone; make it available"):
        folders.find("a.jpg")


def test_trouble_of_the_disk_is_no_missing_image(tmp_path: Path) -> None:
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    with pytest.raises(DataError, match=rf"loop\.jpg cannot be looked for .*{os.strerror(errno.ELOOP)}"):
        ImageFolders([], tmp_path).find("loop.jpg")


def test_entries_outside_of_a_zip_are_refused(tmp_path: Path) -> None:
    whole = zipped(tmp_path / "a.zip", {"a.jpg": bytes(300), "b.jpg": bytes(300)}).read_bytes()
    directory = whole.index(b"PK\1\2")
    name = directory + 46
    wide = struct.pack("<HHQQQ", 1, 24, 300, 1 << 45, (1 << 63) + 5)
    header = bytearray(whole[directory : name + 5])
    header[20:28], header[42:46], header[30:32] = b"\xff" * 8, b"\xff" * 4, struct.pack("<H", len(wide))
    end = bytearray(whole[name + 5 :])
    at = end.index(b"PK\5\6")
    end[at + 12 : at + 16] = struct.pack("<I", len(header) + len(wide) + at)
    large = bytearray(whole)
    large[directory + 20 : directory + 24] = struct.pack("<I", 5_000)
    for data in (whole[100:], whole[:directory] + header + wide + end, large):
        (tmp_path / "b.zip").write_bytes(data)
        with pytest.raises(
            DataError, match=r"b\.zip: the entry 'a\.jpg', .* lies outside of the zip: it is cut or damaged"
        ):
            ImageFolders([str(tmp_path / "b.zip")], tmp_path)


@pytest.mark.parametrize("seed", range(4))
def test_any_damage_of_a_directory_is_said_or_harmless(tmp_path: Path, seed: int) -> None:
    whole = zipped(tmp_path / "a.zip", {"a.jpg": bytes(300), "b.jpg": bytes(300)}).read_bytes()
    rng, start, refused = random.Random(seed), whole.index(b"PK\1\2"), 0
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(start, len(data))] = rng.choice([0, 255, rng.randrange(256)])
        (tmp_path / "b.zip").write_bytes(data)
        try:
            folders = ImageFolders([str(tmp_path / "b.zip")], tmp_path)
            assert all(len(place.read()) <= 300 for name in ("a.jpg", "b.jpg") if (place := folders.find(name)))
        except DataError:
            refused += 1
    assert refused
