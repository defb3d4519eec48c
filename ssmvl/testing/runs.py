"""The checks of what a run is made of: data sets and recipes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ssmvl.errors import ContractError, DataError
from ssmvl.interfaces import ImageSpec
from ssmvl.recipe import Recipe, load_recipe
from ssmvl.testing.common import name_of, require
from ssmvl.text.processor import Processor
from ssmvl.text.prompts import MambaPrompt
from ssmvl.text.tokenizers import byte_tokenizer


def check_dataset(dataset: Callable[..., Path], *, splits: Sequence[str] = ("train", "test")) -> None:
    """Each split is a folder of shards whose records can all be trained on; asked again, nothing is written.

    Every record is read, so ask for a small data set:
    `check_dataset(functools.partial(my_data, train_size=8, test_size=8, folder=str(tmp_path)))`.

    Args:
        dataset: called with `split`; gives the folder.
        splits: those that the data set has.

    Raises:
        ContractError: it is not; names the split, and the record.
        MissingDependencyError: mosaicml-streaming is not installed.
    """
    folders: dict[Path, str] = {}
    for split in splits:
        what = f"{name_of(dataset)}({split!r})"
        folder = dataset(split=split)
        require(isinstance(folder, Path), f"{what} must give a Path, gave {folder!r}")
        require(folder not in folders, f"{what} gives the folder of {folders.get(folder)!r}: {folder}")
        folders[folder] = split
        _check_records(what, _read(what, folder))
        before = _files(folder)
        again = dataset(split=split)
        require(again == folder, f"{what} gives another folder when asked again: {folder}, then {again}")
        require(_files(again) == before, f"{what} writes {folder} again when asked again; it must stay as it is")


def check_recipe(recipe: str | Path | Recipe) -> None:
    """Every name and option of the recipe is right, and its parts fit together; no weight is allocated.

    `check_recipe("my_recipe")`.

    Args:
        recipe: a name, a YAML file, or a recipe.

    Raises:
        RecipeError: every mistake.
    """
    from ssmvl.training.stages import check

    check(load_recipe(recipe))


def _read(what: str, folder: Path) -> list[dict[str, Any]]:
    from ssmvl.data.shards import COLUMNS, require_streaming

    require_streaming()
    from ssmvl.data.streams import read_records

    index = folder / "index.json"
    require(index.is_file(), f"{what}: there are no shards in {folder}; it has no index.json")
    shards = json.loads(index.read_text())["shards"]
    require(sum(shard["samples"] for shard in shards), f"{what}: the shards in {folder} hold no records")
    for shard in shards:
        lacking = sorted(COLUMNS.keys() - set(shard["column_names"]))
        require(not lacking, f"{what}: a shard in {folder} lacks {lacking}; ssmvl.data.shards.ensure_shards writes all")
    return read_records(folder)


def _check_records(what: str, records: Sequence[dict[str, Any]]) -> None:
    processor = Processor(byte_tokenizer(), MambaPrompt(), (ImageSpec(8),), places=1)
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
