"""Open a split of a dataset and check the returned shards."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ssmvl.errors import ContractError, DataError, SsmvlError, foreign
from ssmvl.interfaces import Data, Shards, Stream


def open_data(dataset: Callable[..., Data], split: str) -> Data:
    """Return the shards of a split. The dataset writes or fetches them if necessary.

    Args:
        dataset: a registered dataset with its options bound.
        split: `train` or `test`.

    Raises:
        DataError: the dataset fails, or its directory holds no shards.
        ContractError: the dataset returns something other than shards.
    """
    name = _name(dataset)
    try:
        data = dataset(split=split)
    except (SsmvlError, MemoryError):
        raise
    except (Exception, SystemExit) as error:  # third-party code may raise anything
        raise DataError(f"{name} fails for the split {split!r}: {foreign(error)}") from error
    streams = data if isinstance(data, list) and data and all(isinstance(stream, Stream) for stream in data) else []
    sources: list[Any] = [stream.source for stream in streams] or [data]
    for source in sources:
        if not isinstance(source, Path | Shards):
            expected = "must return a Path, Shards or a list of Stream"
            raise ContractError(f"{name} {expected} for the split {split!r}, returned {data!r}")
        folder = source.local if isinstance(source, Shards) else source
        if not (folder / "index.json").is_file():
            raise DataError(f"{name} returns {folder} for the split {split!r}, which holds no shards (no index.json)")
    return data


def require_batch(data: Data, batch: int, where: str) -> None:
    """Check that the shards hold at least one batch. Mixes with weights are left to the loader.

    Raises:
        DataError: they hold fewer samples than one batch.
    """
    streams = data if isinstance(data, list) else [Stream(data)]
    if any((stream.proportion, stream.repeat, stream.choose) != (None, None, None) for stream in streams):
        return
    sources = (stream.source for stream in streams)
    folders = [source.local if isinstance(source, Shards) else source for source in sources]
    indices = [json.loads((folder / "index.json").read_text()) for folder in folders]
    count = sum(shard["samples"] for index in indices for shard in index["shards"])
    if count < batch:
        raise DataError(
            f"{where}: the data hold {count} samples, fewer than one batch of {batch}; choose a smaller batch"
        )


def _name(dataset: Any) -> str:
    while hasattr(dataset, "func"):  # partial
        dataset = dataset.func
    return str(getattr(dataset, "__name__", dataset))
