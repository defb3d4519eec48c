"""Streams of samples from shards, for training and evaluation."""

from __future__ import annotations

import atexit
import json
import signal
import weakref
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
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from ssmvl.data.cache import ShardError, fetch_shard
from ssmvl.data.mix import Loader
from ssmvl.data.shards import unpack_record
from ssmvl.data.shared_memory import prefix_lock
from ssmvl.data.workers import at_most_cores, cores
from ssmvl.errors import DataError
from ssmvl.interfaces import Data, Shards, Stream
from ssmvl.processing.batch import collate
from ssmvl.processing.processor import Processor

PATIENCE = 100  # consecutive samples to try before damage is an error


class SampleStream(StreamingDataset):
    """Stream of each rank's share of the samples in shards. Resuming is exact to the sample.

    Args:
        data: shards returned by a dataset.
        processor: makes samples from records; a stream with its own prompt uses that instead of the processor's.
        **options: options of `StreamingDataset`, e.g. `batch_size`, `shuffle`, `shuffle_seed`.

    Raises:
        DataError: the shards cannot be streamed with these options.
    """

    def __init__(self, data: Data, processor: Processor, **options: Any) -> None:
        streams = _streams(data)
        self._source = describe(data)
        self.processor = processor
        self._processors = [replace(processor, prompt=s.prompt) if s.prompt else processor for s in streams]
        self._failure: BaseException | None = None
        self._prepared: set[int] = set()  # shards that this process has seen on disk
        try:
            with prefix_lock():
                super().__init__(streams=[_checked_stream(stream) for stream in streams], **options)
        except (OSError, ValueError, RuntimeError) as error:
            if "Reused local directory" in str(error):
                problem = "another run on this machine, or another stream of this mix, reads the same directory"
                advice = "use a different directory for one of them (for a bucket: a different `cache`)"
                raise DataError(f"{self._source}: {problem}; {advice}") from error
            raise DataError(f"{self._source}: cannot be streamed: {error}") from error

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield this process's samples of the next epoch.

        Raises:
            ShardError: a shard cannot be fetched. Streaming alone would end the epoch early, without an error.
            DataError: `PATIENCE` consecutive samples are damaged.
        """
        yield from super().__iter__()
        if hasattr(self, "_event") and self._event.is_set():
            raise self._shard_error()

    def __getitem__(self, at: int) -> dict[str, Any]:
        """Return the sample at an index of the whole dataset; if it is damaged, the next usable one.

        The field `damaged` is [id, reason] of the sample at the index if another one replaces it, else empty.

        Raises:
            ShardError: a shard cannot be fetched or read.
            DataError: `PATIENCE` consecutive samples are damaged.
        """
        damaged: list[str] = []
        for number in range(int(at), int(at) + PATIENCE):
            index = number % self.size
            shard, in_shard = self.spanner[index]
            name = f"number {in_shard} of {self.shards[shard].raw_data.basename}"
            try:
                record = unpack_record(self._read_item(index))
                name = str(record["id"])
                processor = self._processors[self.stream_per_shard[shard]]
                sample = processor.encode(record["conversation"], record["images"], train=True)
            except ShardError:
                raise
            except (ValueError, LookupError, TypeError) as error:  # a DataError is a ValueError
                reason = str(error) if isinstance(error, DataError) else f"{type(error).__name__}: {error}"
                damaged = damaged or [name, reason]  # damage of later samples is reported at their own index
            else:
                return {**sample, "id": record["id"], "type": record["type"], "damaged": damaged}
        raise DataError(f"{PATIENCE} consecutive samples are damaged, starting with sample {': '.join(damaged)}")

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """Fetch a shard unless it is on disk.

        A shard that cannot be fetched is marked as present, so that waiting processes try to fetch it themselves.

        A thread of streaming requests the shard of every sample in advance and locks a file each time, which is slower
        than decoding a small image. The lock is skipped if this process has seen the shard on disk and it was not
        evicted. If the file was deleted nevertheless, reading the sample requests it again, blocking.
        """
        if not blocking and shard_id in self._prepared and self._shard_states[shard_id] == _ShardState.LOCAL:
            self._shard_access_times[shard_id] = time_ns()
            return
        try:
            super().prepare_shard(shard_id, blocking)
            if self._shard_states[shard_id] == _ShardState.LOCAL:  # false while another process fetches it
                self._prepared.add(shard_id)
        except (ShardError, ValueError) as error:
            self._failure = error
            self._shard_states[shard_id] = _ShardState.LOCAL
            raise

    def on_exception(self, future: Future[None]) -> None:
        """Store the failure of a thread, so that the iterator raises it. Streaming would only print it."""
        if error := future.exception():
            self._failure = self._failure or error
            self._event.set()

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """Return the position in the epoch; see `StreamingDataset`.

        Composer also calls this at the end of an epoch, after resetting its count of the epoch's samples to zero.
        Streaming would take that for the beginning of the finished epoch, and the epoch would be trained again.
        """
        state = super().state_dict(num_samples, from_beginning)
        epoch_ended = from_beginning and num_samples == 0
        return {**state, "epoch": state["epoch"] + 1} if epoch_ended else state

    def _read_item(self, index: int) -> dict[str, Any]:
        try:
            return self.get_item(index)
        except (OSError, RuntimeError) as error:
            self._failure = self._failure or error
            raise self._shard_error() from error

    def _shard_error(self) -> ShardError:
        if isinstance(self._failure, ShardError):
            return self._failure
        return ShardError(f"{self._source}: {self._failure}")


class TrainLoader(StreamingDataLoader):
    """Batches of a `SampleStream`.

    With a single rank, errors are raised. With several, an error ends this rank's epoch and its text is stored in
    `failure`, because the other ranks would wait for one that raises.
    """

    failure = ""

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches of an epoch, or its remaining ones after resuming."""
        try:
            for batch in super().__iter__():
                yield {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in batch.items()}
        except DataError as error:  # the text of an error from a worker includes its traceback
            text = str(error).rpartition(f"\n{type(error).__module__}.{type(error).__qualname__}: ")[2].rstrip()
            if get_world_size() == 1:
                raise type(error)(text) from error.__cause__
            self.failure = text


class _Checked(MosaicStream):
    """Stream whose shards are fetched atomically and must match their index."""

    def prepare_shard(self, shard: Any) -> int:
        fetched = 0
        try:
            for files in shard.file_pairs:
                cached = [file for file in files if file and (Path(self.local) / file.basename).is_file()]
                if self.remote and not cached:
                    file = files[1] or files[0]
                    fetch_shard(self.remote, Path(self.local), vars(file))
                    fetched += file.bytes
            return fetched + super().prepare_shard(shard)
        except ShardError:
            raise
        except Exception as error:  # streaming raises various errors for a missing shard
            raise ShardError(f"{self.remote or self.local}: {error}") from error


def train_loader(
    data: Data, processor: Processor, *, batch: int, seed: int, loader: Loader | None = None
) -> TrainLoader:
    """Return a loader of ragged batches for this rank. The last batch of an epoch may be smaller.

    Args:
        data: shards returned by a dataset.
        processor: makes samples from records.
        batch: samples per batch.
        seed: seed of the order.
        loader: loader options; None means the defaults of `Loader`.

    Raises:
        DataError: there is less than one batch per rank, or the cache limit is too small or not applicable.
    """
    loader = loader or Loader()
    if loader.cache_limit and not all(isinstance(stream.source, Shards) for stream in _streams(data)):
        raise DataError(f"{describe(data)}: cache_limit would delete shards that are not in a bucket; omit it")
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
        raise DataError(f"{describe(data)}: {len(stream)} samples for this rank are fewer than its batch of {batch}")
    workers = _default_workers() if loader.workers is None else at_most_cores(loader.workers)
    train = TrainLoader(
        stream,
        batch_size=batch,
        collate_fn=_collate,
        num_workers=workers,
        worker_init_fn=_ignore_signals,
        persistent_workers=workers > 0,
    )
    atexit.register(_stop_workers, weakref.ref(train))
    return train


def _ignore_signals(_: int) -> None:
    """Leave Ctrl-C and SIGTERM, which reach every process of a group, to the training process: it stops the workers."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _stop_workers(loader: weakref.ref[TrainLoader]) -> None:
    """End the workers at exit, where multiprocessing would send a SIGTERM, which they ignore, and wait for them."""
    iterator = getattr(loader(), "_iterator", None)
    if isinstance(iterator, _MultiProcessingDataLoaderIter):
        iterator._shutdown_workers()


def read_records(data: Data) -> list[dict[str, Any]]:
    """Return all records in order, stream by stream, without decoding images or communicating with other processes.

    Raises:
        DataError: a shard is missing or compressed, or cannot be parsed. Hashes are checked only for fetched shards.
    """
    return [record for stream in _streams(data) for record in _read(stream.source)]


def first_record(data: Data) -> dict[str, Any]:
    """Return the first record, without decoding its images.

    Raises:
        DataError: the shards are empty or damaged; see `read_records`.
    """
    record = next((record for stream in _streams(data) for record in _read(stream.source)), None)
    if record is None:
        raise DataError(f"the shards in {describe(data)} hold no records")
    return record


def describe(data: Data) -> str:
    """Return the paths and URLs of shards, for messages."""
    sources = (stream.source for stream in _streams(data))
    return ", ".join(source.remote if isinstance(source, Shards) else str(source) for source in sources)


def _read(source: Path | Shards) -> Iterator[dict[str, Any]]:
    folder = source.local if isinstance(source, Shards) else source
    shards = json.loads((folder / "index.json").read_text())["shards"]
    if isinstance(source, Shards):
        for shard in shards:
            if not (folder / shard["raw_data"]["basename"]).is_file():
                fetch_shard(source.remote, folder, shard["raw_data"])
    # as streaming's LocalDataset reads them, but that leaves the index file open
    readers = [reader_from_json(str(folder), None, shard) for shard in shards]
    try:
        yield from (unpack_record(reader[at]) for reader in readers for at in range(len(reader)))
    except (OSError, ValueError, IndexError) as error:
        raise DataError(f"{folder}: a shard is missing, damaged or compressed ({error}); write it again") from error


def _streams(data: Data) -> list[Stream]:
    return data if isinstance(data, list) else [Stream(data)]


def _checked_stream(stream: Stream) -> _Checked:
    weight = {"proportion": stream.proportion, "repeat": stream.repeat, "choose": stream.choose}
    if isinstance(stream.source, Shards):
        return _Checked(remote=stream.source.remote, local=str(stream.source.local), **weight)
    return _Checked(local=str(stream.source), **weight)


def _collate(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Make a batch with its numbers as arrays. A worker sends arrays within its message, but each tensor as a file."""
    return {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in collate(samples).items()}


def _default_workers() -> int:
    rank_cores = cores() // get_local_world_size()
    return 0 if rank_cores < 4 else min(8, rank_cores - 2)
