"""Open the split of a dataset, and check what it returns."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ssmvl.errors import ContractError, DataError, SsmvlError, foreign
from ssmvl.interfaces import Data, Shards, Stream


def open_data(dataset: Callable[..., Data], split: str) -> Data:
    """The shards of a split, written or fetched if need be.

    Args:
        dataset: a registered dataset, its options bound.
        split: `train` or `test`.

    Raises:
        DataError: the folder holds no shards, or the dataset fails.
        ContractError: it returns something other than shards.
    """
    name = _name(dataset)
    try:
        data = dataset(split=split)
    except (SsmvlError, MemoryError):
        raise
    except (Exception, SystemExit) as error:  # foreign code may raise anything
        raise DataError(f"{name} fails for the split {split!r}: {foreign(error)}") from error
    streams = data if isinstance(data, list) and data and all(isinstance(one, Stream) for one in data) else []
    sources: list[Any] = [stream.source for stream in streams] or [data]
    for source in sources:
        if not isinstance(source, Path | Shards):
            what = "must give a Path, Shards or a list of Stream"
            raise ContractError(f"{name} {what} for the split {split!r}, gave {data!r}")
        folder = source.local if isinstance(source, Shards) else source
        if not (folder / "index.json").is_file():
            raise DataError(f"{name} gives {folder} for the split {split!r}, which holds no shards (no index.json)")
    return data


def require_batch(data: Data, batch: int, where: str) -> None:
    """Check that shards hold at least one batch of samples; a mix whose streams are weighted is left to the loader.

    Raises:
        DataError: they do not.
    """
    streams = data if isinstance(data, list) else [Stream(data)]
    if any((stream.proportion, stream.repeat, stream.choose) != (None, None, None) for stream in streams):
        return
    folders = [one.source.local if isinstance(one.source, Shards) else one.source for one in streams]
    indices = [json.loads((folder / "index.json").read_text()) for folder in folders]
    count = sum(shard["samples"] for index in indices for shard in index["shards"])
    if count < batch:
        raise DataError(
            f"{where}: the data hold {count} samples, fewer than a batch of {batch}; choose a smaller batch"
        )


def _name(dataset: Any) -> str:
    while hasattr(dataset, "func"):  # partial
        dataset = dataset.func
    return str(getattr(dataset, "__name__", dataset))
