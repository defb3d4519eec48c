"""Models built from recipes, with or without weights."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ssmvl.checkpoints.layouts import NATIVE_LAYOUT
from ssmvl.checkpoints.modules import module_settings, require_same
from ssmvl.errors import CheckpointError, RecipeError
from ssmvl.layers.paths import PathTables
from ssmvl.model.blueprint import Blueprint
from ssmvl.model.loading import StartingWeights, starting_weights
from ssmvl.model.vlm import VisionLanguageModel
from ssmvl.processing.processor import Processor
from ssmvl.recipes.merge import Recipe, load_recipe
from ssmvl.recipes.norm_groups import write_out

__all__ = ["build_model", "build_processor"]

RANDOM = (
    "uniform_",
    "normal_",
    "trunc_normal_",
    "xavier_uniform_",
    "xavier_normal_",
    "kaiming_uniform_",
    "kaiming_normal_",
)


def build_model(
    recipe: str | Path | Recipe | Blueprint,
    *overrides: str,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    weights: str | Path | StartingWeights = "none",
    verify: bool = True,
) -> VisionLanguageModel:
    """Build the model of a recipe.

    Args:
        recipe: a name, a YAML file, a saved folder, a recipe, or what `ssmvl.check` returns.
        overrides: `"model.connector.scan_order=csm"`, applied one by one.
        device: where the parameters lie; `meta` builds shapes only.
        dtype: of the parameters, fp32 if None.
        weights: `none` keeps initial weights and fetches nothing. `recipe` loads those that the recipe's parts name.
            Anything else is a checkpoint of a whole model, in a layout that is registered as a `checkpoint`: a file, a
            folder, or an id in the hub, after `unwrap:` if the prefixes of wrappers are to be stripped from its names.
            Encoders that such a file does not hold load their own. Where the recipe that a model was saved with lies
            beside its weights, it must describe the same encoders, fusion, connector and language model.
        verify: whether a folder's files are compared with the digests they were saved with (`SHA256SUMS`). That reads
            them once more: False saves it for a huge model.

    Returns:
        The model, in training mode.

    Raises:
        RecipeError: every mistake of the recipe, before any weight is allocated.
        CheckpointError: weights are missing or do not fit.
    """
    blueprint = Blueprint.of(recipe, *overrides)
    if device is not None and torch.device(device).type == "meta":
        if weights != "none":
            raise CheckpointError(f"a model on meta holds no weights, but weights={str(weights)!r} was asked for")
        with torch.device("meta"), _default_dtype(dtype):
            return blueprint.assemble() if blueprint is recipe or dtype else blueprint.model
    weights_named = weights != "none"
    if not isinstance(weights, list):
        weights = opened_weights(blueprint, weights, verify=verify)
    everything = any(one.fills_model for one in weights)
    with torch.device(device or "cpu"), _default_dtype(dtype), _NoInitialValues() if everything else nullcontext():
        model = blueprint.assemble()
    for one in weights:
        one.copy_into(model)
    for encoder in model.encoders.values() if weights_named and not everything else ():
        if hasattr(encoder, "load_weights"):  # as ssmvl 0.1 had them
            encoder.load_weights()
    return model


def opened_weights(blueprint: Blueprint, name: str | Path, *, verify: bool = True) -> StartingWeights:
    """The files that a model starts from, opened and compared with the model, before any weight is allocated.

    Args:
        blueprint: of the model.
        name: see `build_model`.
        verify: see `build_model`.

    Raises:
        CheckpointError: a file is missing or does not fit.
    """
    opened = starting_weights(blueprint.model, name, verify=verify)
    for one in opened:
        if one.layout is NATIVE_LAYOUT:  # written by us
            require_same_model(Path(one.source).with_name("recipe.yaml"), blueprint)
        one.check(blueprint.model.get_submodule(one.part))
    return opened


def build_processor(recipe: Recipe | Blueprint, model: VisionLanguageModel, folder: Path | None = None) -> Processor:
    """The processor of a model.

    Args:
        recipe: names the prompt and the tokenizer.
        model: states how many places an image needs; may be on `meta`.
        folder: a saved folder, whose own tokenizer is used.

    Raises:
        CheckpointError: the tokenizer cannot be found, fetched or read.
        ContractError: the tokenizer has another number of ids than the language model.
    """
    return Blueprint.of(recipe).processor_for(model, folder)


def require_same_settings(model: nn.Module, described: VisionLanguageModel) -> None:
    """Check that a model, whose parts may be wrapped, has the settings of its recipe, which tensors do not show.

    Args:
        model: to be saved.
        described: the model of the recipe, on `meta`.

    Raises:
        CheckpointError: a setting differs, such as the eps of a norm; names each.
    """
    wrapper = re.compile(r"(^|\.)(_orig_mod|module)(?=\.|$)")  # of torch.compile and of data parallel
    ours = {wrapper.sub("", name).lstrip("."): value for name, value in module_settings(model).items()}
    given = {name: value for name, value in module_settings(described).items() if name in ours}
    own = {name: ours[name] for name in given}
    require_same("the model has other settings than its recipe", own, given, other="the recipe")


def require_same_model(path: Path, blueprint: Blueprint) -> None:
    """Compare with the recipe that our own weights were saved with, if it is there: shapes do not show everything.

    Raises:
        CheckpointError: that recipe describes another model, or cannot be built.
    """
    if not path.is_file():
        return
    recipe = blueprint.recipe
    text = {name: recipe.data["model"][name] for name in ("prompt", "tokenizer")}  # no weight depends on them
    try:
        saved = load_recipe(path)
        described = Recipe({"model": {**saved.data["model"], **text}}, str(path))
        if write_out(described.data["model"]) == write_out(recipe.data["model"]):
            return
        other = Blueprint.of(described).model
    except RecipeError as error:
        raise CheckpointError(f"{path}, which the weights were saved with, cannot be built: {error}") from error
    require_same(
        f"{path.parent} holds weights of another model than {recipe.source}",
        _what_counts(blueprint.model),
        _what_counts(other),
        "write into the recipe what they were saved with, or build from the folder itself",
    )


def _what_counts(model: VisionLanguageModel) -> dict[str, object]:
    """The settings that answers depend on; of a scan order its paths, whatever it is called."""
    found = module_settings(model)
    for part in ("language", *(f"encoders.{name}" for name in model.encoders)):
        found.pop(f"{part}.weights", None)
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, PathTables):
                found[f"{name}.{key}.order"] = _Order(found[f"{name}.{key}.order"], value)
    return found


class _Order:
    """A scan order, equal to another that gives the same paths."""

    def __init__(self, name: object, tables: PathTables) -> None:
        self.name, self.paths = name, tables(tables.grid, torch.device("cpu")).order.tolist()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Order) and self.paths == other.paths

    def __repr__(self) -> str:
        return repr(self.name)


@contextmanager
def _default_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    """Parameters are made in `dtype`, never in fp32 first: a model that fits is not built at twice its size.

    It is torch's default for all threads, so models are built one at a time.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class _NoInitialValues(TorchFunctionMode):
    """Leaves out the drawing of random values, where every one of them is overwritten."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in RANDOM:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))
