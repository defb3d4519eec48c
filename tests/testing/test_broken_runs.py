"""Broken datasets and recipes that `check_dataset` and `check_recipe` must reject."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from streaming import MDSWriter

from ssmvl.data.shards import ensure_shards
from ssmvl.errors import ContractError, RecipeError
from ssmvl.testing import check_dataset, check_recipe

buffer = io.BytesIO()
Image.new("RGB", (4, 4)).save(buffer, "PNG")
PNG = buffer.getvalue()
COUNTER: Iterator[int] = count()
QUESTION = {"role": "user", "content": "what?"}
ANSWER = {"role": "assistant", "content": "this."}
GOOD: dict[str, Any] = {"id": "a", "type": "", "conversation": [QUESTION, ANSWER], "images": [PNG]}


def records_in(split: str, *, folder: Path, records: Sequence[dict[str, Any]] = (GOOD,)) -> Path:
    ensure_shards(folder / split, lambda: records, len(records))
    return folder / split


def rewrites(split: str, *, folder: Path) -> Path:
    shutil.rmtree(folder / split, ignore_errors=True)
    return records_in(split, folder=folder)


def moves(split: str, *, folder: Path) -> Path:
    return records_in(split, folder=folder / str(next(COUNTER)))


def has_one_split(split: str, *, folder: Path) -> Path:
    return records_in("train", folder=folder)


def is_empty(split: str, *, folder: Path) -> Path:
    return folder


def returns_a_string(split: str, *, folder: Path) -> Any:
    return str(records_in(split, folder=folder))


def has_no_images(split: str, *, folder: Path) -> Path:
    with MDSWriter(out=str(folder / split), columns={"id": "str", "conversation": "json"}) as writer:
        writer.write({"id": "a", "conversation": [QUESTION, ANSWER]})
    return folder / split


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (rewrites, r"rewrites\('train'\) rewrites .*/train on the second call"),
        (moves, r"moves\('train'\) returns another directory on the second call"),
        (has_one_split, r"has_one_split\('test'\) returns the directory of 'train'"),
        (is_empty, r"which holds no shards \(no index.json\)"),
        (returns_a_string, "must return a Path, Shards or a list of Stream for the split 'train', returned '"),
        (has_no_images, r"a shard in .*/train lacks the columns \['image_sizes', 'images', 'type'\]"),
    ],
)
def test_a_broken_dataset_is_rejected(dataset: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ContractError, match=message):
        check_dataset(partial(dataset, folder=tmp_path))


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([GOOD, GOOD], r"records_in\('train'\): two records have the id 'a'"),
        ([GOOD | {"conversation": [ANSWER, QUESTION]}], "record 'a': message 0 must be {'role': 'user'"),
        ([GOOD | {"conversation": [QUESTION]}], "record 'a': no supervised token in this sample"),
        ([GOOD | {"conversation": []}], "record 'a': the conversation is empty"),
        ([GOOD | {"images": [PNG[:40]]}], "record 'a': image bytes: cannot be decoded"),
        ([GOOD | {"images": []}, GOOD | {"id": "b", "images": [b"no image"]}], "record 'b': .* cannot be decoded"),
        ([], "the shards in .*/train have no records"),
    ],
)
def test_a_broken_record_is_rejected(records: list[dict[str, Any]], message: str, tmp_path: Path) -> None:
    with pytest.raises(ContractError, match=message):
        check_dataset(partial(records_in, folder=tmp_path, records=records))


def test_the_unbroken_dataset_passes(tmp_path: Path) -> None:
    check_dataset(partial(records_in, folder=tmp_path))
    check_dataset(partial(has_one_split, folder=tmp_path), splits=["train"])


RECIPE = """
model:
  tokenizer: bytes
  encoders: {one: {name: digit_vit, stem: fine}, two: {name: digit_vit, stem: coarse}}
  fusion: channel
  connector: {name: CONNECTOR, mixer: {name: mamba2, head_dim: HEAD_DIM}}
  language: {name: mamba2_lm, width: 64, num_layers: 1, num_tokens: 257}
  prompt: mamba
stages:
  only: {data: digit_scenes, train: [TRAINED], optimizer: {lr: 1e-3}, batch: 4, duration: 1ba}
"""


def recipe(folder: Path, connector: str = "msc_basic", head_dim: str = "64", trained: str = "connector") -> Path:
    path = folder / "mine.yaml"
    path.write_text(RECIPE.replace("CONNECTOR", connector).replace("HEAD_DIM", head_dim).replace("TRAINED", trained))
    return path


def test_a_recipe_passes(tmp_path: Path) -> None:
    check_recipe(recipe(tmp_path))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"connector": "msc_basis"}, "model.connector: unknown connector 'msc_basis'. Did you mean 'msc_basic'"),
        ({"head_dim": "48"}, "model.connector: head_dim 48 must divide"),
        ({"trained": "conector"}, r"stages.only.train: no parameter of the model is under 'conector'"),
    ],
)
def test_a_broken_recipe_is_rejected(changed: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        check_recipe(recipe(tmp_path, **changed))
