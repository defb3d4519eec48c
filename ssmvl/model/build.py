"""The composition root: the only file that knows in which order a model is put together."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ssmvl import interfaces
from ssmvl.checkpoints.layouts import SAME
from ssmvl.checkpoints.modules import module_settings
from ssmvl.errors import CheckpointError, ContractError, Problem, RecipeError, SsmvlError, short
from ssmvl.interfaces import ConnectorPart, EncoderPart, FusionPart, LanguageModelPart, PromptPart
from ssmvl.layers.paths import PathTables
from ssmvl.model.loading import open_weights
from ssmvl.model.vlm import VisionLanguageModel
from ssmvl.processing.processor import Processor
from ssmvl.processing.tokenizers import load_tokenizer
from ssmvl.recipes.binding import bind
from ssmvl.recipes.merge import Recipe, load_recipe

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


@dataclass(frozen=True, kw_only=True)
class ModelParts:
    """The `model:` of a recipe: its fields are the schema.

    Args:
        encoders: by name, in the recipe's order.
        fusion: joins their features.
        connector: makes visual tokens.
        language: reads them, and text.
        prompt: how conversations are written.
        tokenizer: `bytes`, `words`, a path, or the id of a model in the hub.
    """

    encoders: dict[str, EncoderPart]
    fusion: FusionPart
    connector: ConnectorPart
    language: LanguageModelPart
    prompt: PromptPart
    tokenizer: str


def build_model(
    recipe: str | Path | Recipe,
    *overrides: str,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    weights: str | Path = "none",
    verify: bool = True,
) -> VisionLanguageModel:
    """Build the model of a recipe.

    Args:
        recipe: a name, a YAML file, a saved folder, or a recipe.
        overrides: `"model.connector.scan_order=csm"`, applied one by one.
        device: where the parameters lie; `meta` builds shapes only.
        dtype: of the parameters, fp32 if None.
        weights: `none` keeps initial weights and fetches nothing. `recipe` loads those that the recipe's parts name.
            Anything else is a checkpoint of a whole model, in a layout that is registered as a `checkpoint`: a file, a
            folder, or an id in the hub. Encoders that such a file does not hold load their own. Where the recipe that
            a model was saved with lies beside its weights, it must be of the same encoders, fusion, connector and
            language model.
        verify: whether a folder's files are compared with the digests they were saved with (`SHA256SUMS`). That reads
            them once more: False saves it for a huge model.

    Returns:
        The model, in training mode.

    Raises:
        RecipeError: every mistake of the recipe, before any weight is allocated.
        CheckpointError: weights are missing or do not fit.
    """
    found = load_recipe(recipe, *overrides)
    parts = _bind(found)
    with torch.device("meta"), _default_dtype(dtype):  # finds grids that differ and orders that are no permutation
        model = _assemble(parts, found.source)
    if device is not None and torch.device(device).type == "meta":
        if weights != "none":
            raise CheckpointError(f"a model on meta holds no weights, but weights={str(weights)!r} was asked for")
        return model
    part, named = "", str(weights)
    if weights == "recipe":
        part, named = "language", cast(interfaces.LanguageModel, model.language).weights
    files = None if named == "none" else open_weights(named, "language" if part else "model", verify=verify)
    if files is not None:
        if files.layout is SAME:  # written by us
            same_modules(Path(files.found.source).with_name("recipe.yaml"), model, found, dtype)
        files.check(model.get_submodule(part))  # before anything is allocated
    everything = files is not None and files.layout.part == "model" and not files.layout.absent
    with torch.device(device or "cpu"), _default_dtype(dtype), _NoInitialValues() if everything else nullcontext():
        model = _assemble(parts, found.source)
    if weights != "none" and not everything:
        for encoder in model.encoders.values():
            encoder.load_weights()
    if files is not None:
        files.load(model.get_submodule(part))
    return model


def build_processor(recipe: Recipe, model: VisionLanguageModel, folder: Path | None = None) -> Processor:
    """The processor of a model.

    Args:
        recipe: names the prompt and the tokenizer.
        model: says how many places an image needs; may be on `meta`.
        folder: a saved folder, whose own tokenizer is used.

    Raises:
        CheckpointError: the tokenizer cannot be found, fetched or read.
        ContractError: the tokenizer has another number of ids than the language model.
    """
    parts = _bind(recipe)
    tokenizer, end = load_tokenizer(parts.tokenizer if folder is None else str(folder))
    ids, allowed = tokenizer.get_vocab_size(), model.language.num_tokens
    if ids != allowed:
        raise ContractError(f"model.language.num_tokens is {allowed}, but tokenizer {parts.tokenizer!r} has {ids} ids")
    return Processor(tokenizer, parts.prompt(), model.image_specs, model.tokens_per_image, end)


def build_prompt(recipe: Recipe) -> interfaces.Prompt:
    """The prompt of a recipe's model."""
    prompt: interfaces.Prompt = _bind(recipe).prompt()
    return prompt


def require_same_settings(model: nn.Module, described: VisionLanguageModel) -> None:
    """Check that a model, whose parts may be wrapped, has the settings of its recipe, of which tensors show nothing.

    Args:
        model: to be saved.
        described: the model of the recipe, on `meta`.

    Raises:
        CheckpointError: a setting differs, such as the eps of a norm; names each.
    """
    wrapper = re.compile(r"(^|\.)(_orig_mod|module)(?=\.|$)")  # of torch.compile and of data parallel
    ours = {wrapper.sub("", name).lstrip("."): value for name, value in module_settings(model).items()}
    given = module_settings(described)
    wrong = [name for name in given if name in ours and given[name] != ours[name]]
    if wrong:
        listed = [f"{n}: {_shown(ours[n])}, in the recipe {_shown(given[n])}" for n in sorted(wrong)[:20]]
        raise CheckpointError("the model has other settings than its recipe:\n  " + "\n  ".join(listed))


def _bind(recipe: Recipe) -> ModelParts:
    """Every name of `model:` resolved and every option checked; nothing is built."""
    bound, problems = bind(recipe.data["model"], ModelParts, "model")
    if problems:
        raise RecipeError(problems, recipe.source)
    parts: ModelParts = bound()
    return parts


def same_modules(path: Path, model: VisionLanguageModel, recipe: Recipe, dtype: torch.dtype | None = None) -> None:
    """Compare with the recipe that weights of ours were saved with, if it is there: shapes do not show everything.

    Raises:
        CheckpointError: that recipe is of another model, or cannot be built.
    """
    if not path.is_file():
        return
    text = {name: recipe.data["model"][name] for name in ("prompt", "tokenizer")}  # no weight depends on them
    try:
        saved = load_recipe(path)
        parts = _bind(Recipe({"model": {**saved.data["model"], **text}}, str(path)))
        with torch.device("meta"), _default_dtype(dtype):
            other = _assemble(parts, str(path))
    except RecipeError as error:
        raise CheckpointError(f"{path}, which the weights were saved with, cannot be built: {error}") from error
    ours, theirs = _what_counts(model), _what_counts(other)
    wrong: list[str] = []
    for name in dict.fromkeys([*ours, *theirs]):
        if ours.get(name) != theirs.get(name) and not name.startswith(tuple(f"{part}." for part in wrong)):
            wrong.append(name)
    if wrong:
        here, there = module_settings(model), module_settings(other)
        lines = [f"{n}: saved with {_shown(there.get(n))}, here {_shown(here.get(n))}" for n in wrong[:20]]
        lines += [f"and {len(wrong) - 20} more"] if len(wrong) > 20 else []
        raise CheckpointError(
            f"{path.parent} holds weights of another model than {recipe.source}:\n  "
            + "\n  ".join(lines)
            + "\nwrite into the recipe what they were saved with, or build from the folder itself"
        )


def _what_counts(model: VisionLanguageModel) -> dict[str, object]:
    """The settings that answers depend on; of a scan order its paths, however it is called."""
    found = module_settings(model)
    found.pop("language.weights", None)
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, PathTables):
                with suppress(ContractError):  # its connector scans another grid: the order's name counts
                    found[f"{name}.{key}.order"] = value(model.grid, torch.device("cpu")).tolist()
    return found


def _shown(value: object) -> str:
    return "nothing" if value is None else short(repr(value))


def _assemble(parts: ModelParts, source: str) -> VisionLanguageModel:
    encoders: dict[str, Any] = {}
    for name, encoder in parts.encoders.items():
        if not (isinstance(name, str) and name.isidentifier()):
            raise RecipeError(
                [Problem("model.encoders", f"{name!r} cannot name an encoder; use letters, digits and _")], source
            )
        with _at(f"model.encoders.{name}", source):
            encoders[name] = checked(encoder(), encoder, interfaces.VisionEncoder)
    with _at("model.fusion", source):
        widths = {name: encoder.width for name, encoder in encoders.items()}
        grids = {name: encoder.grid for name, encoder in encoders.items()}
        fusion = checked(parts.fusion(widths=widths, grids=grids), parts.fusion, interfaces.Fusion)
    with _at("model.language", source):
        language = checked(parts.language(), parts.language, interfaces.LanguageModel)
    with _at("model.prompt", source):
        lacks_nothing(parts.prompt(), parts.prompt, interfaces.Prompt)
    with _at("model.connector", source):
        made = parts.connector(in_width=fusion.width, out_width=language.width, grid=fusion.grid)
        connector = checked(made, parts.connector, interfaces.Connector)
    return VisionLanguageModel(encoders, fusion, connector, language)


def checked(built: Any, part: object, contract: type[Any]) -> Any:
    """A built module, or an error that says that it is none, or what it lacks of its contract."""
    if not isinstance(built, nn.Module):
        raise ContractError(f"{part} is a {type(built).__name__}, no torch.nn.Module")
    return lacks_nothing(built, part, contract)


def lacks_nothing(built: Any, part: object, contract: type[Any]) -> Any:
    """What was built, or an error that names what it lacks of its contract."""
    names = {n for c in contract.__mro__ for n in (*vars(c).get("__annotations__", ()), *vars(c))}
    lacking = sorted(n for n in names if not n.startswith("_") and not hasattr(built, n))
    if lacking:
        raise ContractError(f"{part} lacks {', '.join(lacking)}; see ssmvl.interfaces.{contract.__name__}")
    return built


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


@contextmanager
def _at(path: str, source: str) -> Iterator[None]:
    try:
        yield
    except (RecipeError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a foreign component may raise anything
        text = str(error) if isinstance(error, SsmvlError) else f"{type(error).__name__}: {error}"
        raise RecipeError([Problem(path, text)], source) from error
