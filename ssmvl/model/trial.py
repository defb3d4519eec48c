"""Trial run of a model on `meta`: each part runs once, and its shapes are compared with its contract."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial, wraps
from typing import Any, cast
from unittest.mock import patch

import torch
from torch import Tensor, nn

from ssmvl.errors import Problem, foreign, short
from ssmvl.interfaces import ImageSpec, LanguageModel, Piece, Prompt
from ssmvl.model.blueprint import Blueprint
from ssmvl.model.costs import autocast_on_meta
from ssmvl.ops.splice import splice
from ssmvl.recipes.binding import Bound

IMAGES, TEXT = 2, 8  # images, and text positions after each
PLACEMENTS = ("before_all_text", "in_place")
TALK = ({"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"})
# Torch has no exception class for code that reads values of a tensor on `meta`, only these messages.
NEEDS_VALUES = re.compile(r"meta tensor|meta device|on meta|'meta' backend|data-dependent", re.IGNORECASE)


@torch.no_grad()
def trial(blueprint: Blueprint) -> tuple[list[Problem], list[str]]:
    """Run encoders, fusion, connector, splice and language model forward, then one prefill and one step.

    A part that fails or returns the wrong shape is assumed to return the right one, so that every broken part is found.

    Returns:
        Parts that break their contract, and notes on parts that cannot run on `meta`.
    """
    problems = prompt_problems("model.prompt", cast(Bound, blueprint.parts.prompt))
    run = _Trial(blueprint)
    with patch.object(torch, "autocast", autocast_on_meta), run.watched_mixers(), suppress(_UnknownShapesError):
        run.run()
    return [*problems, *run.problems], list(run.notes)


def prompt_problems(path: str, prompt: Bound) -> list[Problem]:
    """Check the image placement of a prompt, and its pieces of a short conversation."""
    try:
        made: Prompt = prompt()
        if made.image_placement not in PLACEMENTS:
            allowed = ", ".join(PLACEMENTS)
            return [Problem(path, f"{prompt}: image_placement is {made.image_placement!r}. Allowed: {allowed}")]
        pieces = made.pieces(TALK, "<end>")
        is_list = isinstance(pieces, list)
        wrong = [p for p in pieces if not (isinstance(p, Piece) and isinstance(p.text, str))] if is_list else []
        if wrong or not is_list:
            returned = f"one with {wrong[0]!r}" if wrong else repr(pieces)
            return [Problem(path, f"{prompt}: pieces must return a list of Piece(text), returned {short(returned)}")]
        if not any(piece.supervised and TALK[1]["content"] in piece.text for piece in pieces):
            return [
                Problem(path, f"{prompt}: no piece with the assistant's text is supervised, so there are no labels")
            ]
    except (Exception, SystemExit) as error:  # a third-party prompt may raise any error
        return [Problem(path, f"{prompt} fails: {foreign(error)}")]
    return []


class _UnknownShapesError(Exception):
    """Shapes of later parts are unknown; the reason has been reported."""


class _Trial:
    """One forward pass of a model, part by part."""

    def __init__(self, blueprint: Blueprint) -> None:
        self.blueprint = blueprint
        self.problems: dict[Problem, None] = {}  # a dict, because a mixer has the same problem in every block
        self.notes: dict[str, None] = {}

    def run(self) -> None:
        """Run all parts in the order of a forward pass."""
        parts, model = self.blueprint.parts, self.blueprint.model
        features = {name: self._encode(name, encoder) for name, encoder in model.encoders.items()}
        fusion: Any = model.fusion
        at = "model.fusion", parts.fusion
        fused = self._call(*at, "forward", (IMAGES, fusion.grid.length, fusion.width), fusion, features)
        language, at = cast(LanguageModel, model.language), ("model.connector", parts.connector)
        tokens = self._value(*at, "num_tokens", lambda: model.tokens_per_image)
        is_count = isinstance(tokens, int) and tokens > 0
        self._require(*at, is_count, f"num_tokens must return a positive integer, returned {tokens!r}")
        shape = (IMAGES, tokens, language.width)
        visual = self._call(*at, "forward", shape, model.connector, fused, model.grid)
        self._read(language, visual)

    def _encode(self, name: str, encoder: Any) -> Tensor:
        at = f"model.encoders.{name}", self.blueprint.parts.encoders[name]
        spec: ImageSpec = encoder.image_spec
        pixels = torch.zeros(IMAGES, 3, spec.size, spec.size, dtype=torch.uint8, device="meta")
        before = len(self.problems)
        features = self._call(*at, "forward", (IMAGES, encoder.grid.length, encoder.width), encoder, pixels)
        if len(self.problems) == before:
            self._call(*at, "forward without images", (0, encoder.grid.length, encoder.width), encoder, pixels[:0])
        return features

    def _read(self, language: LanguageModel, visual: Tensor) -> None:
        at = "model.language", self.blueprint.parts.language
        width, length, rows = language.width, visual.shape[1] + TEXT, language.vocab_rows
        sizes = f"num_tokens is {language.num_tokens}, vocab_rows is {rows}"
        self._require(*at, 0 < language.num_tokens <= rows, f"each token needs a row of the vocabulary: {sizes}")
        ids = torch.zeros(IMAGES, length, dtype=torch.int64, device="meta")
        image_positions = torch.zeros(IMAGES * visual.shape[1], dtype=torch.int64, device="meta")
        embeds = self._call(*at, "embed", (IMAGES, length, width), language.embed, ids)
        embeds = splice(embeds, visual, image_positions)
        hidden = self._call(*at, "backbone", (IMAGES, length, width), language.backbone, embeds)
        self._call(*at, "head", (IMAGES, rows), language.head, hidden[:, -1])
        lengths = torch.full((IMAGES,), length, device="meta")
        state = self._value(*at, "new_state", lambda: language.new_state(IMAGES, "meta"))
        self._call(*at, "prefill", (IMAGES, length, width), language.prefill, embeds, lengths, state)
        self._call(*at, "step", (IMAGES, width), language.step, embeds[:, 0], state)

    @contextmanager
    def watched_mixers(self) -> Iterator[None]:
        """Compare the output and the state of each mixer with its input."""
        with ExitStack() as stack:
            for bound, module in self.blueprint.made:
                if bound.entry is not None and bound.entry.kind == "mixer" and isinstance(module, nn.Module):
                    for name in ("forward", "prefill", "step"):
                        if callable(getattr(module, name, None)):
                            stack.enter_context(patch.object(module, name, self._watched(bound, module, name)))
                    if callable(getattr(module, "new_state", None)):
                        stack.enter_context(patch.object(module, "new_state", self._watched_state(bound, module)))
            yield

    def _watched_state(self, bound: Bound, module: Any) -> Callable[..., Any]:
        call = module.new_state

        @wraps(call)
        def watched(rows: int, *args: Any, **kwargs: Any) -> Any:
            state = self._value(bound.path, bound, "new_state", lambda: call(rows, *args, **kwargs))
            tensors = state if isinstance(state, tuple) and hasattr(state, "_asdict") else [None]
            rows_first = all(isinstance(tensor, Tensor) and tensor.shape[:1] == (rows,) for tensor in tensors)
            what = f"new_state must return a named tuple of tensors with {rows} rows, returned {state!r}"
            self._require(bound.path, bound, rows_first, short(what))
            return state

        return watched

    def _watched(self, bound: Bound, module: nn.Module, name: str) -> Callable[..., Tensor]:
        call = getattr(module, name)

        @wraps(call)
        def watched(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return self._call(bound.path, bound, name, tuple(x.shape), partial(call, **kwargs), x, *args)

        return watched

    def _call(
        self, path: str, part: object, method: str, shape: tuple[int, ...], call: Callable[..., object], *inputs: Any
    ) -> Tensor:
        """Return the output of a part, or a tensor of the shape that it should have."""
        try:
            output = call(*inputs)
        except (Exception, SystemExit) as error:  # a third-party part may raise any error
            self._report(path, part, method, error)
        else:
            got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            if isinstance(output, Tensor) and got == shape:
                return output
            self.problems[Problem(path, f"{part}: {method} must return {shape}, returned {got}")] = None
        return torch.empty(shape, device="meta")

    def _report(self, path: str, part: object, method: str, error: BaseException) -> None:
        if isinstance(error, _UnknownShapesError):  # reported by a part inside this one
            raise error
        if isinstance(error, RuntimeError) and NEEDS_VALUES.search(str(error)):
            note = f"{path}: not checked, {method} of {part} reads values, which tensors on meta do not have"
            self.notes[note] = None
        else:
            self.problems[Problem(path, f"{part}: {method} fails: {foreign(error)}")] = None

    def _require(self, path: str, part: object, condition: object, message: str) -> None:
        if not condition:
            self.problems[Problem(path, f"{part}: {message}")] = None
            raise _UnknownShapesError

    def _value(self, path: str, part: object, method: str, call: Callable[[], Any]) -> Any:
        """Return the result of a method that the rest of the trial depends on."""
        try:
            return call()
        except (Exception, SystemExit) as error:  # third-party code
            self._report(path, part, method, error)
            raise _UnknownShapesError from error
