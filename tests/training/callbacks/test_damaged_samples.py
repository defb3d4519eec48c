"""Training from a bucket, and with damaged samples."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import two_ranks

import ssmvl
from ssmvl.data import shards
from ssmvl.data.cache import ShardError
from ssmvl.data.remote import send
from ssmvl.data.scenes.scenes import digit_scenes
from ssmvl.data.shards import ensure_shards
from ssmvl.data.streams import read_records
from ssmvl.errors import DataError
from ssmvl.training import run
from ssmvl.training.callbacks import damaged_samples

pytestmark = pytest.mark.filterwarnings("default")  # Composer and streaming warn by themselves
Composer = Callable[..., subprocess.Popen[str]]
NAME = "shard.00003.mds"


def scenes(folder: Path, size: int, *bad: int) -> Path:
    """Write digit scenes in small shards; samples at the indices `bad` have no valid image."""
    records = read_records(digit_scenes("train", train_size=size, folder="scenes"))
    records = [{**record, "images": [b"none"]} if i in bad else record for i, record in enumerate(records)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_BYTES", 4000)
        ensure_shards(folder, lambda: records, size)
    assert (folder / NAME).is_file()
    return folder


def only(data: str, *options: str) -> list[str]:
    """Return overrides for one stage with these data and no evaluation."""
    stage = "stages.finetune"
    return ["stages.align=null", "stages.order=null", "evaluation=null", f"{stage}.data={data}"] + [
        f"{stage}.{option}" for option in options
    ]


def listed(run: str) -> list[dict[str, Any]]:
    path = Path("runs") / run / "finetune" / "damaged.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def remote(tiny: Path, bucket: str) -> str:
    """Data node of a recipe: 32 digit scenes in a bucket."""
    folder = scenes(tiny.parent / "data" / "train", 32)
    send(folder, f"{bucket}/data/train", sorted(path.name for path in folder.iterdir()))
    return f"{{name: shards, folder: {bucket}/data, cache: cache}}"


def flip(tiny: Path, bucket: str) -> None:
    data = bytearray((tiny.parent / "data" / "train" / NAME).read_bytes())
    data[len(data) // 2] ^= 1
    bad = tiny.parent / "bad"
    bad.mkdir()
    (bad / NAME).write_bytes(data)
    send(bad, f"{bucket}/data/train", [NAME])


@pytest.mark.slow
def test_training_from_a_bucket_equals_training_from_a_directory(tiny: Path, remote: str) -> None:
    local = f"{{name: shards, folder: {tiny.parent / 'data'}}}"
    models = {}
    for name, data in (("remote", remote), ("local", local)):
        stages = [
            f"stages.{stage}.{key}" for stage in ("align", "finetune") for key in (f"data={data}", "duration=2ba")
        ]
        folder = ssmvl.train(tiny, f"run={name}", "evaluation=null", *stages)
        models[name] = (folder / "model" / "model.safetensors").read_bytes()
    assert models["remote"] == models["local"]
    assert len(list(Path("cache").rglob("*.mds"))) > 3


@pytest.mark.slow
@pytest.mark.parametrize("ranks", ["1", "2"])
def test_a_damaged_shard_in_the_bucket_ends_every_rank(
    tiny: Path, remote: str, bucket: str, composer: Composer, ranks: str
) -> None:
    flip(tiny, bucket)
    process = composer("-n", ranks, "tiny.yaml", *only(remote, "duration=1ep"))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 2, output
    assert f"error: {bucket}/data/train/{NAME} is damaged: it does not match its xxh64 hash" in output
    assert "Traceback" not in output


def test_a_missing_shard_in_the_bucket_is_named(tiny: Path, remote: str, bucket: str) -> None:
    index = tiny.parent / "data" / "train" / "index.json"
    index.write_text(index.read_text().replace(NAME, "shard.gone.mds"))
    send(index.parent, f"{bucket}/data/train", ["index.json"])
    with pytest.raises(ShardError, match=rf"{bucket}/data/train/shard\.gone\.mds cannot be fetched"):
        ssmvl.train(tiny, *only(remote, "duration=1ep"))


@pytest.mark.long
def test_damaged_samples_are_replaced_listed_and_counted(tiny: Path) -> None:
    scenes(Path("data/train"), 200, 5, 70)  # 1%, which is allowed
    options = only("{name: shards, folder: data}", "duration=2ep", "loader.workers=1", "batch=20", "checkpoint=1ep")
    output, _ = two_ranks(lambda: ssmvl.train(tiny, *options), tiny.parent)
    assert sorted((line["epoch"], line["id"]) for line in listed("tiny")) == [
        (epoch, name) for epoch in (0, 1) for name in ("train-5", "train-70")
    ]
    assert all("cannot be decoded" in line["reason"] for line in listed("tiny"))
    for epoch in (1, 2):
        assert f"epoch {epoch}: 2 of 200 samples were damaged (1.00%) and replaced: train-" in output
    assert "damaged samples in the whole stage: 4" in output


@pytest.mark.long
def test_too_many_damaged_samples_end_every_rank(tiny: Path) -> None:
    scenes(Path("data/train"), 40, 5, 7)

    def train() -> None:
        assert run.main(["tiny.yaml", *only("{name: shards, folder: data}", "duration=5ep")]) == 2

    for output in two_ranks(train, tiny.parent):
        assert "error: epoch 1: 2 of 40 samples were damaged (5.00%) and replaced: train-" in output
        assert "at most 1.00% may be damaged (max_damaged)" in output
        assert "Traceback" not in output
    assert {line["id"] for line in listed("tiny")} == {"train-5", "train-7"}


def test_too_many_damaged_samples_end_a_second_launch_too(tiny: Path) -> None:
    """The stage ends between two counts: its last checkpoint must not be that of a finished stage."""
    scenes(Path("data/train"), 40, 5, 7)
    for _ in range(2):
        with pytest.raises(DataError, match=r"of 40 samples were damaged"):
            ssmvl.train(tiny, *only("{name: shards, folder: data}", "duration=5ba", "checkpoint=1ba"))
        assert not (Path("runs") / "tiny" / "model").exists()


@pytest.mark.long
def test_samples_are_counted_once_after_resuming(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run is stopped in the second epoch, with more samples in the file than in its checkpoint."""
    monkeypatch.setattr(damaged_samples, "WINDOW", 1)
    scenes(Path("data/train"), 32, 3, 4)
    options = only("{name: shards, folder: data}", "batch=8", "checkpoint=3ba", "max_damaged=0.1")

    class KilledError(Exception):
        pass

    def stop(self: Any, state: Any, logger: Any) -> None:
        if state.timestamp.batch.value == 8:
            raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(damaged_samples.DamagedSamples, "batch_checkpoint", stop, raising=False)
        with pytest.raises(KilledError):
            ssmvl.train(tiny, "run=killed", *options, "stages.finetune.duration=3ep")
    assert checkpoint("killed")["callbacks"]["DamagedSamples"]["stage"] < len(listed("killed")) == 4
    ssmvl.train(tiny, "run=killed", *options, "stages.finetune.duration=3ep")
    ssmvl.train(tiny, "run=uninterrupted", *options, "stages.finetune.duration=3ep")
    names = [[(line["epoch"], line["id"]) for line in listed(run)] for run in ("killed", "uninterrupted")]
    assert names[0] == names[1]
    assert len(names[0]) == 6


def test_a_checkpoint_at_the_end_of_an_epoch_points_to_the_next(tiny: Path) -> None:
    scenes(Path("data/train"), 32)
    options = only("{name: shards, folder: data}", "batch=8", "checkpoint=1ep", "warmup=0ba")
    ssmvl.train(tiny, "run=one-epoch", *options, "stages.finetune.duration=1ep")
    state = checkpoint("one-epoch")["dataset_state"]["train"]
    assert (state["epoch"], state["sample_in_epoch"]) == (1, 0)


def checkpoint(run: str) -> dict[str, Any]:
    """Return the state in the latest checkpoint of a run."""
    path = max((Path("runs") / run / "finetune" / "checkpoints").glob("ep*.pt"))
    return dict(torch.load(path, weights_only=False)["state"])


def test_one_damaged_sample_in_a_small_epoch_is_too_many(tiny: Path) -> None:
    scenes(Path("data/train"), 40, 5)
    with pytest.raises(
        DataError, match=r"1 of 40 samples were damaged \(2\.50%\) and replaced: train-5; at most 1\.00%"
    ):
        ssmvl.train(tiny, *only("{name: shards, folder: data}", "duration=1ep"))
