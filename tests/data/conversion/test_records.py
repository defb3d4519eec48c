"""Parquet files: records, images and errors; and the memory of conversion."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from published import draw
from reading import CHAT, IMAGE, PYTHON, TALK, opened, read

from ssmvl.errors import DataError

# --- parquet


def write_parquet(path: Path, rows: list[dict[str, Any]], group: int = 4, schema: pyarrow.Schema | None = None) -> Path:
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
    "talk", [{"conversations": TALK}, {"messages": CHAT}, {"texts": [{"user": "What?", "assistant": "That."}]}]
)
def test_columns_of_a_parquet_become_records(
    tmp_path: Path, column: str, cell: Any, images: int, talk: dict[str, Any]
) -> None:
    rows = [{column: IMAGE if cell is None else [IMAGE] if cell == [] else cell, **talk}, {column: cell, **talk}]
    path = write_parquet(tmp_path / "a.parquet", rows)
    record = read(path)[1]
    expected = {"id": "a.parquet:1", "type": "" if images else "text", "conversation": CHAT, "images": [IMAGE] * images}
    assert record == expected


def test_ids_and_types_of_a_parquet_in_complete_row_groups(tmp_path: Path) -> None:
    rows = [{"id": n // 2, "data_source": "ai2d" if n else None, "conversations": TALK} for n in range(11)]
    path = write_parquet(tmp_path / "a.parquet", rows, group=3)
    chunks = list(opened(path, size=7))
    assert [(chunk.first, len(chunk.ids)) for chunk in chunks] == [(0, 6), (6, 5)]
    assert [len(chunk.ids) for chunk in opened(path, size=1)] == [3, 3, 3, 2]
    records = [record for chunk in chunks for record in chunk.read()]
    assert [record["id"] for record in records][:4] == ["0", "0#2", "1", "1#2"]
    assert [record["type"] for record in records] == ["text"] + ["ai2d"] * 10


def test_unusable_records_of_a_parquet_are_skipped(tmp_path: Path) -> None:
    image = {"bytes": IMAGE, "path": "a.jpg"}
    rows = [
        {"image": {"bytes": None, "path": "b.jpg"}, "conversations": TALK},
        {"image": {"bytes": b"abc", "path": None}, "conversations": TALK},
        {"image": image, "conversations": None},
        {"image": image, "conversations": TALK},
    ]
    *skipped, good = read(write_parquet(tmp_path / "a.parquet", rows))
    assert [(item.record, item.reason) for item in skipped] == [
        (0, "missing image"),
        (1, "damaged image"),
        (2, "no conversation"),
    ]
    assert skipped[0].detail == "b.jpg not found"
    assert good["images"] == [IMAGE]


def test_two_image_columns_must_be_equal(tmp_path: Path) -> None:
    rows = [
        {"image": IMAGE, "images": [IMAGE], "messages": CHAT},
        {"image": IMAGE, "images": [draw(5).data], "messages": CHAT},
    ]
    good, skipped = read(write_parquet(tmp_path / "a.parquet", rows))
    assert good["images"] == [IMAGE]
    assert skipped.reason == "unread media"


def test_unrelated_columns_are_ignored(tmp_path: Path) -> None:
    talk = pyarrow.array([TALK, TALK])
    columns = {
        "image": pyarrow.array([{"bytes": IMAGE, "path": "a.png"}, {"bytes": IMAGE, "path": "b.png"}]),
        "file_name": pyarrow.array(["a.png", "000012.png"]),
        "image_time": pyarrow.array([1, 2], pyarrow.timestamp("ns")),
        "embedding": pyarrow.array([[0.5], [0.5]]),
        "latin": pyarrow.array([b"\xe9", b"\xe9"]).view(pyarrow.string()),
        "image_hash": pyarrow.array([b"12345678", b"12345678"]),
    }
    pyarrow.parquet.write_table(pyarrow.table({"conversations": talk, **columns}), tmp_path / "a.parquet")
    assert [len(record["images"]) for record in read(tmp_path / "a.parquet")] == [1, 1]


def test_rows_with_media_in_other_columns_are_skipped(tmp_path: Path) -> None:
    typed = [{"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]}, CHAT[1]]
    typed[1] = {"role": "assistant", "content": [{"type": "text", "text": "That."}]}
    rows = [
        {"image": IMAGE, "video": None, "image_path": None, "messages": typed},
        {"image": IMAGE, "video": b"film", "image_path": None, "messages": typed},
        {"image": None, "video": None, "image_path": "a.jpg", "messages": typed[1:] * 2},
    ]
    good, *skipped = read(write_parquet(tmp_path / "a.parquet", rows))
    assert good["conversation"] == [{"role": "user", "content": "<image>\nWhat?"}, CHAT[1]]
    assert [item.reason for item in skipped] == ["unread media", "unread media"]


@pytest.mark.parametrize(
    "row", [{"image": b"", "caption": "x"}, {"image": "a.jpg", "conversations": TALK}, {"conversations": "What?"}]
)
def test_a_parquet_without_the_required_columns_is_rejected(tmp_path: Path, row: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"a\.parquet has the columns .*expected: conversations") as raised:
        next(opened(write_parquet(tmp_path / "a.parquet", [row])))
    assert all(f"{column}: " in str(raised.value) for column in row)


def test_a_damaged_parquet_is_reported(tmp_path: Path) -> None:
    rows = [{"image": draw(number).data, "conversations": TALK} for number in range(20)]
    path = write_parquet(tmp_path / "a.parquet", rows)
    original = path.read_bytes()
    path.write_bytes(original[:-100])
    with pytest.raises(DataError, match=r"a\.parquet is not a parquet file, or is damaged"):
        next(opened(path))
    path.write_bytes(b"PAR1" + b"\xff" * (len(original) // 2) + original[len(original) // 2 + 4 :])
    with pytest.raises(DataError, match=r"a\.parquet is not a parquet file, or is damaged"):
        read(path)


def test_invalid_utf8_is_reported_with_the_record(tmp_path: Path) -> None:
    rows = [{"id": f"name {n}", "conversations": [TALK[0], {**TALK[1], "value": f"Answer {n}."}]} for n in range(50)]
    path = tmp_path / "a.parquet"
    options: dict[str, Any] = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=40, **options)
    original = path.read_bytes()
    for text, record in ((b"Answer 45.", 45), (b"name 37", 37)):
        path.write_bytes(original.replace(text, text[:-1] + b"\xff"))
        with pytest.raises(DataError, match=rf"a\.parquet, record {record}: a text is not valid UTF-8"):
            read(path, size=40)


@pytest.mark.parametrize(
    "type_",
    [
        pyarrow.string(),
        pyarrow.struct([("mybytes", pyarrow.string())]),
        pyarrow.struct([("bytes", pyarrow.string())]),
        pyarrow.struct([("a", pyarrow.struct([("b", pyarrow.int8()), ("bytes", pyarrow.binary())]))]),
        pyarrow.list_(pyarrow.struct([("mybytes", pyarrow.binary())])),
    ],
)
def test_image_columns_without_bytes_are_rejected(tmp_path: Path, type_: pyarrow.DataType) -> None:
    table = pyarrow.Table.from_pylist([{"conversations": TALK}]).append_column("image", pyarrow.nulls(1, type_))
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet has the columns .*; expected: conversations"):
        read(tmp_path / "a.parquet")


# --- memory


def test_a_json_is_read_in_little_memory_and_without_torch(tmp_path: Path) -> None:
    small = tmp_path / "small.json"
    small.write_text(json.dumps([{"conversations": TALK}]))
    talk = [{"from": who, "value": f"{number} " * 150} for number in range(4) for who in ("human", "gpt")]
    record = json.dumps({"id": "a", "conversations": talk})
    large = tmp_path / "large.json"
    with large.open("w") as file:
        file.write("[" + ",".join([record] * 20_000) + "]")
    assert large.stat().st_size > 5e7
    code = PYTHON + (
        "def count(path): return sum(1 for chunk in open_sources([Path(path)], [], 512) for _ in chunk.read())\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "count(sys.argv[1]); before = peak(); total = count(sys.argv[2])\n"
        "print(total, 'torch' in sys.modules, peak() - before)"
    )
    run = subprocess.run([sys.executable, "-c", code, small, large], capture_output=True, text=True, check=True)
    count, torch, used = run.stdout.split()
    assert (count, torch) == ("20000", "False")
    assert int(used) < 30_000  # KiB


def test_a_row_group_is_read_in_little_memory(tmp_path: Path) -> None:
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
