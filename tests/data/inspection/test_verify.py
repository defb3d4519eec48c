"""Verification: everything that is wrong with shards is found, and named."""

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
    """Shards of records as they stand there, right or wrong."""
    with MDSWriter(out=str(folder), **{"columns": COLUMNS, "hashes": [HASH], **options}) as writer:
        for one in packed:
            writer.write(one)
    return folder


def change(path: Path, where: int, what: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[where : where + len(what)] = what
    path.write_bytes(data)


def counts(found: Found) -> tuple[int, int, int]:
    return found.shards, found.samples, found.images


def test_sound_shards_have_no_problem(out: Path) -> None:
    size = sum(path.stat().st_size for path in (out / "train").glob("*.mds"))
    for folder in (out, out / "train"):
        found = verify(str(folder), 2)
        assert (*counts(found), found.bytes, found.problems) == (3, 6, 6, size, [])
        assert str(found) == f"{folder}: 3 shards, 6 samples, 6 images, {size / 1000:.1f} kB: no problem found"


def test_every_split_is_looked_at(out: Path) -> None:
    ensure_shards(out / "test", lambda: [record(0, images=[])], 1)
    (out / "test" / "shard.00000.mds").unlink()
    found = verify(str(out))
    assert counts(found) == (4, 6, 6)
    assert found.problems == [f"{out}/test/shard.00000.mds: there is no such file"]


def test_a_flipped_byte_is_found_in_its_shard(out: Path) -> None:
    path = out / "train" / "shard.00001.mds"
    at = path.read_bytes().index(b'"type"') if b'"type"' in path.read_bytes() else path.stat().st_size - 500
    change(path, at, bytes([path.read_bytes()[at] ^ 1]))
    found = verify(str(out))
    assert found.problems[0].startswith(f"{path}: does not have the xxh64 hash in its index")
    assert counts(found) == (3, 6, 6)
    assert all(problem.startswith(f"{path}: ") for problem in found.problems)


def test_a_damaged_image_is_named_beside_its_shard(out: Path) -> None:
    path = out / "train" / "shard.00002.mds"
    change(path, path.read_bytes().rindex(b"\xff\xd8\xff"), b"\0\0\0")
    first, second = verify(str(out)).problems
    assert first.startswith(f"{path}: does not have the xxh64 hash")
    assert second.startswith(f"{path}: sample 1 (id 's5'): image 1 of 1: cannot be decoded as an image")


def test_of_a_cut_shard_the_rest_is_looked_at(out: Path) -> None:
    path = out / "train" / "shard.00000.mds"
    size = path.stat().st_size
    os.truncate(path, size - 1)
    found = verify(str(out))
    assert found.problems == [
        f"{path}: has {size - 1:,} bytes, its index says {size:,}",
        f"{path}: sample 1 not there: the file is cut, or its table of places is damaged",
    ]
    assert counts(found) == (3, 5, 5)


@pytest.mark.parametrize("left", [0, 3, 6])
def test_of_a_shard_cut_to_nothing_all_samples_are_missed(out: Path, left: int) -> None:
    path = out / "train" / "shard.00000.mds"
    os.truncate(path, left)
    found = verify(str(out))
    assert f"{path}: 2 of samples 0…1 not there: the file is cut, or its table of places is damaged" in found.problems
    assert counts(found) == (3, 4, 4)


def test_a_missing_shard_is_one_problem(out: Path) -> None:
    (out / "train" / "shard.00001.mds").unlink()
    found = verify(str(out))
    assert found.problems == [f"{out}/train/shard.00001.mds: there is no such file"]
    assert counts(found) == (3, 4, 4)


def test_every_wrong_sample_is_found_and_named(tmp_path: Path) -> None:
    image, bomb = encoded(), encoded("PNG", 2)
    at = bomb.index(b"IHDR") + 4
    header = b"IHDR" + (11_000).to_bytes(4, "big") * 2 + bomb[at + 8 : at + 13]
    bomb = bomb[: at - 4] + header + zlib.crc32(header).to_bytes(4, "big") + bomb[at + 17 :]
    wrong = [
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
    found = verify(str(written(tmp_path / "train", *wrong)), 1)
    begin = f"{tmp_path}/train/shard.00000.mds: sample "
    assert all(problem.startswith(begin) for problem in found.problems)
    expected = [
        "1 (id 's1'): image 2 of 2: cannot be decoded as an image (OSError: image file is truncated",
        "2 (id 's2'): its images have",
        "3 (id 's3'): image_sizes must be a list of sizes in bytes, received [-1, 2]",
        "4 (id 's4'): is no conversation: an empty conversation",
        "5 (id 's5'): is no conversation: message 0 must be {'role': 'user'",
        "6 (id 's6'): is no conversation: received 'text', a list of messages is needed",
        "7 (id 's7'): image 1 of 1",
        "8 (id 's8'): has 2 <image> marks, but 1 images",
        "9 (id unknown): cannot be taken apart (UnicodeDecodeError",
    ]
    told = [problem.removeprefix(begin) for problem in found.problems]
    assert [got[: len(want)] for got, want in zip(told, expected, strict=True)] == expected
    assert told[6].endswith(": 11000 x 11000 pixels; at most 100000000 are allowed")
    assert found.samples == 10


def test_no_damage_goes_unnoticed_or_stops_it(out: Path) -> None:
    rng = np.random.default_rng(0)
    sound = (out / "train" / "shard.00000.mds").read_bytes()
    for number in range(60):
        shutil.copytree(out / "train", folder := out / f"damaged{number}")
        at = int(rng.integers(len(sound))) if number % 3 else int(rng.integers(60))  # the tables lie at the beginning
        other = sound[at] ^ int(rng.integers(1, 256))
        data = [sound[:at], sound[:at] + bytes([other]) + sound[at + 1 :], sound[:at] + b"x" + sound[at:]][number % 3]
        (folder / "shard.00000.mds").write_bytes(data)
    problems = verify(str(out)).problems
    named = {Path(problem.split(": ")[0]).parts[-2:] for problem in problems}
    assert named == {(f"damaged{number}", "shard.00000.mds") for number in range(60)}


def test_columns_that_do_not_fill_their_sample_are_found(out: Path) -> None:
    path = out / "train" / "shard.00000.mds"
    begin = int.from_bytes(path.read_bytes()[4:8], "little")
    change(path, begin, (3).to_bytes(4, "little"))  # the size of the id: it has two letters
    assert "sample 0 (id unknown): its columns take" in verify(str(out)).problems[1]


def test_samples_are_numbered_through_the_shard_and_the_order_is_kept(tmp_path: Path) -> None:
    total = 2 * SLICE + 5
    wrong = {3: b"no image", SLICE: b"GIF89a", total - 1: b""}
    packed = [pack_record(record(n, images=[wrong[n]] if n in wrong else [])) for n in range(total)]
    written(tmp_path / "train", *packed)
    one, two = (verify(str(tmp_path), workers) for workers in (1, 2))
    assert one == two
    assert [problem.split("(id ")[1].split(")")[0] for problem in one.problems] == [f"'s{n}'" for n in wrong]
    assert [f": sample {n} " in problem for n, problem in zip(wrong, one.problems, strict=True)] == [True] * 3
    assert counts(one) == (1, total, 3)


def test_an_index_that_lists_other_samples_than_the_shard_holds(out: Path) -> None:
    index = json.loads((out / "train" / "index.json").read_text())
    index["shards"][0]["samples"] = 1
    (out / "train" / "index.json").write_text(json.dumps(index))
    assert "shard.00000.mds: says that it holds 2 samples, its index says 1" in "\n".join(verify(str(out)).problems)


def test_compressed_shards_are_a_problem(tmp_path: Path) -> None:
    written(tmp_path / "train", pack_record(record(0)), compression="zstd")
    (problem,) = verify(str(tmp_path)).problems
    assert problem.endswith("shard.00000.mds: it is compressed (zstd); write it anew without compression")


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("column", ["mine", "type"])
def test_a_pickle_is_never_opened(tmp_path: Path, column: str) -> None:
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
    r"index.json is no index of MDS shards \(JSONDecodeError: .*char ": lambda p: p.write_text(p.read_text()[:-20]),
    r"index.json is no index of MDS shards \(TypeError": lambda p: p.write_text("[]"),
    r"index.json lists no shards": lambda p: p.write_text('{"version": 2, "shards": []}'),
    r"train/None: .*is damaged": edited(lambda shard: shard["raw_data"].pop("basename") and None),
    r"shard.00000.mds: what the index says of it is damaged \(AssertionError": edited(lambda s: s.update(version=3)),
    r"shard.00000.mds: its format is 'json'; allowed is 'mds'": edited(lambda shard: shard.update(format="json")),
    r"shard.00000.mds: its columns are .*; needed are ": edited(lambda s: s["column_encodings"].__setitem__(0, "int")),
    r"shard.00000.mds: the index holds no xxh64 hash": edited(lambda shard: shard["raw_data"].update(hashes={})),
    r"shard.00000.mds: what .* damaged \(TypeError": edited(lambda shard: shard.update(samples="2")),
    r"shard.00000.mds: the index says that it has -1 samples": edited(lambda shard: shard.update(samples=-1)),
}


@pytest.mark.parametrize("message", INDEXES)
def test_a_damaged_index_is_a_problem_and_the_other_split_is_looked_at(out: Path, message: str) -> None:
    ensure_shards(out / "val", lambda: [record(0)], 1)
    INDEXES[message](out / "train" / "index.json")
    found = verify(str(out))
    assert len(found.problems) == 1
    with pytest.raises(DataError, match=message):
        raise DataError(found.problems[0])
    assert found.images in (1, 5)  # what the index still says is looked at


def test_a_conversion_that_was_cut_short_is_a_problem(out: Path) -> None:
    (out / "train" / "index.json").unlink()
    (out / "train" / "conversion.json").write_text("{}")
    for folder in (out, out / "train"):
        (problem,) = verify(str(folder)).problems
        assert problem == f"{out}/train/index.json: there is no such file: the conversion was cut short; run it again"


def test_folders_without_shards_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: there is no such folder; give the folder that"):
        verify(str(tmp_path / "nowhere"))
    (tmp_path / "empty" / "deep").mkdir(parents=True)
    with pytest.raises(DataError, match=r"empty: neither index\.json nor a folder with one is in there"):
        verify(str(tmp_path / "empty"))


def sent(out: Path, url: str) -> None:
    send(out, url, [str(path.relative_to(out)) for path in out.rglob("*.*") if path.is_file()])


def test_shards_in_a_bucket(out: Path, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    sent(out, f"{bucket}/out")
    here = verify(str(out))
    for url in (f"{bucket}/out", f"{bucket}/out/train", f"{bucket}/out/"):
        there = verify(url, 2)
        assert (counts(there), there.bytes, there.problems) == (counts(here), here.bytes, [])
    assert list((tmp_path / "temporary").iterdir()) == []


def test_problems_in_a_bucket_are_named_with_their_url(out: Path, bucket: str) -> None:
    change(out / "train" / "shard.00000.mds", 2_000, b"other")
    sent(out, f"{bucket}/out")
    (out / "train" / "shard.00001.mds").unlink()
    sent(out, f"{bucket}/less")
    assert f"{bucket}/out/train/shard.00000.mds: does not have the xxh64 hash" in verify(f"{bucket}/out").problems[0]
    lacking = verify(f"{bucket}/less")
    assert any(f"{bucket}/less/train/shard.00001.mds cannot be fetched" in problem for problem in lacking.problems)
    assert counts(lacking) == (3, 4, 4)
    with pytest.raises(DataError, match=r"nowhere/index\.json cannot be fetched"):
        verify(f"{bucket}/nowhere")


@pytest.mark.long
def test_a_killed_process_ends_it_with_an_error(out: Path) -> None:
    (out / "train" / "shard.00002.mds").unlink()
    os.mkfifo(out / "train" / "shard.00002.mds")  # who opens it waits for a writer that never comes
    code = f"from ssmvl.data.inspection.verify import verify; verify({str(out)!r}, 1)"
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) as process:
        children: list[psutil.Process] = []
        while not children and process.poll() is None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.05)
            children = psutil.Process(process.pid).children()
        children[0].send_signal(signal.SIGKILL)
        assert process.stderr
        said = process.communicate(timeout=60)[1]
    assert "DataError: a process was killed" in said
    assert process.returncode == 1


def test_the_screen_shows_the_first_problems_and_how_many_there_are() -> None:
    found = Found("here", 1, 1, 0, 10, [f"problem {number}" for number in range(SHOWN + 7)])
    lines = str(found).splitlines()
    assert lines[SHOWN - 1 :] == [
        f"problem {SHOWN - 1}",
        "… and 7 more",
        f"here: 1 shard, 1 sample, 0 images, 10 bytes: {SHOWN + 7} problems found",
    ]
