"""Parquet files and tars, which hold their images: what is read from them, and what is wrong with them; then memory."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from published import draw
from reading import IMAGE, PYTHON, SAID, TALK, opened, read, until_error

from ssmvl.errors import DataError

# --- parquet


def parquet(path: Path, rows: list[dict[str, Any]], group: int = 4, schema: pyarrow.Schema | None = None) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=schema), path, row_group_size=group)
    return path


@pytest.mark.parametrize(
    ("column", "cell", "images"),
    [
        ("image", IMAGE, 1),
        ("image", {"bytes": IMAGE, "path": "a.jpg"}, 1),
        ("image", {"path": "a.jpg", "bytes": IMAGE}, 1),
        ("images", [IMAGE, IMAGE], 2),
        ("images", [{"bytes": IMAGE}], 1),
        ("images", [], 0),
        ("image", None, 0),
    ],
)
@pytest.mark.parametrize(
    "talk", [{"conversations": TALK}, {"messages": SAID}, {"texts": [{"user": "What?", "assistant": "That."}]}]
)
def test_columns_of_a_parquet(tmp_path: Path, column: str, cell: Any, images: int, talk: dict[str, Any]) -> None:
    rows = [{column: IMAGE if cell is None else [IMAGE] if cell == [] else cell, **talk}, {column: cell, **talk}]
    path = parquet(tmp_path / "a.parquet", rows)
    record = read(path)[1]
    expected = {"id": "a.parquet:1", "type": "" if images else "text", "conversation": SAID, "images": [IMAGE] * images}
    assert record == expected


def test_ids_and_sources_of_a_parquet_in_whole_row_groups(tmp_path: Path) -> None:
    rows = [{"id": n // 2, "data_source": "ai2d" if n else None, "conversations": TALK} for n in range(11)]
    path = parquet(tmp_path / "a.parquet", rows, group=3)
    chunks = list(opened(path, size=7))
    assert [(chunk.first, len(chunk.ids)) for chunk in chunks] == [(0, 6), (6, 5)]
    assert [len(chunk.ids) for chunk in opened(path, size=1)] == [3, 3, 3, 2]
    records = [record for chunk in chunks for record in chunk.read()]
    assert [record["id"] for record in records][:4] == ["0", "0#2", "1", "1#2"]
    assert [record["type"] for record in records] == ["text"] + ["ai2d"] * 10


def test_records_of_a_parquet_are_skipped_like_others(tmp_path: Path) -> None:
    image = {"bytes": IMAGE, "path": "a.jpg"}
    rows = [
        {"image": {"bytes": None, "path": "b.jpg"}, "conversations": TALK},
        {"image": {"bytes": b"abc", "path": None}, "conversations": TALK},
        {"image": image, "conversations": None},
        {"image": image, "conversations": TALK},
    ]
    *skipped, good = read(parquet(tmp_path / "a.parquet", rows))
    assert [(item.record, item.reason) for item in skipped] == [
        (0, "missing image"),
        (1, "damaged image"),
        (2, "no conversation"),
    ]
    assert skipped[0].detail == "b.jpg is not there"
    assert good["images"] == [IMAGE]


@pytest.mark.parametrize(
    "row", [{"image": b"", "caption": "x"}, {"image": "a.jpg", "conversations": TALK}, {"conversations": "What?"}]
)
def test_a_parquet_with_other_columns_is_refused(tmp_path: Path, row: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"a\.parquet has the columns .*wanted are conversations") as raised:
        next(opened(parquet(tmp_path / "a.parquet", [row])))
    assert all(f"{column}: " in str(raised.value) for column in row)


def test_a_damaged_parquet_is_named(tmp_path: Path) -> None:
    rows = [{"image": draw(number).data, "conversations": TALK} for number in range(20)]
    path = parquet(tmp_path / "a.parquet", rows)
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(DataError, match=r"a\.parquet is no parquet file, or is damaged"):
        next(opened(path))
    path.write_bytes(b"PAR1" + b"\xff" * (len(whole) // 2) + whole[len(whole) // 2 + 4 :])
    with pytest.raises(DataError, match=r"a\.parquet is no parquet file, or is damaged"):
        read(path)


# --- tars


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
    asked = [record["conversation"][0]["content"] for record in records]
    assert asked == ["<image>", "<image><image>", "<image>", "<image>\n<image>\n<image>", "What?", "<image>"]
    said = [record["conversation"][1]["content"] for record in records]
    assert said == ["one", "That.", "three", "four", "That.", "eins ü"]
    assert [len(record["images"]) for record in records] == [1, 2, 1, 3, 0, 1]
    assert records[1]["images"] == [draw(2, "PNG").data, IMAGE]
    assert [record["type"] for record in records] == ["", "", "", "", "text", ""]


def test_samples_of_a_tar_are_skipped_like_others(tmp_path: Path) -> None:
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
    found = [(item.id, item.reason) for item in read(path, size=100)]
    assert found == [
        ("alone", "missing image"),
        ("blank", "empty answer"),
        ("silent", "no conversation"),
        ("cut", "damaged image"),
        ("bad", "no conversation"),
        ("number", "no conversation"),
    ]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_kind_of_tar_and_names_that_are_only_labels(tmp_path: Path, form: int) -> None:
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


def test_of_a_cut_tar_what_is_whole_is_read(tmp_path: Path) -> None:
    members = [(f"{n}.{suffix}", data) for n in range(6) for suffix, data in (("jpg", draw(n).data), ("txt", b"x"))]
    whole = tarred(tmp_path / "whole.tar", members).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as tar:
        ends = {member.name.split(".")[0]: member.offset_data + 512 for member in tar if member.name.endswith(".txt")}
    end = max(ends.values())
    path = tmp_path / "cut.tar"
    for cut in (*range(0, end, 300), *range(512, end, 512)):
        path.write_bytes(whole[:cut])
        found, error = until_error(path, 1)
        assert re.search(r"cut\.tar is .*byte \d+", error)
        keys = [key for key, end in ends.items() if end <= cut]
        assert [record["id"] for record in found] == keys[: len(found)]
        assert len(found) >= len(keys) - 1  # the last may go on after the cut
    changed = bytearray(whole)
    with tarfile.open(tmp_path / "whole.tar") as tar:
        at = tar.getmembers()[6].offset
    changed[at + 5] ^= 255
    path.write_bytes(changed)
    with pytest.raises(DataError, match=f"at byte {at}"):
        read(path)


def test_names_in_a_tar_that_are_no_text_still_make_ids(tmp_path: Path) -> None:
    data = tarred(tmp_path / "a.tar", [("aQ.jpg", IMAGE), ("aQ.txt", b"x")]).read_bytes()
    fields = bytearray(data)
    for at in (0, data.index(b"aQ.txt")):
        fields[at + 1] = 0xFF
        total = sum(fields[at : at + 148]) + 8 * 32 + sum(fields[at + 156 : at + 512])
        fields[at + 148 : at + 156] = b"%06o\0 " % total
    (tmp_path / "a.tar").write_bytes(fields)
    (record,) = read(tmp_path / "a.tar")
    assert record["id"].encode() == b"a\xef\xbf\xbd"


def test_an_empty_tar_holds_no_record(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.tar: no record"):
        read(tarred(tmp_path / "a.tar", []))


# --- memory


def test_a_json_passes_through_in_little_memory_without_torch(tmp_path: Path) -> None:
    small = tmp_path / "small.json"
    small.write_text(json.dumps([{"conversations": TALK}]))
    talk = [{"from": who, "value": f"{number} " * 150} for number in range(4) for who in ("human", "gpt")]
    record = json.dumps({"id": "a", "conversations": talk})
    large = tmp_path / "large.json"
    with large.open("w") as file:
        file.write("[" + ",".join([record] * 20_000) + "]")
    assert large.stat().st_size > 5e7
    code = PYTHON + (
        "def passed(path): return sum(1 for chunk in open_sources([Path(path)], [], 512) for _ in chunk.read())\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "passed(sys.argv[1]); before = peak(); count = passed(sys.argv[2])\n"
        "print(count, 'torch' in sys.modules, peak() - before)"
    )
    run = subprocess.run([sys.executable, "-c", code, small, large], capture_output=True, text=True, check=True)
    count, torch, used = run.stdout.split()
    assert (count, torch) == ("20000", "False")
    assert int(used) < 30_000  # KiB


def test_a_row_group_passes_through_in_little_memory(tmp_path: Path) -> None:
    image = IMAGE[:-2] + bytes(100_000) + IMAGE[-2:]
    rows = [{"image": image + bytes([number % 256]), "conversations": TALK} for number in range(600)]
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(rows),
        path,
        row_group_size=600,
        compression="none",
        use_dictionary=False,
        write_batch_size=8,
    )
    code = PYTHON + (
        "import pyarrow\n"
        "chunks = open_sources([Path(sys.argv[1])], [], 512)\n"
        "count = sum(isinstance(record, dict) for chunk in chunks for record in chunk.read())\n"
        "print(count, pyarrow.default_memory_pool().max_memory())"
    )
    run = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    count, used = run.stdout.split()
    assert count == "600"
    assert int(used) < 3e7
