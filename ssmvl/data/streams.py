"""Shards as a stream of samples: what training iterates over and evaluation reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from streaming import StreamingDataLoader, StreamingDataset
from streaming.base.format import reader_from_json

from ssmvl.batch import collate
from ssmvl.data.shards import unpack
from ssmvl.errors import DataError
from ssmvl.text.processor import Processor


class SampleStream(StreamingDataset):
    """Samples of a folder of shards, each rank its own part, resumable at the sample.

    Args:
        folder: of the shards.
        processor: makes samples of records.
        **options: of `StreamingDataset`, e.g. `batch_size`, `shuffle`, `shuffle_seed`.
    """

    def __init__(self, folder: Path, processor: Processor, **options: Any) -> None:
        super().__init__(local=str(folder), **options)
        self.processor = processor

    def __getitem__(self, at: int) -> Any:
        """The sample at an index of the whole data set.

        Raises:
            DataError: it cannot be used; names the sample.
        """
        record = unpack(super().__getitem__(at))
        try:
            sample = self.processor.encode(record["conversation"], record["images"], train=True)
        except DataError as error:
            raise DataError(f"sample {record['id']}: {error}") from error
        return {**sample, "id": record["id"], "type": record["type"]}


def train_loader(folder: Path, processor: Processor, *, batch: int, seed: int) -> StreamingDataLoader:
    """Shuffled ragged batches of `batch` samples for this rank; the last short batch of an epoch is left out.

    Raises:
        DataError: there is not one whole batch for each rank.
    """
    stream = SampleStream(folder, processor, batch_size=batch, shuffle=True, shuffle_seed=seed)
    if len(stream) < batch:
        raise DataError(f"{folder}: {len(stream)} samples for this rank are less than its batch of {batch}")
    return StreamingDataLoader(stream, batch_size=batch, collate_fn=collate, drop_last=True)


def read_records(folder: Path) -> list[dict[str, Any]]:
    """All records of a folder of shards, in order, images undecoded. No other process is asked or waited for.

    Raises:
        DataError: a shard is missing or compressed, or its bytes cannot be taken apart; hashes are not looked at.
    """
    shards = json.loads((folder / "index.json").read_text())["shards"]
    # as streaming's LocalDataset does, which leaves the index file open
    readers = [reader_from_json(str(folder), None, shard) for shard in shards]
    try:
        return [unpack(reader[at]) for reader in readers for at in range(len(reader))]
    except (OSError, ValueError, IndexError) as error:
        raise DataError(f"{folder}: a shard cannot be read, or only as compressed ({error}); write it anew") from error
