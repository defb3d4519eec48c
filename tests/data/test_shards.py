"""Shards are written once, verified, and rewritten if damaged."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from streaming import MDSWriter
from streaming.base.hashing import get_hash

from ssmvl.data import shards
from ssmvl.data.shards import (
    COLUMNS,
    HASH,
    ensure_shards,
    existing_shards,
    find_damage,
    pack_record,
    shard_writer,
    unpack_record,
)
from ssmvl.data.streams import read_records
from ssmvl.errors import DataError, MissingDependencyError
from ssmvl.testing import check_dataset

TALK = [{"role": "user", "content": "é?"}, {"role": "assistant", "content": "ü"}]
RECORDS = [
    {"id": "none", "type": "", "conversation": TALK, "images": []},
    {"id": "one", "type": "x", "conversation": TALK, "images": [b"\0abc"]},
    {"id": "three", "type": "x", "conversation": TALK, "images": [b"de", b"", b"fgh"]},
]

PROCESS = """
import sys
from pathlib import Path
import streaming
from ssmvl.data.shards import ensure_shards

def records():
    print("writing", flush=True)
    sys.stdin.readline()
    for _ in range(5_000):
        yield {"id": "a", "type": "", "conversation": [], "images": []}

print("ready", flush=True)
ensure_shards(Path(sys.argv[1]), records, 5_000)
print("done", flush=True)
"""


def ensure(folder: Path) -> int:
    """Ensure the shards of `RECORDS`. Returns how often the records were requested."""
    calls = []

    def records() -> list[dict[str, Any]]:
        calls.append(1)
        return RECORDS

    ensure_shards(folder, records, len(RECORDS))
    return len(calls)


@pytest.mark.parametrize("size", [1 << 20, 200])
def test_the_writer_writes_the_same_bytes_as_streaming(tmp_path: Path, size: int) -> None:
    mds_writer = MDSWriter(out=str(tmp_path / "streaming"), columns=COLUMNS, hashes=[HASH], size_limit=size)
    for writer in (shard_writer(tmp_path / "ours", size), mds_writer):
        with writer:
            for record in RECORDS * 3:
                writer.write(pack_record(record))
    ours, expected = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("ours", "streaming"))
    assert ours == expected
    assert (len(ours) > 2) == (size == 200)


def test_intact_shards_on_read_only_storage_are_usable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(lock: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    assert ensure(tmp_path / "train") == 1
    monkeypatch.setattr("filelock.FileLock.__enter__", fail)
    assert ensure(tmp_path / "train") == 0
    with pytest.raises(DataError, match=f"cannot write shards .*{os.strerror(errno.EROFS)}"):
        ensure(tmp_path / "other")


def shard(folder: Path) -> Path:
    return folder / "shard.00000.mds"


def flip(folder: Path) -> None:
    data = bytearray(shard(folder).read_bytes())
    data[-1] ^= 1
    shard(folder).write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "does not match its xxh64 hash": flip,
    r"shard\.00000\.mds has \d+ bytes": lambda folder: shard(folder).write_bytes(shard(folder).read_bytes()[:-1]),
    r"shard\.00000\.mds has 0 bytes": lambda folder: shard(folder).write_bytes(b""),
    r"FileNotFoundError.*shard": lambda folder: shard(folder).unlink(),
    r"FileNotFoundError.*index": lambda folder: (folder / "index.json").unlink(),
    "JSONDecodeError": lambda folder: (folder / "index.json").write_text('{"shards": ['),
    "UnicodeDecodeError": lambda folder: (folder / "index.json").write_bytes(b"\xff\xfe"),
    "TypeError": lambda folder: (folder / "index.json").write_text("[]"),
    "KeyError": lambda folder: (folder / "index.json").write_text('{"shards": [{}]}'),
}


def test_shards_are_written_once(tmp_path: Path) -> None:
    assert ensure(tmp_path / "s") == 1
    assert ensure(tmp_path / "s") == 0
    assert find_damage(tmp_path / "s", len(RECORDS)) == ""


def test_records_are_read_in_order(tmp_path: Path) -> None:
    ensure(tmp_path / "s")
    assert read_records(tmp_path / "s") == RECORDS


def test_parent_directories_are_created(tmp_path: Path) -> None:
    ensure(tmp_path / "a" / "b" / "s")
    assert shard(tmp_path / "a" / "b" / "s").is_file()


def test_the_index_has_the_hash_of_every_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 400)
    ensure(tmp_path / "s")
    index = json.loads((tmp_path / "s" / "index.json").read_text())["shards"]
    assert len(index) > 1
    for entry in index:
        raw = entry["raw_data"]
        data = (tmp_path / "s" / raw["basename"]).read_bytes()
        assert raw["hashes"] == {HASH: get_hash(HASH, data)}


@pytest.mark.parametrize("message", DAMAGES)
def test_damaged_shards_are_rewritten(tmp_path: Path, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder, sibling = tmp_path / "s", tmp_path / "other" / "keep.txt"
    ensure(folder)
    sibling.parent.mkdir()
    sibling.write_text("mine")
    before = shard(folder).read_bytes()
    DAMAGES[message](folder)
    with pytest.raises(AssertionError, match=message):
        assert not find_damage(folder, len(RECORDS)), find_damage(folder, len(RECORDS))
    assert ensure(folder) == 1
    assert "; rewriting it" in capsys.readouterr().out
    assert shard(folder).read_bytes() == before
    assert find_damage(folder, len(RECORDS)) == ""
    assert sibling.read_text() == "mine"


def test_damage_in_a_later_shard_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 400)
    ensure(tmp_path / "s")
    last = max((tmp_path / "s").glob("*.mds"))
    last.unlink()
    assert last.name in find_damage(tmp_path / "s", len(RECORDS))


def test_an_empty_index_counts_as_damage(tmp_path: Path) -> None:
    ensure(tmp_path / "s")
    (tmp_path / "s" / "index.json").write_text('{"version": 2, "shards": []}')
    assert ensure(tmp_path / "s") == 1


def test_a_failed_write_leaves_no_directory(tmp_path: Path) -> None:
    def records() -> Iterator[dict[str, Any]]:
        yield RECORDS[0]
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        ensure_shards(tmp_path / "s", records, 3)
    assert not (tmp_path / "s").exists()
    assert ensure(tmp_path / "s") == 1
    assert read_records(tmp_path / "s") == RECORDS


def test_a_directory_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match=r"file/s: cannot write shards"):
        ensure(tmp_path / "file" / "s")
    with pytest.raises(DataError, match=r"file: cannot write shards"):
        ensure(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.long
def test_concurrent_processes_write_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROCESS, str(tmp_path / "s")]
    first = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with first:
        assert first.stdout
        assert [first.stdout.readline(), first.stdout.readline()] == ["ready\n", "writing\n"]
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as second:
            assert second.stdout
            assert second.stdout.readline() == "ready\n"
            assert first.communicate("\n", timeout=25)[0] == "done\n"
            assert second.communicate(timeout=25)[0] == "done\n"
    assert [first.returncode, second.returncode] == [0, 0]
    assert find_damage(tmp_path / "s", 5000) == ""


def test_existing_shards_are_read_from_the_directory_of_the_split(tmp_path: Path) -> None:
    for split in ("train", "test"):
        records = [{"id": split, "type": "", "conversation": TALK, "images": []}]
        ensure_shards(tmp_path / split, lambda records=records: records, 1)
    assert read_records(existing_shards("test", folder=str(tmp_path)))[0]["id"] == "test"
    assert existing_shards("train", folder=str(tmp_path)) == tmp_path / "train"
    check_dataset(partial(existing_shards, folder=str(tmp_path)))


def test_missing_shards_raise_an_error_that_describes_the_layout(tmp_path: Path) -> None:
    ensure(tmp_path / "train")
    with pytest.raises(DataError, match=r"/test/index\.json does not exist.*test/index\.json lists the MDS"):
        existing_shards("test", folder=str(tmp_path))
    with pytest.raises(DataError, match="does not exist"):
        existing_shards("train", folder=str(tmp_path / "train"))


def test_missing_and_truncated_shards_are_named(tmp_path: Path) -> None:
    ensure(tmp_path / "train")
    shard = tmp_path / "train" / "shard.00000.mds"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1])
    expected = rf"shard\.00000\.mds has {len(data) - 1} bytes, but its index states {len(data)}; run `ssmvl data verify"
    with pytest.raises(DataError, match=expected):
        existing_shards("train", folder=str(tmp_path))
    shard.write_bytes((int.from_bytes(data[:4], "little") + 9).to_bytes(4, "little") + data[4:])
    with pytest.raises(DataError, match=r"shard\.00000\.mds holds \d+ samples, but its index states \d+; run `ssmvl"):
        existing_shards("train", folder=str(tmp_path))
    shard.unlink()
    with pytest.raises(DataError, match=r"shard\.00000\.mds is missing; run `ssmvl data verify"):
        existing_shards("train", folder=str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"[]", b'{"shards": 1}', b'{"shards": []}', b'{"shards": [{}]}', b"\xff"])
def test_a_damaged_index_is_an_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "index.json").write_bytes(content)
    with pytest.raises(DataError, match=r"train/index\.json is not an index of MDS shards"):
        existing_shards("train", folder=str(tmp_path))


def test_shards_with_missing_columns_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    file = {"raw_data": {"basename": "shard.00000.mds", "bytes": 1}, "samples": 1}
    entries = [{"column_names": list(shards.COLUMNS), **file}, {"column_names": ["id", "images", "mine"], **file}]
    (tmp_path / "train" / "index.json").write_text(json.dumps({"shards": entries}))
    with pytest.raises(DataError, match=r"lack the columns \['conversation', 'image_sizes', 'type'\]; each needs id, "):
        existing_shards("train", folder=str(tmp_path))


@pytest.mark.parametrize("images", [[], [b"abc"], [b"a", b"", b"bcd"]])
def test_unpacking_splits_the_images(images: list[bytes]) -> None:
    stored = {
        "id": "x",
        "type": "t",
        "conversation": TALK,
        "images": b"".join(images),
        "image_sizes": [len(image) for image in images],
    }
    assert unpack_record(stored) == {"id": "x", "type": "t", "conversation": TALK, "images": images}


def test_missing_streaming_is_an_error_that_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"ssmvl\[data\]"):
        ensure(tmp_path / "s")
