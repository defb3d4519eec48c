"""WebDataset tars: samples, images and errors."""

from __future__ import annotations

import io
import json
import re
import tarfile
from pathlib import Path
from typing import Any

import pytest
from published import draw
from reading import IMAGE, TALK, read, until_error

from ssmvl.errors import DataError


def tarred(path: Path, members: list[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def dumped(value: Any) -> bytes:
    return json.dumps(value).encode()


def test_members_of_a_tar_become_samples(tmp_path: Path) -> None:
    marked = [{"from": "human", "value": "<image><image>"}, TALK[1]]
    path = tarred(
        tmp_path / "a.tar",
        [
            ("in/1.jpg", IMAGE),
            ("in/1.txt", b"one"),
            ("in/2.0.PNG", draw(2, "PNG").data),
            ("in/2.1.jpg", IMAGE),
            ("in/2.json", dumped({"id": "x", "image": "other.jpg", "conversations": marked})),
            ("3.json", dumped({"caption": "three"})),
            ("3.jpeg", IMAGE),
            ("3.txt", b"not this"),
            ("4.webp", draw(4, "WEBP").data),
            ("4.gif", draw(5, "GIF").data),
            ("4.bmp", draw(6, "BMP").data),
            ("4.json", dumped({"text": "four"})),
            ("._5.jpg", b"of another system"),
            ("5.cls", b"7"),
            ("5.json", dumped({"conversations": TALK})),
            ("in/1.jpg", IMAGE),
            ("in/1.txt", "eins ü".encode()),
        ],
    )
    records = read(path, size=2)
    assert [record["id"] for record in records] == ["in/1", "in/2", "3", "4", "5", "in/1#2"]
    questions = [record["conversation"][0]["content"] for record in records]
    assert questions == ["<image>", "<image><image>", "<image>", "<image>\n<image>\n<image>", "What?", "<image>"]
    answers = [record["conversation"][1]["content"] for record in records]
    assert answers == ["one", "That.", "three", "four", "That.", "eins ü"]
    assert [len(record["images"]) for record in records] == [1, 2, 1, 3, 0, 1]
    assert records[1]["images"] == [draw(2, "PNG").data, IMAGE]
    assert [record["type"] for record in records] == ["", "", "", "", "text", ""]


def test_unusable_samples_of_a_tar_are_skipped(tmp_path: Path) -> None:
    path = tarred(
        tmp_path / "a.tar",
        [
            ("alone.txt", b"a caption"),
            ("blank.jpg", IMAGE),
            ("blank.txt", b" \n"),
            ("silent.jpg", IMAGE),
            ("cut.jpg", IMAGE[:-20]),
            ("cut.txt", b"cut"),
            ("bad.jpg", IMAGE),
            ("bad.json", b"{"),
            ("number.jpg", IMAGE),
            ("number.json", b'{"caption": 5}'),
        ],
    )
    skipped = [(item.id, item.reason) for item in read(path, size=100)]
    assert skipped == [
        ("alone", "missing image"),
        ("blank", "empty answer"),
        ("silent", "no conversation"),
        ("cut", "damaged image"),
        ("bad", "no conversation"),
        ("number", "no conversation"),
    ]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_tar_format_and_names_outside_of_the_tar(tmp_path: Path, form: int) -> None:
    long = "/".join(["é" * 20] * 4) if form != tarfile.USTAR_FORMAT else "a" * 80
    names = [f"{long}/1", "../../2", "/etc/3"]
    members = [(f"{name}.{suffix}", data) for name in names for suffix, data in (("jpg", IMAGE), ("txt", b"x"))]
    path = tarred(tmp_path / "a.tar", members, form)
    with tarfile.open(path, "a", format=form) as tar:
        link = tarfile.TarInfo("4.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        folder = tarfile.TarInfo("5.jpg")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    records = read(path)
    assert [record["id"] for record in records] == names
    assert all(record["images"] == [IMAGE] for record in records)


def test_complete_samples_of_a_truncated_tar_are_read(tmp_path: Path) -> None:
    members = [(f"{n}.{suffix}", data) for n in range(6) for suffix, data in (("jpg", draw(n).data), ("txt", b"x"))]
    original = tarred(tmp_path / "original.tar", members).read_bytes()
    with tarfile.open(tmp_path / "original.tar") as tar:
        ends = {member.name.split(".")[0]: member.offset_data + 512 for member in tar if member.name.endswith(".txt")}
    end = max(ends.values())
    path = tmp_path / "cut.tar"
    for cut in (*range(0, end, 300), *range(512, end, 512)):
        path.write_bytes(original[:cut])
        records, error = until_error(path, 1)
        assert re.search(r"cut\.tar is .*byte \d+", error)
        keys = [key for key, end in ends.items() if end <= cut]
        assert [record["id"] for record in records] == keys[: len(records)]
        assert len(records) >= len(keys) - 1  # the last may have more members after the cut
    changed = bytearray(original)
    with tarfile.open(tmp_path / "original.tar") as tar:
        offset = tar.getmembers()[6].offset
    changed[offset + 5] ^= 255
    path.write_bytes(changed)
    with pytest.raises(DataError, match=f"at byte {offset}"):
        read(path)


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
@pytest.mark.parametrize("size", [-512, -1024, -1, 1 << 20, 1 << 45, 1 << 70])
def test_an_impossible_member_size_is_damage(tmp_path: Path, size: int, kind: bytes) -> None:
    path = tarred(tmp_path / "a.tar", [("1.jpg", IMAGE), ("1.txt", b"x"), ("2.jpg", IMAGE), ("2.txt", b"x")])
    data = bytearray(path.read_bytes())
    at = data.index(b"2.jpg")
    data[at + 124 : at + 136] = (size % (1 << 88) + ((0xFF if size < 0 else 0x80) << 88)).to_bytes(12, "big")
    data[at + 156 : at + 157] = kind
    total = sum(data[at : at + 148]) + 8 * 32 + sum(data[at + 156 : at + 512])
    data[at + 148 : at + 156] = b"%06o\0 " % total
    path.write_bytes(data)
    with pytest.raises(DataError, match=rf"a\.tar is .* byte {at}\b") as raised:
        read(path)
    if kind == tarfile.REGTYPE:
        assert f" {size} bytes" in str(raised.value)


def test_tar_names_that_are_not_utf8_still_become_ids(tmp_path: Path) -> None:
    data = tarred(tmp_path / "a.tar", [("aQ.jpg", IMAGE), ("aQ.txt", b"x")]).read_bytes()
    fields = bytearray(data)
    for at in (0, data.index(b"aQ.txt")):
        fields[at + 1] = 0xFF
        total = sum(fields[at : at + 148]) + 8 * 32 + sum(fields[at + 156 : at + 512])
        fields[at + 148 : at + 156] = b"%06o\0 " % total
    (tmp_path / "a.tar").write_bytes(fields)
    (record,) = read(tmp_path / "a.tar")
    assert record["id"].encode() == b"a\xef\xbf\xbd"


def test_an_empty_tar_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.tar: the files contain no records"):
        read(tarred(tmp_path / "a.tar", []))


def test_images_follow_the_order_of_the_record(tmp_path: Path) -> None:
    about = {"images": ["x/1.b.png", "1.a.jpg"], "conversations": TALK}
    other = draw(2, "PNG").data
    members = [("x/1.a.jpg", IMAGE), ("x/1.b.png", other), ("x/1.json", dumped(about))]
    (record,) = read(tarred(tmp_path / "a.tar", members))
    assert record["images"] == [other, IMAGE]


def test_other_file_names_in_a_caption_json_are_ignored(tmp_path: Path) -> None:
    about = {"caption": "one", "filename": "000012.jpg", "original_caption": "IMG_1.jpg", "clip": 0.3}
    (record,) = read(tarred(tmp_path / "a.tar", [("1.png", IMAGE), ("1.json", dumped(about))]))
    assert record["conversation"][1]["content"] == "one"


@pytest.mark.parametrize(
    "members",
    [
        [("1.png", IMAGE), ("1.json", dumped({"images": ["1.png", "2.png"], "conversations": TALK}))],
        [("1.jpg", IMAGE), ("1.heic", b"photo"), ("1.txt", b"one")],
        [("1.mp4", b"film"), ("1.json", dumped({"conversations": TALK}))],
        [("1.jpg", IMAGE), ("1.wav", b"sound"), ("1.json", dumped({"caption": "one"}))],
        [("1.jpg", IMAGE), ("1.txt", b"one"), ("1.mp4", b"film")],
        [("1.jpg", IMAGE), ("1.json", dumped({"caption": "one", "video": "1.mp4"}))],
    ],
)
def test_other_media_of_a_tar_are_not_dropped_silently(tmp_path: Path, members: list[tuple[str, bytes]]) -> None:
    (skipped,) = read(tarred(tmp_path / "a.tar", members))
    assert skipped.reason == ("missing image" if b"2.png" in members[-1][1] else "unread media")
