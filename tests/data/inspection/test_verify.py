"""Verification: every kind of damage to shards is found and named."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image
from streaming import MDSWriter

from ssmvl.data import shards
from ssmvl.data.inspection.verify import SHOWN, SLICE, Found, verify
from ssmvl.data.remote import send
from ssmvl.data.shards import COLUMNS, HASH, ensure_shards, pack_record
from ssmvl.errors import DataError

TALK = [{"role": "user", "content": "é?"}, {"role": "assistant", "content": "ü"}]


def encoded(kind: str = "JPEG", side: int = 40, seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def record(number: int, **changed: Any) -> dict[str, Any]:
    return {"id": f"s{number}", "type": "", "conversation": TALK, "images": [encoded(seed=number)], **changed}


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three shards of two samples in `train`, with one image each."""
    monkeypatch.setattr(shards, "SHARD_BYTES", 2 * len(encoded()) + 1_500)
    records = [record(number) for number in range(6)]
    ensure_shards(tmp_path / "out" / "train", lambda: records, 6)
    assert len(list((tmp_path / "out" / "train").glob("*.mds"))) == 3
    return tmp_path / "out"


def written(folder: Path, *packed: dict[str, Any], **options: Any) -> Path:
    """Write packed records to shards, valid or not."""
    with MDSWriter(out=str(folder), **{"columns": COLUMNS, "hashes": [HASH], **options}) as writer:
        for item in packed:
            writer.write(item)
    return folder


def overwrite(path: Path, offset: int, content: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[offset : offset + len(content)] = content
    path.write_bytes(data)


def counts(result: Found) -> tuple[int, int, int]:
    return result.shards, result.samples, result.images


def test_undamaged_shards_have_no_problems(out: Path) -> None:
    size = sum(path.stat().st_size for path in (out / "train").glob("*.mds"))
    for folder in (out, out / "train"):
        result = verify(str(folder), 2)
        assert (*counts(result), result.bytes, result.problems) == (3, 6, 6, size, [])
        assert str(result) == f"{folder}: 3 shards, 6 samples, 6 images, {size / 1000:.1f} kB: no problem found"


def test_every_split_is_checked(out: Path) -> None:
    ensure_shards(out / "test", lambda: [record(0, images=[])], 1)
    (out / "test" / "shard.00000.mds").unlink()
    result = verify(str(out))
    assert counts(result) == (4, 6, 6)
    assert result.problems == [f"{out}/test/shard.00000.mds: the file does not exist"]


def test_a_flipped_bit_is_found_in_its_shard(out: Path) -> None:
    path = out / "train" / "shard.00001.mds"
    at = path.read_bytes().index(b'"type"') if b'"type"' in path.read_bytes() else path.stat().st_size - 500
    overwrite(path, at, bytes([path.read_bytes()[at] ^ 1]))
    result = verify(str(out))
    assert result.problems[0].startswith(f"{path}: does not match its xxh64 hash in the index")
    assert counts(result) == (3, 6, 6)
    assert all(problem.startswith(f"{path}: ") for problem in result.problems)


def test_a_damaged_image_is_named_with_its_shard(out: Path) -> None:
    path = out / "train" / "shard.00002.mds"
    overwrite(path, path.read_bytes().rindex(b"\xff\xd8\xff"), b"\0\0\0")
    first, second = verify(str(out)).problems
    assert first.startswith(f"{path}: does not match its xxh64 hash")
    assert second.startswith(f"{path}: sample 1 (id 's5'): image 1 of 1: cannot be decoded as an image")


def test_the_rest_of_a_truncated_shard_is_checked(out: Path) -> None:
    path = out / "train" / "shard.00000.mds"
    size = path.stat().st_size
    os.truncate(path, size - 1)
    result = verify(str(out))
    assert result.problems == [
        f"{path}: has {size - 1:,} bytes, but its index states {size:,}",
        f"{path}: sample 1 is missing: the file is truncated, or its table of offsets is damaged",
    ]
    assert counts(result) == (3, 5, 5)


@pytest.mark.parametrize("size", [0, 3, 6])
def test_all_samples_of_a_shard_truncated_to_its_header_are_missing(out: Path, size: int) -> None:
    path = out / "train" / "shard.00000.mds"
    os.truncate(path, size)
    result = verify(str(out))
    problem = f"{path}: 2 of samples 0…1 are missing: the file is truncated, or its table of offsets is damaged"
    assert problem in result.problems
    assert counts(result) == (3, 4, 4)


def test_a_missing_shard_is_one_problem(out: Path) -> None:
    (out / "train" / "shard.00001.mds").unlink()
    result = verify(str(out))
    assert result.problems == [f"{out}/train/shard.00001.mds: the file does not exist"]
    assert counts(result) == (3, 4, 4)


def test_every_damaged_sample_is_named(tmp_path: Path) -> None:
    image, bomb = encoded(), encoded("PNG", 2)
    at = bomb.index(b"IHDR") + 4
    header = b"IHDR" + (11_000).to_bytes(4, "big") * 2 + bomb[at + 8 : at + 13]
    bomb = bomb[: at - 4] + header + zlib.crc32(header).to_bytes(4, "big") + bomb[at + 17 :]
    packed = [
        pack_record(record(0)),
        pack_record(record(1, images=[image, image[:-30]])),
        {**pack_record(record(2)), "image_sizes": [len(image) + 1]},
        {**pack_record(record(3)), "image_sizes": [-1, 2]},
        pack_record(record(4, conversation=[])),
        pack_record(record(5, conversation=[TALK[1], TALK[0]])),
        pack_record(record(6, conversation="text")),
        pack_record(record(7, images=[bomb])),
        pack_record(record(8, conversation=[{**TALK[0], "content": "<image><image>"}, TALK[1]])),
        {**pack_record(record(9)), "id": "s9", "type": b"\xff\xfe"},
    ]
    result = verify(str(written(tmp_path / "train", *packed)), 1)
    prefix = f"{tmp_path}/train/shard.00000.mds: sample "
    assert all(problem.startswith(prefix) for problem in result.problems)
    expected = [
        "1 (id 's1'): image 2 of 2: cannot be decoded as an image (OSError: image file is truncated",
        "2 (id 's2'): its images have",
        "3 (id 's3'): image_sizes must be a list of sizes in bytes, received [-1, 2]",
        "4 (id 's4'): invalid conversation: the conversation is empty; it needs at least one user message",
        "5 (id 's5'): invalid conversation: message 0 must be {'role': 'user'",
        "6 (id 's6'): invalid conversation: must be a list of messages, received 'text'",
        "7 (id 's7'): image 1 of 1",
        "8 (id 's8'): has 2 <image> marks, but 1 images",
        "9 (id unknown): cannot be parsed (UnicodeDecodeError",
    ]
    problems = [problem.removeprefix(prefix) for problem in result.problems]
    assert [problem[: len(start)] for problem, start in zip(problems, expected, strict=True)] == expected
    assert problems[6].endswith(": 11000 x 11000 pixels; at most 100000000 are allowed")
    assert result.samples == 10


def test_any_damage_is_found_and_none_stops_the_verification(out: Path) -> None:
    rng = np.random.default_rng(0)
    undamaged = (out / "train" / "shard.00000.mds").read_bytes()
    for number in range(60):
        shutil.copytree(out / "train", folder := out / f"damaged{number}")
        at = int(rng.integers(len(undamaged) if number % 3 else 60))  # 60: the tables are at the beginning
        before, byte, after = undamaged[:at], undamaged[at] ^ int(rng.integers(1, 256)), undamaged[at:]
        data = [before, before + bytes([byte]) + after[1:], before + b"x" + after][number % 3]
        (folder / "shard.00000.mds").write_bytes(data)
    problems = verify(str(out)).problems
    damaged = {Path(problem.split(": ")[0]).parts[-2:] for problem in problems}
    assert damaged == {(f"damaged{number}", "shard.00000.mds") for number in range(60)}


def test_wrong_column_sizes_are_found(out: Path) -> None:
    path = out / "train" / "shard.00000.mds"
    begin = int.from_bytes(path.read_bytes()[4:8], "little")
    overwrite(path, begin, (3).to_bytes(4, "little"))  # size of the id, which has two characters
    assert "sample 0 (id unknown): its columns add up to" in verify(str(out)).problems[1]


def test_samples_are_numbered_within_the_shard_and_problems_keep_their_order(tmp_path: Path) -> None:
    total = 2 * SLICE + 5
    wrong = {3: b"no image", SLICE: b"GIF89a", total - 1: b""}
    packed = [pack_record(record(n, images=[wrong[n]] if n in wrong else [])) for n in range(total)]
    written(tmp_path / "train", *packed)
    one, two = (verify(str(tmp_path), workers) for workers in (1, 2))
    assert one == two
    assert [problem.split("(id ")[1].split(")")[0] for problem in one.problems] == [f"'s{n}'" for n in wrong]
    assert [f": sample {n} " in problem for n, problem in zip(wrong, one.problems, strict=True)] == [True] * 3
    assert counts(one) == (1, total, 3)


def test_an_index_with_the_wrong_number_of_samples_is_found(out: Path) -> None:
    index = json.loads((out / "train" / "index.json").read_text())
    index["shards"][0]["samples"] = 1
    (out / "train" / "index.json").write_text(json.dumps(index))
    expected = "shard.00000.mds: states that it holds 2 samples, but its index states 1"
    assert expected in "\n".join(verify(str(out)).problems)


def test_compressed_shards_are_a_problem(tmp_path: Path) -> None:
    written(tmp_path / "train", pack_record(record(0)), compression="zstd")
    (problem,) = verify(str(tmp_path)).problems
    assert problem.endswith("shard.00000.mds: it is compressed (zstd); write it again without compression")


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("column", ["mine", "type"])
def test_pickles_are_never_loaded(tmp_path: Path, column: str) -> None:
    packed = {**pack_record(record(0)), column: Evil(tmp_path / "ran")}
    written(tmp_path / "train", packed, columns={**COLUMNS, column: "pkl"})
    (problem,) = verify(str(tmp_path)).problems
    assert "pkl" in problem
    assert not (tmp_path / "ran").exists()


def edited(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def edit(path: Path) -> None:
        index = json.loads(path.read_text())
        change(index["shards"][0])
        path.write_text(json.dumps(index))

    return edit


INDEXES: dict[str, Callable[[Path], object]] = {
    r"index.json is not an index of MDS shards \(JSONDecodeError: .*char ": lambda p: p.write_text(p.read_text()[:-20]),
    r"index.json is not an index of MDS shards \(TypeError": lambda p: p.write_text("[]"),
    r"index.json lists no shards": lambda p: p.write_text('{"version": 2, "shards": []}'),
    r"train/None: .*is damaged": edited(lambda shard: shard["raw_data"].pop("basename") and None),
    r"shard.00000.mds: its index entry is damaged \(AssertionError": edited(lambda s: s.update(version=3)),
    r"shard.00000.mds: its format is 'json'; only 'mds' is supported": edited(lambda s: s.update(format="json")),
    r"shard.00000.mds: its columns are .*, expected ": edited(lambda s: s["column_encodings"].__setitem__(0, "int")),
    r"shard.00000.mds: the index has no xxh64 hash for it": edited(lambda shard: shard["raw_data"].update(hashes={})),
    r"shard.00000.mds: its index entry is damaged \(TypeError": edited(lambda shard: shard.update(samples="2")),
    r"shard.00000.mds: the index states -1 samples": edited(lambda shard: shard.update(samples=-1)),
}


@pytest.mark.parametrize("message", INDEXES)
def test_a_damaged_index_is_a_problem_and_the_other_split_is_checked(out: Path, message: str) -> None:
    ensure_shards(out / "val", lambda: [record(0)], 1)
    INDEXES[message](out / "train" / "index.json")
    result = verify(str(out))
    assert len(result.problems) == 1
    with pytest.raises(DataError, match=message):
        raise DataError(result.problems[0])
    assert result.images in (1, 5)  # the remaining entries are checked


def test_an_interrupted_conversion_is_a_problem(out: Path) -> None:
    (out / "train" / "index.json").unlink()
    (out / "train" / "conversion.json").write_text("{}")
    for folder in (out, out / "train"):
        (problem,) = verify(str(folder)).problems
        assert problem == f"{out}/train/index.json does not exist: the conversion was interrupted; run it again"


def test_directories_without_shards_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere does not exist; give the output directory of"):
        verify(str(tmp_path / "nowhere"))
    (tmp_path / "empty" / "deep").mkdir(parents=True)
    with pytest.raises(DataError, match=r"empty contains neither index\.json nor a directory with one; give"):
        verify(str(tmp_path / "empty"))


def sent(out: Path, url: str) -> None:
    send(out, url, [str(path.relative_to(out)) for path in out.rglob("*.*") if path.is_file()])


def test_shards_in_a_bucket(out: Path, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    sent(out, f"{bucket}/out")
    local = verify(str(out))
    for url in (f"{bucket}/out", f"{bucket}/out/train", f"{bucket}/out/"):
        remote = verify(url, 2)
        assert (counts(remote), remote.bytes, remote.problems) == (counts(local), local.bytes, [])
    assert list((tmp_path / "temporary").iterdir()) == []


def test_problems_in_a_bucket_are_named_with_their_url(out: Path, bucket: str) -> None:
    overwrite(out / "train" / "shard.00000.mds", 2_000, b"other")
    sent(out, f"{bucket}/out")
    (out / "train" / "shard.00001.mds").unlink()
    sent(out, f"{bucket}/less")
    assert f"{bucket}/out/train/shard.00000.mds: does not match its xxh64 hash" in verify(f"{bucket}/out").problems[0]
    incomplete = verify(f"{bucket}/less")
    assert any(f"{bucket}/less/train/shard.00001.mds cannot be fetched" in problem for problem in incomplete.problems)
    assert counts(incomplete) == (3, 4, 4)
    with pytest.raises(DataError, match=r"nowhere/index\.json cannot be fetched"):
        verify(f"{bucket}/nowhere")


@pytest.mark.long
def test_a_killed_process_ends_the_verification_with_an_error(out: Path) -> None:
    (out / "train" / "shard.00002.mds").unlink()
    os.mkfifo(out / "train" / "shard.00002.mds")  # opening it blocks until a writer appears, which never happens
    code = f"from ssmvl.data.inspection.verify import verify; verify({str(out)!r}, 1)"
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) as process:
        children: list[psutil.Process] = []
        while not children and process.poll() is None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.05)
            children = psutil.Process(process.pid).children()
        children[0].send_signal(signal.SIGKILL)
        assert process.stderr
        stderr = process.communicate(timeout=60)[1]
    assert "DataError: a process was killed" in stderr
    assert process.returncode == 1


def test_the_output_shows_the_first_problems_and_their_number() -> None:
    result = Found("data", 1, 1, 0, 10, [f"problem {number}" for number in range(SHOWN + 7)])
    lines = str(result).splitlines()
    assert lines[SHOWN - 1 :] == [
        f"problem {SHOWN - 1}",
        "… and 7 more",
        f"data: 1 shard, 1 sample, 0 images, 10 bytes: {SHOWN + 7} problems found",
    ]
