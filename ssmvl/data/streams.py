"""Shards as a stream of samples: what training iterates over and evaluation reads."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from time import time_ns
from typing import Any

import numpy as np
import torch
from streaming import Stream as MosaicStream
from streaming import StreamingDataLoader, StreamingDataset
from streaming.base.dataset import _ShardState
from streaming.base.distributed import get_local_world_size, get_world_size
from streaming.base.format import reader_from_json

from ssmvl.data.cache import ShardError, fetch_shard
from ssmvl.data.mix import Loader
from ssmvl.data.shards import unpack_record
from ssmvl.data.shared_memory import prefix_lock
from ssmvl.data.workers import cores
from ssmvl.errors import DataError
from ssmvl.interfaces import Data, Shards, Stream
from ssmvl.processing.batch import collate
from ssmvl.processing.processor import Processor

PATIENCE = 100  # damaged samples in a row that are skipped


class SampleStream(StreamingDataset):
    """Samples of shards, each rank its own part, resumable at the sample.

    Args:
        data: what a dataset gave.
        processor: makes samples of records; in a stream with a prompt of its own, with that.
        **options: of `StreamingDataset`, e.g. `batch_size`, `shuffle`, `shuffle_seed`.

    Raises:
        DataError: the shards cannot be streamed so.
    """

    def __init__(self, data: Data, processor: Processor, **options: Any) -> None:
        streams = _streams(data)
        self._where = describe(data)
        self.processor = processor
        self._processors = [replace(processor, prompt=s.prompt) if s.prompt else processor for s in streams]
        self._failure: BaseException | None = None
        self._prepared: set[int] = set()  # shards that this process has seen there
        try:
            with prefix_lock():
                super().__init__(streams=[_checked(stream) for stream in streams], **options)
        except (OSError, ValueError, RuntimeError) as error:
            if "Reused local directory" in str(error):
                what = "another run on this machine, or another stream of this mix, reads the same folder"
                raise DataError(f"{self._where}: {what}; give one of the two another (of a bucket: cache)") from error
            raise DataError(f"{self._where}: cannot be streamed: {error}") from error

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """This process's samples of the next epoch.

        Raises:
            ShardError: a shard cannot be fetched; streaming alone would end the epoch as if it were over.
            DataError: too many samples in a row cannot be used.
        """
        yield from super().__iter__()
        if hasattr(self, "_event") and self._event.is_set():
            raise self._shard_error()

    def __getitem__(self, at: int) -> dict[str, Any]:
        """The sample at an index of the whole data set, or the next one that can be used.

        Its `damaged` is [id, reason] of the sample that was asked for if it stands in for it, else empty.

        Raises:
            ShardError: a shard cannot be fetched or read.
            DataError: `PATIENCE` samples in a row cannot be used.
        """
        damaged: list[str] = []
        for number in range(int(at), int(at) + PATIENCE):
            place = number % self.size
            shard, in_shard = self.spanner[place]
            name = f"number {in_shard} of {self.shards[shard].raw_data.basename}"
            try:
                record = unpack_record(self._stored(place))
                name = str(record["id"])
                processor = self._processors[self.stream_per_shard[shard]]
                sample = processor.encode(record["conversation"], record["images"], train=True)
            except ShardError:
                raise
            except (ValueError, LookupError, TypeError) as error:  # a DataError is a ValueError
                reason = str(error) if isinstance(error, DataError) else f"{type(error).__name__}: {error}"
                damaged = damaged or [name, reason]  # the next ones are named when they are asked for
            else:
                return {**sample, "id": record["id"], "type": record["type"], "damaged": damaged}
        raise DataError(f"{PATIENCE} samples in a row cannot be used, the first is sample {': '.join(damaged)}")

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """Fetch a shard if it is not there.

        Processes that wait for one that cannot be had would wait for ever. Told that it is there, they look, and try to
        fetch it themselves.

        A thread of streaming's asks ahead for the shard of every sample, and locks a file for each, which takes longer
        than to decode a small image. Where this process has seen the shard there and it was not evicted, it is answered
        without. The sample itself may still find that the file was deleted, and asks again, blocking.
        """
        if not blocking and shard_id in self._prepared and self._shard_states[shard_id] == _ShardState.LOCAL:
            self._shard_access_times[shard_id] = time_ns()
            return
        try:
            super().prepare_shard(shard_id, blocking)
            if self._shard_states[shard_id] == _ShardState.LOCAL:  # not where another process is at it
                self._prepared.add(shard_id)
        except (ShardError, ValueError) as error:
            self._failure = error
            self._shard_states[shard_id] = _ShardState.LOCAL
            raise

    def on_exception(self, future: Future[None]) -> None:
        """Keep the failure of a thread for the iterator to raise, where streaming would print it."""
        if error := future.exception():
            self._failure = self._failure or error
            self._event.set()

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """Where the epoch stands; see `StreamingDataset`.

        Composer asks after an epoch too, when it has set its count of the epoch's samples back to none. Streaming
        takes that for the beginning of the epoch that is over, which would then be trained again.
        """
        state = super().state_dict(num_samples, from_beginning)
        over = from_beginning and num_samples == 0
        return {**state, "epoch": state["epoch"] + 1} if over else state

    def _stored(self, place: int) -> dict[str, Any]:
        try:
            return self.get_item(place)
        except (OSError, RuntimeError) as error:
            self._failure = self._failure or error
            raise self._shard_error() from error

    def _shard_error(self) -> ShardError:
        if isinstance(self._failure, ShardError):
            return self._failure
        return ShardError(f"{self._where}: {self._failure}")


class TrainLoader(StreamingDataLoader):
    """Batches of a `SampleStream`.

    With several ranks an error ends the epoch of this one, and `failure` says why: where each would raise alone, the
    others would wait for it. A single rank raises.
    """

    failure = ""

    def __iter__(self) -> Iterator[Any]:
        """The batches of an epoch, or of what is left of it."""
        try:
            for batch in super().__iter__():
                yield {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in batch.items()}
        except DataError as error:  # from a worker with its traceback
            text = str(error).rpartition(f"\n{type(error).__module__}.{type(error).__qualname__}: ")[2].rstrip()
            if get_world_size() == 1:
                raise type(error)(text) from error.__cause__
            self.failure = text


class _Checked(MosaicStream):
    """A stream whose shards come whole and as their index says, or not at all."""

    def prepare_shard(self, shard: Any) -> int:
        fetched = 0
        try:
            for files in shard.file_pairs:
                there = [file for file in files if file and (Path(self.local) / file.basename).is_file()]
                if self.remote and not there:
                    wanted = files[1] or files[0]
                    fetch_shard(self.remote, Path(self.local), vars(wanted))
                    fetched += wanted.bytes
            return fetched + super().prepare_shard(shard)
        except ShardError:
            raise
        except Exception as error:  # whatever streaming raises for a shard that is not there
            raise ShardError(f"{self.remote or self.local}: {error}") from error


def train_loader(
    data: Data, processor: Processor, *, batch: int, seed: int, loader: Loader | None = None
) -> TrainLoader:
    """Ragged batches of `batch` samples for this rank; the last of an epoch may be shorter.

    Args:
        data: what a dataset gave.
        processor: makes samples of records.
        batch: samples of one batch.
        seed: of the order.
        loader: how; as the defaults of `Loader` if None.

    Raises:
        DataError: there is not one whole batch for each rank, or a cache has a limit that it cannot keep.
    """
    loader = loader or Loader()
    if loader.cache_limit and not all(isinstance(stream.source, Shards) for stream in _streams(data)):
        raise DataError(f"{describe(data)}: cache_limit would delete shards that are not in a bucket; leave it out")
    stream = SampleStream(
        data,
        processor,
        batch_size=batch,
        shuffle=loader.shuffle,
        shuffle_seed=seed,
        num_canonical_nodes=loader.num_canonical_nodes,
        cache_limit=loader.cache_limit,
    )
    if len(stream) < batch:
        raise DataError(f"{describe(data)}: {len(stream)} samples for this rank are less than its batch of {batch}")
    workers = _workers() if loader.workers is None else loader.workers
    return TrainLoader(
        stream,
        batch_size=batch,
        collate_fn=_collate,
        num_workers=workers,
        persistent_workers=workers > 0,
    )


def read_records(data: Data) -> list[dict[str, Any]]:
    """All records, in order, stream after stream, images undecoded. No other process is asked or waited for.

    Raises:
        DataError: a shard is missing or compressed, or its bytes cannot be taken apart; hashes are not looked at,
            but for what is fetched.
    """
    return [record for stream in _streams(data) for record in _read(stream.source)]


def first_record(data: Data) -> dict[str, Any]:
    """The first record, its images undecoded.

    Raises:
        DataError: the shards are empty or damaged; see `read_records`.
    """
    found = next((record for stream in _streams(data) for record in _read(stream.source)), None)
    if found is None:
        raise DataError(f"the shards in {describe(data)} hold no records")
    return found


def describe(data: Data) -> str:
    """Where data lie, for messages."""
    sources = (stream.source for stream in _streams(data))
    return ", ".join(source.remote if isinstance(source, Shards) else str(source) for source in sources)


def _read(source: Path | Shards) -> Iterator[dict[str, Any]]:
    folder = source.local if isinstance(source, Shards) else source
    shards = json.loads((folder / "index.json").read_text())["shards"]
    if isinstance(source, Shards):
        for shard in shards:
            if not (folder / shard["raw_data"]["basename"]).is_file():
                fetch_shard(source.remote, folder, shard["raw_data"])
    # as streaming's LocalDataset does, which leaves the index file open
    readers = [reader_from_json(str(folder), None, shard) for shard in shards]
    try:
        yield from (unpack_record(reader[at]) for reader in readers for at in range(len(reader)))
    except (OSError, ValueError, IndexError) as error:
        raise DataError(f"{folder}: a shard cannot be read, or only as compressed ({error}); write it anew") from error


def _streams(data: Data) -> list[Stream]:
    return data if isinstance(data, list) else [Stream(data)]


def _checked(stream: Stream) -> _Checked:
    weight = {"proportion": stream.proportion, "repeat": stream.repeat, "choose": stream.choose}
    if isinstance(stream.source, Shards):
        return _Checked(remote=stream.source.remote, local=str(stream.source.local), **weight)
    return _Checked(local=str(stream.source), **weight)


def _collate(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A batch, but its numbers as arrays: a worker sends them in its message, and each tensor as a file of its own."""
    return {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in collate(samples).items()}


def _workers() -> int:
    mine = cores() // get_local_world_size()
    return 0 if mine < 4 else min(8, mine - 2)
