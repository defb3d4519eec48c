"""Building of models from recipes, with or without weights."""

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
        recipe: a name, a YAML file, the directory of a saved model, a recipe, or the result of `ssmvl.check`.
        overrides: such as `"model.connector.scan_order=csm"`, applied in order.
        device: device of the parameters; `meta` builds shapes only.
        dtype: of the parameters; None means fp32.
        weights: `none` keeps initial weights and downloads nothing. `recipe` loads the weights named by the recipe's
            parts. Anything else is a checkpoint of a whole model in a layout registered as a `checkpoint`: a file, a
            directory or a Hub id. The prefix `unwrap:` strips the prefixes of wrappers from its tensor names. Encoders
            that are missing from the checkpoint load their own weights. If the recipe of a saved model is next to the
            weights, it must describe the same encoders, fusion, connector and language model.
        verify: whether the files of a directory are compared with the digests saved with them (`SHA256SUMS`). This
            reads them once more; False skips it, for a huge model.

    Returns:
        The model, in training mode.

    Raises:
        RecipeError: the recipe has mistakes; lists all of them, before any weight is allocated.
        CheckpointError: weights are missing or do not fit.
    """
    blueprint = Blueprint.of(recipe, *overrides)
    if device is not None and torch.device(device).type == "meta":
        if weights != "none":
            raise CheckpointError(f"a model on meta has no weights, but weights is {str(weights)!r}")
        with torch.device("meta"), _default_dtype(dtype):
            return blueprint.assemble() if blueprint is recipe or dtype else blueprint.model
    load_own = weights != "none"
    if not isinstance(weights, list):
        weights = opened_weights(blueprint, weights, verify=verify)
    complete = any(opened.fills_model for opened in weights)
    with torch.device(device or "cpu"), _default_dtype(dtype), _NoInitialValues() if complete else nullcontext():
        model = blueprint.assemble()
    for opened in weights:
        opened.copy_into(model)
    for encoder in model.encoders.values() if load_own and not complete else ():
        if hasattr(encoder, "load_weights"):  # an encoder written for ssmvl 0.1
            encoder.load_weights()
    return model


def opened_weights(blueprint: Blueprint, name: str | Path, *, verify: bool = True) -> StartingWeights:
    """Open a model's pretrained weights and compare them with the model, before any weight is allocated.

    Args:
        blueprint: of the model.
        name: see `build_model`.
        verify: see `build_model`.

    Raises:
        CheckpointError: a file is missing or does not fit.
    """
    weights = starting_weights(blueprint.model, name, verify=verify)
    for opened in weights:
        if opened.layout is NATIVE_LAYOUT:  # saved by ssmvl
            require_same_model(Path(opened.source).with_name("recipe.yaml"), blueprint)
        opened.check(blueprint.model.get_submodule(opened.part))
    return weights


def build_processor(recipe: Recipe | Blueprint, model: VisionLanguageModel, folder: Path | None = None) -> Processor:
    """Create the processor of a model.

    Args:
        recipe: names the prompt and the tokenizer.
        model: determines the number of image places per image; may be on `meta`.
        folder: directory of a saved model, whose tokenizer is used instead of the recipe's.

    Raises:
        CheckpointError: the tokenizer cannot be found, downloaded or read.
        ContractError: the tokenizer and the language model have different numbers of ids.
    """
    return Blueprint.of(recipe).processor_for(model, folder)


def require_same_settings(model: nn.Module, described: VisionLanguageModel) -> None:
    """Check that a model has the settings of its recipe that tensors do not show.

    Args:
        model: the model to save; its parts may be wrapped.
        described: the recipe's model, on `meta`.

    Raises:
        CheckpointError: settings differ, such as the eps of a norm; lists all of them.
    """
    wrapper = re.compile(r"(^|\.)(_orig_mod|module)(?=\.|$)")  # of torch.compile and data parallelism
    settings = {wrapper.sub("", name).lstrip("."): value for name, value in module_settings(model).items()}
    needed = {name: value for name, value in module_settings(described).items() if name in settings}
    own = {name: settings[name] for name in needed}
    require_same("the model's settings differ from those of its recipe", own, needed, other="the recipe")


def require_same_model(path: Path, blueprint: Blueprint) -> None:
    """Compare a model with the recipe saved next to its weights, if that exists: shapes do not show everything.

    Raises:
        CheckpointError: the saved recipe describes a different model, or cannot be built.
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
        raise CheckpointError(f"{path}, the recipe saved with the weights, cannot be built: {error}") from error
    require_same(
        f"{path.parent} holds weights of a different model than {recipe.source}",
        _answer_settings(blueprint.model),
        _answer_settings(other),
        "change the recipe to match the saved one, or build from the directory itself",
    )


def _answer_settings(model: VisionLanguageModel) -> dict[str, object]:
    """Return the settings that answers depend on. Scan orders are compared by their paths, not their names."""
    settings = module_settings(model)
    for part in ("language", *(f"encoders.{name}" for name in model.encoders)):
        settings.pop(f"{part}.weights", None)
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, PathTables):
                settings[f"{name}.{key}.order"] = _Order(settings[f"{name}.{key}.order"], value)
    return settings


class _Order:
    """A scan order that equals any other with the same paths."""

    def __init__(self, name: object, tables: PathTables) -> None:
        self.name, self.paths = name, tables(tables.grid, torch.device("cpu")).order.tolist()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Order) and self.paths == other.paths

    def __repr__(self) -> str:
        return repr(self.name)


@contextmanager
def _default_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    """Create parameters directly in `dtype`, not in fp32 first, which could take twice the memory.

    The default dtype applies to all threads, so models are built one at a time.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class _NoInitialValues(TorchFunctionMode):
    """Skips random initialization, for models whose weights are all overwritten."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in RANDOM:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))
