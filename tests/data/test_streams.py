"""Streams of samples from shards: order, batches, damaged samples, prompts and missing shards."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from streaming import StreamingDataset

from ssmvl.data.cache import ShardError
from ssmvl.data.mix import Loader
from ssmvl.data.scenes.scenes import digit_scenes
from ssmvl.data.shards import ensure_shards
from ssmvl.data.shared_memory import prefix_lock
from ssmvl.data.streams import SampleStream, read_records, train_loader
from ssmvl.errors import DataError
from ssmvl.interfaces import ImageSpec, Shards, Stream
from ssmvl.processing.batch import COUNTS, Batch, collate, num_samples
from ssmvl.processing.processor import Processor
from ssmvl.processing.prompts import MambaPrompt, PlainPrompt
from ssmvl.processing.tokenizers import byte_tokenizer

SPEC, SIZE, POSITIONS = ImageSpec(8), 14, ("label_positions", "image_positions")
PROCESSOR = Processor(byte_tokenizer(), MambaPrompt(), (SPEC,), tokens_per_image=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return digit_scenes("train", train_size=SIZE, folder=str(tmp_path_factory.mktemp("digits")))


def epoch(folder: Path, *, batch: int = 7, seed: int = 0) -> list[Batch]:
    return list(train_loader(folder, PROCESSOR, batch=batch, seed=seed))


def names(batches: list[Batch]) -> list[str]:
    return [name for batch in batches for name in batch["sample_ids"]]


def png(brightness: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (brightness,) * 3).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_worker_sends_the_same_batches(folder: Path) -> None:
    """Images are sent as files, numbers within the message, because receiving a file per tensor takes longer."""
    loaders = [train_loader(folder, PROCESSOR, batch=7, seed=0, loader=Loader(workers=workers)) for workers in (1, 0)]
    for sent, expected in zip(*loaders, strict=True):
        assert not any(sent[key].is_shared() for key in COUNTS)
        assert all(pixels.is_shared() for pixels in sent["images"].values())
        for key in (*COUNTS, "images"):
            torch.testing.assert_close(sent.pop(key), expected.pop(key), rtol=0, atol=0)
        assert sent == expected


def shards_of(folder: Path, *records: dict[str, Any]) -> Path:
    ensure_shards(folder, lambda: records, len(records))
    return folder


def record(name: str, *texts: str, images: tuple[bytes, ...] = ()) -> dict[str, Any]:
    talk = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return {"id": name, "type": "", "conversation": talk, "images": list(images)}


def test_an_epoch_contains_every_sample_once(folder: Path) -> None:
    batches = epoch(folder)
    assert [num_samples(batch) for batch in batches] == [7, 7]
    assert sorted(names(batches)) == sorted(f"train-{i}" for i in range(SIZE))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_last_batch_may_be_shorter(folder: Path, workers: int) -> None:
    loader = train_loader(folder, PROCESSOR, batch=4, seed=0, loader=Loader(workers=workers))
    batches = list(loader)
    assert [num_samples(batch) for batch in batches] == [4, 4, 4, 2]
    assert len(batches) == len(loader)
    assert sorted(names(batches)) == sorted(f"train-{i}" for i in range(SIZE))


def test_batches_are_ragged_and_equal_the_processors_output(folder: Path) -> None:
    records = {record["id"]: record for record in read_records(folder)}
    for batch in epoch(folder):
        assert len(set(batch["num_tokens"])) > 1
        assert batch["num_images"] == [1] * 7
        chosen = [records[name] for name in batch["sample_ids"]]
        expected = collate([PROCESSOR.encode(record["conversation"], record["images"]) for record in chosen])
        assert all(torch.equal(batch[key], expected[key]) for key in ("ids", "labels", *POSITIONS))
        assert torch.equal(batch["images"][SPEC], expected["images"][SPEC])


def test_same_seed_same_order(folder: Path) -> None:
    order = names(epoch(folder, seed=3))
    assert names(epoch(folder, seed=3)) == order
    assert names(epoch(folder, seed=4)) != order
    assert order != [f"train-{i}" for i in range(SIZE)]


def test_epochs_differ_in_order(folder: Path) -> None:
    loader = train_loader(folder, PROCESSOR, batch=7, seed=0)
    first, second = names(list(loader)), names(list(loader))
    assert first != second
    assert sorted(first) == sorted(second)


def test_records_are_read_in_order(folder: Path) -> None:
    records = read_records(folder)
    assert [record["id"] for record in records] == [f"train-{i}" for i in range(SIZE)]
    assert all(isinstance(record["images"][0], bytes) for record in records)


def test_samples_with_several_images_and_none(tmp_path: Path) -> None:
    folder = shards_of(tmp_path / "s", record("a", "q", "x"), record("b", "q", "x", images=(png(10), png(20))))
    stream = SampleStream(folder, PROCESSOR, batch_size=1)
    assert stream[0]["images"][SPEC].shape == (0, 3, 8, 8)
    assert stream[1]["images"][SPEC][:, 0, 0, 0].tolist() == [10, 20]
    assert [stream[i]["id"] for i in range(2)] == ["a", "b"]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (record("bad-7", "q"), "no supervised token in this sample"),
        (record("bad-7", "<image>", "x"), "1 <image> marks"),
        (record("bad-7", "q", "x", images=(b"no image",)), "cannot be decoded"),
        ({**record("bad-7"), "conversation": [{"content": "q"}]}, "message 0 must be"),
    ],
)
def test_a_damaged_sample_is_named_and_replaced_by_the_next(tmp_path: Path, bad: dict[str, Any], reason: str) -> None:
    folder = shards_of(tmp_path / "s", record("a", "q", "x"), bad, record("b", "q", "x"), {**bad, "id": "bad-9"})
    stream = SampleStream(folder, PROCESSOR, batch_size=1)
    assert [stream[index]["id"] for index in range(4)] == ["a", "b", "b", "a"]  # wraps around to the first
    assert [stream[index]["damaged"][:1] for index in range(4)] == [[], ["bad-7"], [], ["bad-9"]]
    assert reason in stream[1]["damaged"][1]
    (batch,) = epoch(folder, batch=4)
    assert sorted(batch["sample_ids"]) == ["a", "a", "b", "b"]
    assert {damaged[0] for damaged in batch["damaged"] if damaged} == {"bad-7", "bad-9"}


def test_each_of_two_consecutive_damaged_samples_is_named_once(tmp_path: Path) -> None:
    folder = shards_of(tmp_path / "s", record("bad-1", "q"), record("bad-2", "q"), record("a", "q", "x"))
    stream = SampleStream(folder, PROCESSOR, batch_size=1)
    assert [(stream[i]["id"], stream[i]["damaged"][:1]) for i in range(3)] == [
        ("a", ["bad-1"]),
        ("a", ["bad-2"]),
        ("a", []),
    ]


def test_a_record_that_cannot_be_parsed_is_damaged(tmp_path: Path) -> None:
    folder = shards_of(tmp_path / "s", record("a", "q", "x"), record("b", "q", "x"))
    shard = folder / "shard.00000.mds"
    shard.write_bytes(shard.read_bytes().replace(b'"role"', b"!role!", 1))
    sample = SampleStream(folder, PROCESSOR, batch_size=1)[0]
    assert sample["id"] == "b"
    name, reason = sample["damaged"]
    assert name == "number 0 of shard.00000.mds"
    assert reason.startswith("JSONDecodeError")


def test_many_consecutive_damaged_samples_are_an_error(tmp_path: Path) -> None:
    folder = shards_of(tmp_path / "s", record("bad-1", "q"), record("bad-2", "q"))
    with pytest.raises(DataError, match=r"100 consecutive samples are damaged, starting with sample bad-\d: no super"):
        epoch(folder, batch=2)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_deleted_shard_is_a_shard_error(tmp_path: Path, workers: int) -> None:
    folder = shards_of(tmp_path / "s", *(record(str(i), "q", "x") for i in range(4)))
    loader = train_loader(folder, PROCESSOR, batch=2, seed=0, loader=Loader(workers=workers))
    (folder / "shard.00000.mds").unlink()
    with pytest.raises(ShardError, match=rf"^{folder}: [^\n]*$"):
        list(loader)


def test_workers_and_canonical_nodes_keep_the_order_of_one_process(folder: Path) -> None:
    expected = names(epoch(folder, batch=3))
    with prefix_lock():
        plain = StreamingDataset(local=str(folder), batch_size=3, shuffle=True, shuffle_seed=0)
    assert [sample["id"] for sample in plain] == expected
    for loader in (Loader(workers=2), Loader(workers=0, num_canonical_nodes=1)):
        for _ in range(2):
            assert names(list(train_loader(folder, PROCESSOR, batch=3, seed=0, loader=loader))) == expected


def test_without_shuffling_samples_keep_their_written_order(folder: Path) -> None:
    loader = train_loader(folder, PROCESSOR, batch=7, seed=0, loader=Loader(workers=0, shuffle=False))
    assert names(list(loader)) == [f"train-{i}" for i in range(SIZE)]


def test_each_stream_has_its_own_prompt(tmp_path: Path) -> None:
    a, b = (shards_of(tmp_path / name, record(name, "q?", "x")) for name in ("a", "b"))
    stream = SampleStream([Stream(a), Stream(b, prompt=PlainPrompt())], PROCESSOR, batch_size=1)
    for sample, prompt in ((stream[0], MambaPrompt()), (stream[1], PlainPrompt())):
        talk = record("", "q?", "x")["conversation"]
        expected = replace(PROCESSOR, prompt=prompt).encode(talk, train=True)
        assert torch.equal(sample["ids"], expected["ids"])
    assert not torch.equal(stream[0]["ids"], stream[1]["ids"])
    assert read_records([Stream(a), Stream(b)]) == read_records(a) + read_records(b)


def test_two_streams_of_one_directory_are_rejected(folder: Path) -> None:
    with pytest.raises(DataError, match="another stream of this mix, reads the same directory"):
        SampleStream([Stream(folder), Stream(folder)], PROCESSOR, batch_size=1)


def test_a_cache_limit_never_deletes_local_shards(folder: Path, tmp_path: Path) -> None:
    for data in (folder, [Stream(folder), Stream(Shards(tmp_path, "s3://b/train"))]):
        with pytest.raises(DataError, match="cache_limit would delete shards"):
            train_loader(data, PROCESSOR, batch=1, seed=0, loader=Loader(cache_limit="1gb"))


def test_reading_records_of_a_missing_shard_is_an_error(tmp_path: Path) -> None:
    folder = shards_of(tmp_path / "shards", record("a", "Why?", "So."))
    (folder / "shard.00000.mds").unlink()
    with pytest.raises(
        DataError, match=r"shards: a shard is missing, damaged or compressed.*shard\.00000\.mds.*write it again"
    ):
        read_records(folder)
