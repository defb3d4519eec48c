"""Shards as a stream of samples."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ssmvl.batch import Batch
from ssmvl.data.scenes import digit_scenes
from ssmvl.data.shards import ensure_shards
from ssmvl.data.streams import SampleStream, read_records, train_loader
from ssmvl.errors import DataError
from ssmvl.interfaces import ImageSpec
from ssmvl.text.processor import Processor
from ssmvl.text.prompts import MambaPrompt
from ssmvl.text.tokenizers import byte_tokenizer

SPEC, SIZE = ImageSpec(8), 14
PROCESSOR = Processor(byte_tokenizer(), MambaPrompt(), (SPEC,), places=2)


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


def shards_of(folder: Path, *records: dict[str, Any]) -> Path:
    ensure_shards(folder, lambda: records, len(records))
    return folder


def record(name: str, *texts: str, images: tuple[bytes, ...] = ()) -> dict[str, Any]:
    talk = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return {"id": name, "type": "", "conversation": talk, "images": list(images)}


def test_one_epoch_brings_every_sample_once(folder: Path) -> None:
    batches = epoch(folder)
    assert [len(batch["ids"]) for batch in batches] == [7, 7]
    assert sorted(names(batches)) == sorted(f"train-{i}" for i in range(SIZE))


def test_last_short_batch_is_left_out(folder: Path) -> None:
    batches = epoch(folder, batch=4)
    assert [len(batch["ids"]) for batch in batches] == [4, 4, 4]
    assert len(set(names(batches))) == 12


def test_batches_are_ragged_and_hold_the_processors_samples(folder: Path) -> None:
    records = {record["id"]: record for record in read_records(folder)}
    for batch in epoch(folder):
        assert len({len(ids) for ids in batch["ids"]}) > 1
        assert batch["num_images"] == [1] * 7
        for i, name in enumerate(batch["sample_ids"]):
            sample = PROCESSOR.encode(records[name]["conversation"], records[name]["images"])
            assert torch.equal(batch["ids"][i], sample["ids"])
            assert torch.equal(batch["labels"][i], sample["labels"])
            assert torch.equal(batch["images"][SPEC][i], sample["images"][SPEC][0])


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
        (record("bad-7", "q"), "nothing to learn"),
        (record("bad-7", "<image>", "x"), "1 <image> marks"),
        (record("bad-7", "q", "x", images=(b"no image",)), "cannot be decoded"),
    ],
)
def test_sample_that_cannot_be_used_is_named(tmp_path: Path, bad: dict[str, Any], reason: str) -> None:
    folder = shards_of(tmp_path / "s", bad, record("good", "q", "x"))
    with pytest.raises(DataError, match=f"sample bad-7: .*{reason}"):
        epoch(folder, batch=2)


def test_records_of_a_shard_that_is_missing(tmp_path: Path) -> None:
    folder = shards_of(tmp_path / "shards", record("a", "Why?", "So."))
    (folder / "shard.00000.mds").unlink()
    with pytest.raises(DataError, match=r"shards: a shard cannot be read.*shard\.00000\.mds.*write it anew"):
        read_records(folder)
