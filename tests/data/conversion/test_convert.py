"""Converted shards contain exactly the records of the published files, with any number of processes."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import published
import pytest
from convert_runs import expected, jpeg, parts, source, tree
from PIL import Image
from streaming import StreamingDataset

from ssmvl.cli import main
from ssmvl.data.conversion.convert import convert
from ssmvl.data.shards import existing_shards, find_damage, unpack_record
from ssmvl.data.shared_memory import prefix_lock
from ssmvl.data.streams import read_records

Capture = pytest.CaptureFixture[str]


def streamed(**where: str) -> list[dict[str, Any]]:
    """Return the records as read by mosaicml-streaming alone."""
    with prefix_lock():
        dataset = StreamingDataset(**where, batch_size=1, shuffle=False)
    return [unpack_record(record) for record in dataset]


def test_shards_contain_the_records_of_the_files(tmp_path: Path) -> None:
    one, two = source(tmp_path / "a", 100), source(tmp_path / "b", 30, "other.json")
    summary = convert([one, two], str(tmp_path / "out"), part_size=32)
    train = existing_shards("train", folder=str(tmp_path / "out"))
    records = expected(one) + expected(two)
    assert parts(train) == [f"part-{number:05}" for number in range(5)]
    assert read_records(train) == records
    assert not find_damage(train, 130)
    assert streamed(local=str(train)) == records
    assert (summary.samples, summary.shards, summary.skipped.total()) == (130, 5, 0)
    assert summary.bytes == sum(path.stat().st_size for path in train.rglob("*.mds"))
    assert (train / "skipped.jsonl").read_bytes() == b""


def test_the_number_of_processes_does_not_change_the_bytes(tmp_path: Path) -> None:
    json_path = source(tmp_path, 100)
    for workers in (1, 2, 5):
        convert([json_path], str(tmp_path / f"out{workers}"), part_size=7, workers=workers)
    assert len(parts(tmp_path / "out1" / "train")) == 15
    assert tree(tmp_path / "out1") == tree(tmp_path / "out2") == tree(tmp_path / "out5")


def test_no_temporary_files_remain(tmp_path: Path) -> None:
    convert([source(tmp_path, 20)], str(tmp_path / "out"), split="test", part_size=10)
    assert [path.name for path in (tmp_path / "out").iterdir() if path.name != ".test.lock"] == ["test"]
    names = {path.name for path in (tmp_path / "out" / "test").iterdir()}
    assert names == {"conversion.json", "index.json", "part-00000", "part-00001", "skipped.jsonl"}


def test_skipped_samples_are_reported(tmp_path: Path, capsys: Capture) -> None:
    json_path = source(tmp_path, 40)
    records = json.loads(json_path.read_text())
    (tmp_path / "pictures" / "cut.jpg").write_bytes(jpeg(1)[:-50])
    records[5]["image"] = ["pictures/none.jpg"]
    records[12]["image"] = ["pictures/cut.jpg"]
    records[13]["conversations"][1]["value"] = " "
    records[17]["image"] = ["pictures/1.jpg", "pictures/2.jpg"]
    records[30]["conversations"] = []
    json_path.write_text(json.dumps(records))
    summary = convert([json_path], str(tmp_path / "out"), part_size=16)
    lines = [json.loads(line) for line in (tmp_path / "out" / "train" / "skipped.jsonl").read_text().splitlines()]
    assert [(line["record"], line["reason"]) for line in lines] == [
        (5, "missing image"),
        (12, "damaged image"),
        (13, "empty answer"),
        (17, "image marks"),
        (30, "no conversation"),
    ]
    assert {line["source"] for line in lines} == {str(json_path)}
    assert [line["id"] for line in lines] == [f"made.json-{line['record']}" for line in lines]
    assert "pictures/none.jpg" in lines[0]["detail"]
    assert summary.samples == 35
    assert summary.skipped == {line["reason"]: 1 for line in lines}
    capsys.readouterr()
    assert convert([json_path], str(tmp_path / "out"), part_size=16) == summary
    advice = f"after fixing the images or sources, delete {tmp_path / 'out' / 'train'} and run"
    assert advice in capsys.readouterr().out
    shown = str(summary)
    assert "35 samples" in shown
    assert "missing image 1" in shown
    assert "warning" not in shown
    kept = [record["id"] for record in read_records(tmp_path / "out" / "train")]
    assert kept == [f"made.json-{number}" for number in range(40) if number not in (5, 12, 13, 17, 30)]


def test_a_part_whose_samples_are_all_skipped(tmp_path: Path) -> None:
    json_path = source(tmp_path, 30)
    records = json.loads(json_path.read_text())
    for record in records[:20]:
        record["conversations"][1]["value"] = ""
    json_path.write_text(json.dumps(records))
    summary = convert([json_path], str(tmp_path / "out"), part_size=10)
    assert summary.samples == 10
    assert "warning: more than half of the samples were skipped" in str(summary)
    train = existing_shards("train", folder=str(tmp_path / "out"))
    ids = [f"made.json-{number}" for number in range(20, 30)]
    assert [record["id"] for record in streamed(local=str(train))] == ids
    assert parts(train) == ["part-00000", "part-00001", "part-00002"]


def test_a_finished_directory_is_not_changed(tmp_path: Path, capsys: Capture) -> None:
    json_path = source(tmp_path, 20)
    first = convert([json_path], str(tmp_path / "out"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "train").rglob("*")}
    assert convert([json_path], str(tmp_path / "out")) == first
    assert "is finished; nothing was changed\n" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "train").rglob("*")} == before


def test_large_images_are_shrunk_and_others_unchanged(tmp_path: Path) -> None:
    json_path = source(tmp_path, 7, side=44)  # 44 to 50 pixels wide
    convert([json_path], str(tmp_path / "out"), max_side=46)
    for record, original in zip(read_records(tmp_path / "out" / "train"), expected(json_path), strict=True):
        for image, before in zip(record["images"], original["images"], strict=True):
            width = Image.open(io.BytesIO(before)).width
            assert max(Image.open(io.BytesIO(image)).size) == min(width, 46)
            assert (image == before) is (width <= 46)


def test_an_image_that_cannot_be_shrunk_is_skipped(tmp_path: Path) -> None:
    json_path = source(tmp_path, 2)
    data = jpeg(0)
    (tmp_path / "pictures" / "0.jpg").write_bytes(data[:4] + bytes(len(data) - 6) + data[-2:])
    summary = convert([json_path], str(tmp_path / "out"), max_side=8)
    line = json.loads((tmp_path / "out" / "train" / "skipped.jsonl").read_text())
    assert (line["id"], line["record"], line["reason"]) == ("made.json-0", 0, "damaged image")
    assert summary.samples == 1


def test_a_directory_name_with_special_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    json_path = source(tmp_path, 12)
    monkeypatch.chdir(tmp_path)
    convert([json_path], "a:b #1? 50%/é", part_size=6)
    assert read_records(tmp_path / "a:b #1? 50%" / "é" / "train") == expected(json_path)


def test_a_bucket_receives_the_same_bytes(bucket: str, objects: Callable[[], dict[str, bytes]], tmp_path: Path) -> None:
    json_path = source(tmp_path, 60)
    convert([json_path], str(tmp_path / "out"), part_size=16)
    assert convert([json_path], f"{bucket}/in/here", part_size=16).samples == 60
    uploaded = objects()
    local = {path.relative_to(tmp_path / "out"): path for path in (tmp_path / "out" / "train").rglob("*")}
    assert uploaded == {f"in/here/{name}": path.read_bytes() for name, path in local.items() if path.is_file()}
    remote, cache = f"{bucket}/in/here/train", str(tmp_path / "cache")
    assert streamed(remote=remote, local=cache) == expected(json_path)


def test_a_finished_bucket_is_not_changed(
    bucket: str, objects: Callable[[], dict[str, bytes]], tmp_path: Path, capsys: Capture
) -> None:
    json_path = source(tmp_path, 20)
    first = convert([json_path], bucket)
    before = objects()
    assert convert([json_path], bucket) == first
    assert objects() == before
    assert "is finished; nothing was changed" in capsys.readouterr().out


@pytest.mark.parametrize("layout", published.LAYOUTS)
def test_published_layouts_are_converted(layout: str, tmp_path: Path) -> None:
    arguments = published.make(layout, tmp_path / "made", samples=60)
    (out := tmp_path / "out").mkdir()
    assert main(["data", "convert", *arguments, "--out", str(out)]) == 0
    train = existing_shards("train", folder=str(out))
    records = read_records(train)
    skipped = (train / "skipped.jsonl").read_text().splitlines()
    assert len(records) + len(skipped) == 60
    assert len({record["id"] for record in records}) == len(records) > 50
    marks = [sum(turn["content"].count("<image>") for turn in record["conversation"]) for record in records]
    assert all(mark in (0, len(record["images"])) for mark, record in zip(marks, records, strict=True))
