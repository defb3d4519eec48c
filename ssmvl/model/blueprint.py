"""A recipe's model, bound once: its parts, the model that they make on `meta`, and its processor."""

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


@dataclass(frozen=True, eq=False)
class Blueprint:
    """A recipe whose `model:` is bound, and the model of it on `meta`. `build_model` takes one in place of a recipe.

    Attributes:
        recipe: as merged.
        parts: its bound components.
        model: on `meta`, shared by everyone who asks for shapes: read-only.
        made: the components that `model` consists of, each with what it built.
    """

    recipe: Recipe
    parts: ModelParts
    model: VisionLanguageModel
    made: list[tuple[Bound, Any]]

    @classmethod
    def of(cls, recipe: str | Path | Recipe | Blueprint, *overrides: str) -> Blueprint:
        """Bind the model of a recipe; one that is bound is returned as it is, unless there are overrides.

        Raises:
            RecipeError: every mistake of the model, before any weight is allocated.
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
        """The blueprint of parts that are bound; `more` are fields of a subclass.

        Raises:
            RecipeError: the parts do not fit together.
        """
        with torch.device("meta"), made_components() as made:
            model = assemble(parts, recipe.source)
        return cls(recipe, parts, model, made, **more)

    def assemble(self) -> VisionLanguageModel:
        """A new model with initial weights, on torch's default device and in its default dtype."""
        return assemble(self.parts, self.recipe.source)

    def with_prompt(self, prompt: Bound) -> Blueprint:
        """The same model, with another prompt."""
        model = {**self.recipe.data["model"], "prompt": prompt.node}
        recipe = Recipe({**self.recipe.data, "model": model}, self.recipe.source)
        return Blueprint(recipe, replace(self.parts, prompt=prompt), self.model, self.made)

    @cached_property
    def processor(self) -> Processor:
        """The model's processor. A tokenizer that the recipe names by its id in the hub is fetched now.

        Raises:
            CheckpointError: the tokenizer cannot be found, fetched or read.
            ContractError: the tokenizer has another number of ids than the language model.
        """
        return self.processor_for(self.model)

    def processor_for(self, model: VisionLanguageModel, folder: Path | None = None) -> Processor:
        """The processor of a model of this recipe.

        Args:
            model: states how many places an image needs.
            folder: a saved folder, whose own tokenizer is used.

        Raises:
            CheckpointError: the tokenizer cannot be found, fetched or read.
            ContractError: the tokenizer has another number of ids than the language model.
        """
        name = self.parts.tokenizer if folder is None else str(folder)
        tokenizer, end = load_tokenizer(name)
        ids, allowed = tokenizer.get_vocab_size(), cast(int, model.language.num_tokens)
        if ids != allowed:
            shown = self.parts.tokenizer
            raise ContractError(f"model.language.num_tokens is {allowed}, but tokenizer {shown!r} has {ids} ids")
        return Processor(tokenizer, self.parts.prompt(), model.image_specs, model.tokens_per_image, end)


def assemble(parts: ModelParts, source: str) -> VisionLanguageModel:
    """Build every part, in the order in which they need each other's widths and grids.

    Raises:
        RecipeError: a part cannot be built, or lacks something of its contract.
    """
    encoders: dict[str, Any] = {}
    for name, encoder in parts.encoders.items():
        if not (isinstance(name, str) and name.isidentifier()):
            raise RecipeError(
                [Problem("model.encoders", f"{name!r} cannot name an encoder; use letters, digits and _")], source
            )
        with _at(f"model.encoders.{name}", encoder, source):
            built = checked(_stating_weights(encoder()), encoder, interfaces.VisionEncoder)
            require_sizes(built, encoder)
            spec = built.image_spec
            require(isinstance(spec, ImageSpec) and _is_count(spec.size), encoder, "image_spec", "an ImageSpec", spec)
            require(isinstance(built.weights, str), encoder, "weights", "text", built.weights)
            encoders[name] = built
    with _at("model.fusion", parts.fusion, source):
        widths = {name: encoder.width for name, encoder in encoders.items()}
        grids = {name: encoder.grid for name, encoder in encoders.items()}
        fusion = checked(parts.fusion(widths=widths, grids=grids), parts.fusion, interfaces.Fusion)
        require_sizes(fusion, parts.fusion)
    with _at("model.language", parts.language, source):
        language = checked(parts.language(), parts.language, interfaces.LanguageModel)
        require(_is_count(language.width), parts.language, "width", "a whole number from 1", language.width)
        require(isinstance(language.weights, str), parts.language, "weights", "text", language.weights)
    with _at("model.prompt", parts.prompt, source):
        require_contract(parts.prompt(), parts.prompt, interfaces.Prompt)
    with _at("model.connector", parts.connector, source):
        made = parts.connector(in_width=fusion.width, out_width=language.width, grid=fusion.grid)
        connector = checked(made, parts.connector, interfaces.Connector)
    return VisionLanguageModel(encoders, fusion, connector, language)


def checked(built: Any, part: object, contract: type[Any]) -> Any:
    """A built module that has every attribute of its contract.

    Raises:
        ContractError: it is not a module, or lacks an attribute.
    """
    if not isinstance(built, nn.Module):
        raise ContractError(f"{part} is a {type(built).__name__}, not a torch.nn.Module")
    return require_contract(built, part, contract)


def require_sizes(built: Any, part: object) -> None:
    """Check the width and the grid that an encoder or a fusion states.

    Raises:
        ContractError: one is not what it must be.
    """
    require(_is_count(built.width), part, "width", "a whole number from 1", built.width)
    sides = isinstance(built.grid, Grid) and all(map(_is_count, built.grid))
    require(sides, part, "grid", "a Grid(maps, rows, columns) of whole numbers from 1", built.grid)


def require(holds: object, part: object, name: str, wanted: str, value: object) -> None:
    """Raise a `ContractError` about an attribute unless it holds."""
    if not holds:
        raise ContractError(f"{part}: {name} must be {wanted}, is {value!r}")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _stating_weights(encoder: Any) -> Any:
    """An encoder that states its weights, or that loads its own, as in ssmvl 0.1."""
    if hasattr(encoder, "load_weights"):
        what = f"{type(encoder).__name__}.load_weights"
        warnings.warn(f"{what}: state a file as `weights` instead; removed in 0.4", DeprecationWarning, stacklevel=3)
        if not hasattr(encoder, "weights"):
            encoder.weights = "none"
    return encoder


def require_contract(built: Any, part: object, contract: type[Any]) -> Any:
    """Check that an object has every attribute of its contract, and return it.

    Raises:
        ContractError: names the attributes that are missing.
    """
    names = {n for c in contract.__mro__ for n in (*vars(c).get("__annotations__", ()), *vars(c))}
    lacking = sorted(n for n in names if not n.startswith("_") and not hasattr(built, n))
    if lacking:
        raise ContractError(f"{part} lacks {', '.join(lacking)}; see ssmvl.interfaces.{contract.__name__}")
    return built


@contextmanager
def _at(path: str, part: object, source: str) -> Iterator[None]:
    """Turn what a component raises into a problem at its place."""
    try:
        yield
    except (RecipeError, MemoryError, torch.OutOfMemoryError):
        raise
    except SsmvlError as error:
        raise RecipeError([Problem(path, str(error))], source) from error
    except (Exception, SystemExit) as error:  # a foreign component may raise anything
        raise RecipeError([Problem(path, f"{part} fails: {foreign(error)}")], source) from error
