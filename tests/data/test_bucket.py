"""Shards in a bucket: index, cache, and damaged or missing shards. Uses a real S3 server."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from streaming import StreamingDataset

from ssmvl.data import shards
from ssmvl.data.cache import ShardError
from ssmvl.data.inspection.inspect import inspect
from ssmvl.data.mix import Loader
from ssmvl.data.remote import send
from ssmvl.data.shards import ensure_shards, existing_shards
from ssmvl.data.streams import SampleStream, read_records, train_loader
from ssmvl.errors import DataError
from ssmvl.interfaces import ImageSpec, Shards
from ssmvl.processing.processor import Processor
from ssmvl.processing.prompts import MambaPrompt
from ssmvl.processing.tokenizers import byte_tokenizer

PROCESSOR = Processor(byte_tokenizer(), MambaPrompt(), (ImageSpec(8),), tokens_per_image=2)
TALK = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "x"}]
Objects = Callable[[], dict[str, bytes]]


@pytest.fixture
def sent(tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Return a function: `sent("a")` writes twelve samples a0, a1, … to the bucket and returns the directory's URL."""
    monkeypatch.setattr(shards, "SHARD_BYTES", 600)

    def put(name: str) -> str:
        records = [{"id": f"{name}{i}", "type": "", "conversation": TALK, "images": []} for i in range(12)]
        ensure_shards(tmp_path / name, lambda: records, 12)
        files = sorted(path.name for path in (tmp_path / name).iterdir())
        assert len(files) > 3
        send(tmp_path / name, f"{bucket}/data/train", files)
        return f"{bucket}/data"

    return put


def open_shards(url: str, tmp_path: Path) -> Shards:
    data = existing_shards("train", folder=url, cache=str(tmp_path / "cache"))
    assert isinstance(data, Shards)
    return data


def names(data: Shards, **options: object) -> list[str]:
    loader = train_loader(data, PROCESSOR, batch=4, seed=0, loader=Loader(**{"workers": 0, **options}))
    return sorted(name for batch in loader for name in batch["sample_ids"])


def damage(url: str, shard: str, tmp_path: Path) -> None:
    """Flip one byte of a shard in the bucket."""
    (tmp_path / "bad").mkdir()
    data = bytearray((tmp_path / "a" / shard).read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "bad" / shard).write_bytes(data)
    send(tmp_path / "bad", f"{url}/train", [shard])


def test_opening_fetches_only_the_index_and_reading_the_shards(sent: Callable[[str], str], tmp_path: Path) -> None:
    data = open_shards(sent("a"), tmp_path)
    assert data.local.parent.parent == tmp_path / "cache"
    assert sorted(path.name for path in data.local.iterdir()) == ["fetched_from", "index.json"]
    assert names(data) == sorted(f"a{i}" for i in range(12))
    for shard in (tmp_path / "a").glob("*.mds"):
        assert (data.local / shard.name).read_bytes() == shard.read_bytes()


def test_records_are_fetched_and_read_in_order(sent: Callable[[str], str], tmp_path: Path) -> None:
    data = open_shards(sent("a"), tmp_path)
    assert read_records(data) == read_records(tmp_path / "a")
    assert read_records(data) == read_records(tmp_path / "a")  # from the cache


def test_the_cache_has_a_directory_for_each_url(
    sent: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    url = sent("a")
    first = existing_shards("train", folder=url)
    assert isinstance(first, Shards)
    assert first.remote == f"{url}/train"
    assert first.local.is_relative_to(tmp_path / "home" / ".cache" / "ssmvl" / "shards")
    assert existing_shards("train", folder=url + "/") == first


def test_new_data_at_the_same_url_empty_the_cache(sent: Callable[[str], str], tmp_path: Path) -> None:
    url = sent("a")
    read_records(open_shards(url, tmp_path))
    assert sent("b") == url
    data = open_shards(url, tmp_path)
    assert not list(data.local.glob("*.mds"))
    assert [record["id"] for record in read_records(data)] == [f"b{i}" for i in range(12)]


def test_two_buckets_share_a_cache(sent: Callable[[str], str], tmp_path: Path, bucket: str) -> None:
    one = open_shards(sent("a"), tmp_path)
    read_records(one)
    send(tmp_path / "a", f"{bucket}/other/train", [path.name for path in (tmp_path / "a").iterdir()])
    other = open_shards(f"{bucket}/other", tmp_path)
    assert other.local != one.local
    assert len(list(one.local.glob("*.mds"))) > 2


def test_a_truncated_file_in_the_cache_is_fetched_again(sent: Callable[[str], str], tmp_path: Path) -> None:
    url = sent("a")
    data = open_shards(url, tmp_path)
    before = read_records(data)
    shard = data.local / "shard.00001.mds"
    shard.write_bytes(shard.read_bytes()[:-1])
    (data.local / ".shard.00002.mds.123.partial").write_bytes(b"of a killed run")
    assert read_records(open_shards(url, tmp_path)) == before
    assert not list(data.local.glob("*.partial"))


def test_unchanged_data_stay_in_the_cache(sent: Callable[[str], str], tmp_path: Path) -> None:
    url = sent("a")
    read_records(open_shards(url, tmp_path))
    assert len(list(open_shards(url, tmp_path).local.glob("*.mds"))) > 2


def test_a_directory_that_is_not_a_cache_is_never_emptied(sent: Callable[[str], str], tmp_path: Path) -> None:
    url = sent("a")
    mine = open_shards(url, tmp_path).local / "mine.txt"
    mine.with_name("fetched_from").unlink()
    mine.write_text("mine")
    with pytest.raises(DataError, match=r"/train holds files that did not come from a bucket; set `cache` to another"):
        open_shards(url, tmp_path)
    assert mine.read_text() == "mine"


def test_a_cache_for_a_local_directory_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a local directory; omit `cache`"):
        existing_shards("train", folder=str(tmp_path), cache="somewhere")


def test_a_missing_directory_or_bucket_is_named(bucket: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"{bucket}/none/train/index\.json cannot be fetched"):
        open_shards(f"{bucket}/none", tmp_path)
    with pytest.raises(DataError, match=r"s3://no-such-bucket/x/train/index\.json cannot be fetched"):
        open_shards("s3://no-such-bucket/x", tmp_path)


def test_an_index_with_a_file_outside_its_directory_is_rejected(
    sent: Callable[[str], str], tmp_path: Path, bucket: str
) -> None:
    url = sent("a")
    index = tmp_path / "a" / "index.json"
    index.write_text(index.read_text().replace('"shard.00001.mds"', '"../../shard.00001.mds"'))
    send(tmp_path / "a", f"{url}/train", ["index.json"])
    with pytest.raises(DataError, match=r"lists '\.\./\.\./shard\.00001\.mds', which is outside"):
        open_shards(url, tmp_path)
    with pytest.raises(DataError, match=r"shard\.00001\.mds: the index lists a file outside its directory"):
        inspect(url, None, 0, None)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_shard_is_named_and_not_cached(sent: Callable[[str], str], tmp_path: Path, workers: int) -> None:
    url = sent("a")
    damage(url, "shard.00001.mds", tmp_path)
    data = open_shards(url, tmp_path)
    with pytest.raises(ShardError, match=rf"^{url}/train/shard\.00001\.mds is damaged: .* match its xxh64 hash"):
        names(data, workers=workers)
    assert not list(data.local.glob("*00001*"))
    with pytest.raises(ShardError, match=rf"^{url}/train/shard\.00001\.mds is damaged: .* match its xxh64 hash"):
        read_records(data)


def test_a_missing_shard_is_named(sent: Callable[[str], str], tmp_path: Path, bucket: str) -> None:
    url = sent("a")
    index = tmp_path / "a" / "index.json"
    index.write_text(index.read_text().replace('"shard.00001.mds"', '"shard.gone.mds"'))
    send(tmp_path / "a", f"{url}/train", ["index.json"])
    with pytest.raises(ShardError, match=rf"{url}/train/shard\.gone\.mds cannot be fetched"):
        names(open_shards(url, tmp_path))


def test_the_cache_limit_is_enforced(sent: Callable[[str], str], tmp_path: Path) -> None:
    data = open_shards(sent("a"), tmp_path)
    shutil.copy(data.local / "index.json", tmp_path / "index.json")
    with pytest.raises(DataError, match=r"(?i)data/train: cannot be streamed: .*cache limit"):
        names(data, cache_limit="1kb")
    stream = train_loader(data, PROCESSOR, batch=4, seed=0, loader=Loader(workers=0, cache_limit="3500")).dataset
    assert isinstance(stream, SampleStream)
    cached = []
    for shard in [0, 1, 2, 3, 0]:  # one by one, because streaming counts a shard only after it was fetched
        stream.prepare_shard(shard)
        cached.append(sorted(path.name[-5] for path in data.local.glob("*.mds")))
    assert cached == [["0"], ["0", "1"], ["0", "1", "2"], ["1", "2", "3"], ["0", "2", "3"]]
    for _ in range(2):
        assert names(data, cache_limit="3500") == sorted(f"a{i}" for i in range(12))


def test_a_deleted_shard_is_fetched_again_and_others_are_not_locked(
    sent: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = open_shards(sent("a"), tmp_path)
    locked: list[int] = []
    streaming = StreamingDataset.prepare_shard

    def counted(stream: StreamingDataset, shard_id: int, blocking: bool = True) -> None:
        locked.append(shard_id)
        streaming(stream, shard_id, blocking)

    monkeypatch.setattr(StreamingDataset, "prepare_shard", counted)
    loader = train_loader(data, PROCESSOR, batch=4, seed=0, loader=Loader(workers=0))
    for epoch in range(3):
        locked.clear()
        assert sorted(name for batch in loader for name in batch["sample_ids"]) == sorted(f"a{i}" for i in range(12))
        assert epoch == 0 or 1 <= len(locked) < 12  # for the deleted shard, not for every sample
        next(data.local.glob("*.mds")).unlink()
