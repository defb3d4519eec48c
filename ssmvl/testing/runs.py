"""The checks of what a run is made of: data sets and recipes."""

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
    """Each split is shards whose records can all be trained on; asked again, nothing is written.

    Every record is read, so ask for a small data set:
    `check_dataset(functools.partial(my_data, train_size=8, test_size=8, folder=str(tmp_path)))`.

    Args:
        dataset: called with `split`; gives the folder, or what else `ssmvl.interfaces.Data` is.
        splits: those that the data set has.

    Raises:
        ContractError: it is not; names the split, and the record.
        MissingDependencyError: mosaicml-streaming is not installed.
    """
    splits_of: dict[Path, str] = {}
    for split in splits:
        what = f"{name_of(dataset)}({split!r})"
        folders = _folders(_opened(dataset, split))
        for folder in folders:
            require(folder not in splits_of, f"{what} gives the folder of {splits_of.get(folder)!r}: {folder}")
            splits_of[folder] = split
        for place in folders.values():
            _check_records(what, _read(what, place))
        before = [_files(folder) for folder in folders]
        again = _folders(_opened(dataset, split))
        changed = f"{what} gives another folder when asked again: {_named(folders)}, then {_named(again)}"
        require(again == folders, changed)
        written = f"{what} writes {_named(folders)} again when asked again; it must stay as it is"
        require([_files(folder) for folder in again] == before, written)


def check_recipe(recipe: str | Path | Recipe) -> None:
    """Every name and option of the recipe is right, and its parts fit together; no weight is allocated.

    `check_recipe("my_recipe")`.

    Args:
        recipe: a name, a YAML file, or a recipe.

    Raises:
        RecipeError: every mistake.
    """
    from ssmvl.training.checked import check

    check(recipe)


def _opened(dataset: Callable[..., Data], split: str) -> Data:
    try:
        return open_data(dataset, split)
    except DataError as error:
        raise ContractError(str(error)) from error


def _folders(data: Data) -> dict[Path, Path | Shards]:
    """The folders on this machine, each with the place that it belongs to."""
    places = [stream.source for stream in data] if isinstance(data, list) else [data]
    return {place.local if isinstance(place, Shards) else place: place for place in places}


def _named(folders: Iterable[Path]) -> str:
    return ", ".join(map(str, folders))


def _read(what: str, place: Path | Shards) -> list[dict[str, Any]]:
    from ssmvl.data.shards import COLUMNS, require_streaming

    require_streaming()
    from ssmvl.data.streams import read_records

    folder = place.local if isinstance(place, Shards) else place
    index = folder / "index.json"
    require(index.is_file(), f"{what}: there are no shards in {folder}; it has no index.json")
    shards = json.loads(index.read_text())["shards"]
    require(sum(shard["samples"] for shard in shards), f"{what}: the shards in {folder} hold no records")
    for shard in shards:
        lacking = sorted(COLUMNS.keys() - set(shard["column_names"]))
        require(not lacking, f"{what}: a shard in {folder} lacks {lacking}; ssmvl.data.shards.ensure_shards writes all")
    return read_records(place)


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
