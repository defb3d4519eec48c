"""Checks of datasets and recipes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ssmvl.data.opening import open_data
from ssmvl.errors import ContractError, DataError
from ssmvl.interfaces import Data, ImageSpec, Shards
from ssmvl.processing.processor import Processor
from ssmvl.processing.prompts import MambaPrompt
from ssmvl.processing.tokenizers import byte_tokenizer
from ssmvl.recipes.merge import Recipe
from ssmvl.testing.common import name_of, require


def check_dataset(dataset: Callable[..., Data], *, splits: Sequence[str] = ("train", "test")) -> None:
    """Check that each split consists of shards of trainable records, and that a second call writes nothing.

    Every record is read, so request a small dataset:
    `check_dataset(functools.partial(my_data, train_size=8, test_size=8, folder=str(tmp_path)))`.

    Args:
        dataset: called with `split`; returns the directory, or another form of `ssmvl.interfaces.Data`.
        splits: splits of the dataset.

    Raises:
        ContractError: the dataset violates its contract; names the split and the record.
        MissingDependencyError: mosaicml-streaming is not installed.
    """
    splits_of: dict[Path, str] = {}
    for split in splits:
        what = f"{name_of(dataset)}({split!r})"
        folders = _folders(_open(dataset, split))
        for folder in folders:
            require(folder not in splits_of, f"{what} returns the directory of {splits_of.get(folder)!r}: {folder}")
            splits_of[folder] = split
        for source in folders.values():
            _check_records(what, _read(what, source))
        before = [_files(folder) for folder in folders]
        again = _folders(_open(dataset, split))
        changed = f"{what} returns another directory on the second call: {_join(folders)}, then {_join(again)}"
        require(again == folders, changed)
        rewritten = f"{what} rewrites {_join(folders)} on the second call; existing shards must stay unchanged"
        require([_files(folder) for folder in again] == before, rewritten)


def check_recipe(recipe: str | Path | Recipe) -> None:
    """Check that all names and options of a recipe are valid and its parts fit together. Allocates no weights.

    `check_recipe("my_recipe")`.

    Args:
        recipe: a name, a YAML file, or a recipe.

    Raises:
        RecipeError: the recipe has mistakes; lists all of them.
    """
    from ssmvl.training.checked import check

    check(recipe)


def _open(dataset: Callable[..., Data], split: str) -> Data:
    try:
        return open_data(dataset, split)
    except DataError as error:
        raise ContractError(str(error)) from error


def _folders(data: Data) -> dict[Path, Path | Shards]:
    """Local directory of each source -> the source."""
    sources = [stream.source for stream in data] if isinstance(data, list) else [data]
    return {source.local if isinstance(source, Shards) else source: source for source in sources}


def _join(folders: Iterable[Path]) -> str:
    return ", ".join(map(str, folders))


def _read(what: str, source: Path | Shards) -> list[dict[str, Any]]:
    from ssmvl.data.shards import COLUMNS, require_streaming

    require_streaming()
    from ssmvl.data.streams import read_records

    folder = source.local if isinstance(source, Shards) else source
    index = folder / "index.json"
    require(index.is_file(), f"{what}: no shards in {folder}: index.json is missing")
    shards = json.loads(index.read_text())["shards"]
    require(sum(shard["samples"] for shard in shards), f"{what}: the shards in {folder} have no records")
    for shard in shards:
        missing = sorted(COLUMNS.keys() - set(shard["column_names"]))
        advice = "write shards with ssmvl.data.shards.ensure_shards"
        require(not missing, f"{what}: a shard in {folder} lacks the columns {missing}; {advice}")
    return read_records(source)


def _check_records(what: str, records: Sequence[dict[str, Any]]) -> None:
    processor = Processor(byte_tokenizer(), MambaPrompt(), (ImageSpec(8),), tokens_per_image=1)
    seen: set[str] = set()
    for record in records:
        require(record["id"] not in seen, f"{what}: two records have the id {record['id']!r}")
        seen.add(record["id"])
        try:
            processor.encode(record["conversation"], record["images"], train=True)
        except DataError as error:
            raise ContractError(f"{what}: record {record['id']!r}: {error}") from error


def _files(folder: Path) -> dict[Path, tuple[int, int]]:
    stats = {path: path.stat() for path in folder.rglob("*")}
    return {path: (stat.st_ino, stat.st_mtime_ns) for path, stat in stats.items()}
