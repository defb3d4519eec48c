"""A trial of a model on `meta`: every part is run once, and its shapes are compared with its contract."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any, cast
from unittest.mock import patch

import torch
from torch import Tensor, nn

from ssmvl.errors import ContractError, Problem, foreign
from ssmvl.interfaces import Grid, ImageSpec, LanguageModel, Piece, Prompt
from ssmvl.model.blueprint import Blueprint
from ssmvl.model.costs import autocast_on_meta
from ssmvl.ops.splice import splice
from ssmvl.recipes.binding import Bound

IMAGES, TEXT = 2, 8  # images, and text positions behind each
PLACEMENTS = ("before_all_text", "in_place")
TALK = ({"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"})
# What torch says where code reads values, which tensors on `meta` do not have.
NEEDS_VALUES = ("meta tensor", "meta device", "Meta tensor", "on meta", "'Meta' backend", "data-dependent")


@torch.no_grad()
def trial(blueprint: Blueprint) -> tuple[list[Problem], list[str]]:
    """Run encoders, fusion, connector, splice and language model forward, then one prefill and one step.

    Returns:
        The first part that breaks its contract, if any, and notes: parts that cannot run on `meta`.
    """
    found = _Trial(blueprint)
    problems = prompt_problems("model.prompt", cast(Bound, blueprint.parts.prompt))
    notes: list[str] = []
    try:
        with patch.object(torch, "autocast", autocast_on_meta), found.watched_mixers():
            found.run()
    except _BrokenError as error:
        problems.append(Problem(error.path, str(error)))
    except Exception as error:  # a foreign part may raise anything
        path, part = found.inside[-1]
        if isinstance(error, NotImplementedError | RuntimeError) and any(text in str(error) for text in NEEDS_VALUES):
            why = "reads values, which tensors on meta do not have; it and what follows were not checked"
            notes.append(f"{path}: {found.method} of {part} {why}")
        else:
            problems.append(Problem(path, f"{part} fails in {found.method}: {foreign(error)}"))
    return problems, notes


def prompt_problems(path: str, prompt: Bound) -> list[Problem]:
    """What is wrong with a prompt: where it puts images, and the pieces of a short conversation."""
    try:
        made: Prompt = prompt()
        if made.image_placement not in PLACEMENTS:
            allowed = " or ".join(map(repr, PLACEMENTS))
            return [Problem(path, f"{prompt}: image_placement is {made.image_placement!r}; allowed is {allowed}")]
        pieces = made.pieces(TALK, "<end>")
        if not isinstance(pieces, list) or not all(isinstance(piece, Piece) for piece in pieces):
            wrong = next((piece for piece in pieces if not isinstance(piece, Piece)), pieces)
            return [Problem(path, f"{prompt}: pieces must give a list of Piece, gave {wrong!r}")]
        if not any(piece.supervised and TALK[1]["content"] in piece.text for piece in pieces):
            return [Problem(path, f"{prompt}: no piece with the assistant's text is supervised, so nothing is learned")]
    except Exception as error:  # a foreign prompt may raise anything
        return [Problem(path, f"{prompt} fails: {foreign(error)}")]
    return []


class _BrokenError(ContractError):
    """A part broke its contract."""

    def __init__(self, path: str, message: str) -> None:
        super().__init__(message)
        self.path = path


class _Trial:
    """One forward of a model, with the parts that it is inside of."""

    def __init__(self, blueprint: Blueprint) -> None:
        self.model, self.blueprint = blueprint.model, blueprint
        self.inside: list[tuple[str, object]] = [("model", "the model")]
        self.method = "forward"  # of the innermost part

    def run(self) -> None:
        """Every part, in the order of a forward."""
        parts, model = self.blueprint.parts, self.model
        features = {}
        for name, encoder in model.encoders.items():
            with self._at(f"model.encoders.{name}", parts.encoders[name]):
                features[name] = self._encode(encoder)
        with self._at("model.fusion", parts.fusion):
            fusion: Any = model.fusion
            self._require_sizes(fusion.width, fusion.grid)
            fused = fusion(features)
            self._require_shape("forward", fused, IMAGES, fusion.grid.length, fusion.width)
        language = cast(LanguageModel, model.language)
        with self._at("model.connector", parts.connector):
            tokens = cast(Any, model.connector).num_tokens(model.grid)
            self._require(_is_count(tokens), f"num_tokens must give a whole number from 1, gave {tokens!r}")
            visual = model.connector(fused, model.grid)
            self._require_shape("forward", visual, IMAGES, tokens, language.width, "(images, num_tokens, width)")
        with self._at("model.language", parts.language):
            self._read(language, visual)

    def _encode(self, encoder: Any) -> Tensor:
        self._require_sizes(encoder.width, encoder.grid)
        spec = encoder.image_spec
        self._require(isinstance(spec, ImageSpec), f"image_spec must be an ImageSpec, is {spec!r}")
        pixels = torch.zeros(IMAGES, 3, spec.size, spec.size, dtype=torch.uint8, device="meta")
        features: Tensor = encoder(pixels)
        self._require_shape("forward", features, IMAGES, encoder.grid.length, encoder.width)
        self._require_shape("forward of no image", encoder(pixels[:0]), 0, encoder.grid.length, encoder.width)
        return features

    def _read(self, language: LanguageModel, visual: Tensor) -> None:
        width, length = language.width, visual.shape[1] + TEXT
        sizes = f"num_tokens is {language.num_tokens}, vocab_rows is {language.vocab_rows}"
        self._require(
            0 < language.num_tokens <= language.vocab_rows, f"each token needs a row of the vocabulary: {sizes}"
        )
        ids = torch.zeros(IMAGES, length, dtype=torch.int64, device="meta")
        embeds = self._run(language, "embed", (IMAGES, length, width), ids)
        embeds = splice(embeds, visual, torch.zeros(IMAGES * visual.shape[1], dtype=torch.int64, device="meta"))
        hidden = self._run(language, "backbone", (IMAGES, length, width), embeds)
        self._run(language, "head", (IMAGES, language.vocab_rows), hidden[:, -1])
        self.method = "new_state"
        state = language.new_state(IMAGES, "meta")
        lengths = torch.full((IMAGES,), length, device="meta")
        self._run(language, "prefill", (IMAGES, length, width), embeds, lengths, state)
        self._run(language, "step", (IMAGES, width), embeds[:, 0], state)

    def _run(self, part: object, method: str, shape: tuple[int, ...], *given: Any) -> Tensor:
        """What a method gives, which must be of this shape."""
        self.method = method
        output: Tensor = getattr(part, method)(*given)
        self._require_shape(method, output, *shape)
        return output

    @contextmanager
    def watched_mixers(self) -> Iterator[None]:
        """Compare what each mixer gives with what it was given."""
        with ExitStack() as stack:
            for bound, module in self.blueprint.made:
                if bound.entry is not None and bound.entry.kind == "mixer" and isinstance(module, nn.Module):
                    for name in ("forward", "prefill", "step"):
                        if callable(getattr(module, name, None)):
                            stack.enter_context(patch.object(module, name, self._watched(bound, module, name)))
            yield

    def _watched(self, bound: Bound, module: nn.Module, name: str) -> Callable[..., Tensor]:
        call = getattr(module, name)

        @wraps(call)
        def watched(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            with self._at(bound.path, bound):
                self.method = name
                output: Tensor = call(x, *args, **kwargs)
                self._require_shape(name, output, *x.shape)
                return output

        return watched

    @contextmanager
    def _at(self, path: str, part: object) -> Iterator[None]:
        outer, self.method = self.method, "forward"
        self.inside.append((path, part))
        yield
        self.inside.pop()  # stays where something fails, so that the innermost part is named
        self.method = outer

    def _require(self, holds: object, message: str) -> None:
        path, part = self.inside[-1]
        if not holds:
            raise _BrokenError(path, f"{part}: {message}")

    def _require_shape(self, what: str, given: object, *shape: Any) -> None:
        meaning = f" {shape[-1]}" if isinstance(shape[-1], str) else ""
        expected = tuple(size for size in shape if not isinstance(size, str))
        got = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
        self._require(got == expected, f"{what} must give {expected}{meaning}, gave {got}")

    def _require_sizes(self, width: object, grid: object) -> None:
        self._require(_is_count(width), f"width must be a whole number from 1, is {width!r}")
        self._require(isinstance(grid, Grid), f"grid must be a Grid(maps, rows, columns), is {grid!r}")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
