"""Blueprint: a recipe's model, bound once, with its parts, its model on `meta` and its processor."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import nn

from ssmvl import interfaces
from ssmvl.errors import ContractError, Problem, RecipeError, SsmvlError, foreign
from ssmvl.interfaces import ConnectorPart, EncoderPart, FusionPart, Grid, ImageSpec, LanguageModelPart, PromptPart
from ssmvl.model.vlm import VisionLanguageModel
from ssmvl.processing.processor import Processor
from ssmvl.processing.tokenizers import load_tokenizer
from ssmvl.recipes.binding import Bound, bind, made_components
from ssmvl.recipes.merge import Recipe, load_recipe

__all__ = ["Blueprint"]


@dataclass(frozen=True, kw_only=True)
class ModelParts:
    """The `model:` section of a recipe. Its fields are the schema.

    Args:
        encoders: by name, in the recipe's order.
        fusion: fuses the encoders' features.
        connector: turns them into visual tokens.
        language: reads visual tokens and text.
        prompt: the prompt format of conversations.
        tokenizer: `bytes`, `words`, a path or a Hub id.
    """

    encoders: dict[str, EncoderPart]
    fusion: FusionPart
    connector: ConnectorPart
    language: LanguageModelPart
    prompt: PromptPart
    tokenizer: str


@dataclass(frozen=True, eq=False)
class Blueprint:
    """A recipe with its `model:` bound, and that model on `meta`. `build_model` accepts one in place of a recipe.

    Attributes:
        recipe: as merged.
        parts: its bound components.
        model: on `meta`; read-only, because it is shared by all code that needs shapes.
        made: the components of `model`, each with the object that it built.
    """

    recipe: Recipe
    parts: ModelParts
    model: VisionLanguageModel
    made: list[tuple[Bound, Any]]

    @classmethod
    def of(cls, recipe: str | Path | Recipe | Blueprint, *overrides: str) -> Blueprint:
        """Bind the model of a recipe. A bound one is returned unchanged, unless there are overrides.

        Raises:
            RecipeError: the model has mistakes; lists all of them, before any weight is allocated.
        """
        if isinstance(recipe, Blueprint):
            return cls.of(recipe.recipe, *overrides) if overrides else recipe
        merged = load_recipe(recipe, *overrides)
        bound, problems = bind(merged.data["model"], ModelParts, "model")
        if problems:
            raise RecipeError(problems, merged.source)
        return Blueprint.assembled(merged, bound())

    @classmethod
    def assembled(cls, recipe: Recipe, parts: ModelParts, **more: Any) -> Self:
        """Create the blueprint of bound parts; `more` are the fields of a subclass.

        Raises:
            RecipeError: the parts do not fit together.
        """
        with torch.device("meta"), made_components() as made:
            model = assemble(parts, recipe.source)
        return cls(recipe, parts, model, made, **more)

    def assemble(self) -> VisionLanguageModel:
        """Build a new model with initial weights, on torch's default device and in its default dtype."""
        return assemble(self.parts, self.recipe.source)

    def with_prompt(self, prompt: Bound) -> Blueprint:
        """Return a blueprint of the same model with another prompt."""
        model = {**self.recipe.data["model"], "prompt": prompt.node}
        recipe = Recipe({**self.recipe.data, "model": model}, self.recipe.source)
        return Blueprint(recipe, replace(self.parts, prompt=prompt), self.model, self.made)

    @cached_property
    def processor(self) -> Processor:
        """The model's processor. A tokenizer given by its Hub id is downloaded on first access.

        Raises:
            CheckpointError: the tokenizer cannot be found, downloaded or read.
            ContractError: the tokenizer and the language model have different numbers of ids.
        """
        return self.processor_for(self.model)

    def processor_for(self, model: VisionLanguageModel, folder: Path | None = None) -> Processor:
        """Create the processor of a model of this recipe.

        Args:
            model: determines the number of image places per image.
            folder: directory of a saved model, whose tokenizer is used instead of the recipe's.

        Raises:
            CheckpointError: the tokenizer cannot be found, downloaded or read.
            ContractError: the tokenizer and the language model have different numbers of ids.
        """
        name = self.parts.tokenizer if folder is None else str(folder)
        tokenizer, end = load_tokenizer(name)
        ids, allowed = tokenizer.get_vocab_size(), cast(int, model.language.num_tokens)
        if ids != allowed:
            source = self.parts.tokenizer
            raise ContractError(f"model.language.num_tokens is {allowed}, but tokenizer {source!r} has {ids} ids")
        return Processor(tokenizer, self.parts.prompt(), model.image_specs, model.tokens_per_image, end)


def assemble(parts: ModelParts, source: str) -> VisionLanguageModel:
    """Build all parts, in the order in which they depend on each other's widths and grids.

    Raises:
        RecipeError: a part cannot be built, or violates its contract.
    """
    encoders: dict[str, Any] = {}
    for name, encoder in parts.encoders.items():
        if not (isinstance(name, str) and name.isidentifier()):
            raise RecipeError(
                [Problem("model.encoders", f"invalid encoder name {name!r}; use letters, digits and _")], source
            )
        with _at(f"model.encoders.{name}", encoder, source):
            built = checked(_with_weights(encoder()), encoder, interfaces.VisionEncoder)
            require_sizes(built, encoder)
            spec = built.image_spec
            require(isinstance(spec, ImageSpec) and _is_count(spec.size), encoder, "image_spec", "an ImageSpec", spec)
            require(isinstance(built.weights, str), encoder, "weights", "a string", built.weights)
            encoders[name] = built
    with _at("model.fusion", parts.fusion, source):
        widths = {name: encoder.width for name, encoder in encoders.items()}
        grids = {name: encoder.grid for name, encoder in encoders.items()}
        fusion = checked(parts.fusion(widths=widths, grids=grids), parts.fusion, interfaces.Fusion)
        require_sizes(fusion, parts.fusion)
    with _at("model.language", parts.language, source):
        language = checked(parts.language(), parts.language, interfaces.LanguageModel)
        require(_is_count(language.width), parts.language, "width", "a positive integer", language.width)
        require(isinstance(language.weights, str), parts.language, "weights", "a string", language.weights)
    with _at("model.prompt", parts.prompt, source):
        require_contract(parts.prompt(), parts.prompt, interfaces.Prompt)
    with _at("model.connector", parts.connector, source):
        made = parts.connector(in_width=fusion.width, out_width=language.width, grid=fusion.grid)
        connector = checked(made, parts.connector, interfaces.Connector)
    return VisionLanguageModel(encoders, fusion, connector, language)


def checked(built: Any, part: object, contract: type[Any]) -> Any:
    """Check that an object is a module with every attribute of its contract, and return it.

    Raises:
        ContractError: it is not a module, or an attribute is missing.
    """
    if not isinstance(built, nn.Module):
        raise ContractError(f"{part} is a {type(built).__name__}, not a torch.nn.Module")
    return require_contract(built, part, contract)


def require_sizes(built: Any, part: object) -> None:
    """Check the width and the grid of an encoder or a fusion.

    Raises:
        ContractError: one of them is invalid.
    """
    require(_is_count(built.width), part, "width", "a positive integer", built.width)
    is_grid = isinstance(built.grid, Grid) and all(map(_is_count, built.grid))
    require(is_grid, part, "grid", "a Grid(maps, rows, columns) of positive integers", built.grid)


def require(condition: object, part: object, name: str, expected: str, value: object) -> None:
    """Raise a `ContractError` about an attribute unless a condition holds."""
    if not condition:
        raise ContractError(f"{part}: {name} must be {expected}, but is {value!r}")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _with_weights(encoder: Any) -> Any:
    """Return the encoder. One that loads its weights itself, as in ssmvl 0.1, gets `weights` of "none"."""
    if hasattr(encoder, "load_weights"):
        method, removal = f"{type(encoder).__name__}.load_weights", "is deprecated and will be removed in 0.4"
        warnings.warn(f"{method} {removal}; name a file in `weights` instead", DeprecationWarning, stacklevel=3)
        if not hasattr(encoder, "weights"):
            encoder.weights = "none"
    return encoder


def require_contract(built: Any, part: object, contract: type[Any]) -> Any:
    """Check that an object has every attribute of its contract, and return it.

    Raises:
        ContractError: attributes are missing; lists all of them.
    """
    names = {n for c in contract.__mro__ for n in (*vars(c).get("__annotations__", ()), *vars(c))}
    missing = sorted(n for n in names if not n.startswith("_") and not hasattr(built, n))
    if missing:
        raise ContractError(f"{part} lacks {', '.join(missing)}; see ssmvl.interfaces.{contract.__name__}")
    return built


@contextmanager
def _at(path: str, part: object, source: str) -> Iterator[None]:
    """Report an error of a component as a problem at its recipe path."""
    try:
        yield
    except (RecipeError, MemoryError, torch.OutOfMemoryError):
        raise
    except SsmvlError as error:
        raise RecipeError([Problem(path, str(error))], source) from error
    except (Exception, SystemExit) as error:  # third-party components may raise any error
        raise RecipeError([Problem(path, f"{part} fails: {foreign(error)}")], source) from error
