"""Checks of mixers and language models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from ssmvl.interfaces import Grid, LanguageModel, Mixer, Paths
from ssmvl.language.state import RecurrentState
from ssmvl.scans import bsm, csm, raster
from ssmvl.testing.common import (
    build,
    gradients_of,
    name_of,
    perturbed,
    require,
    require_equal,
    require_gradients,
    require_tensor,
    require_units,
    seeded,
)
from ssmvl.testing.states import LENGTH, ROWS, Reader, check_reader

GRID = Grid(1, 3, 4)  # LENGTH positions


@seeded()
def check_mixer(mixer: Callable[..., nn.Module], *, width: int = 64) -> None:
    """Check that a mixer is causal, isolates rows and segments, continues from its state, follows paths and trains.

    It is built with `num_paths=1` and `num_paths=2`. Its state must be a named tuple of tensors, rows first, as
    language models require. `check_mixer(functools.partial(MyMixer, d_state=16), width=32)`.

    Args:
        mixer: called with `width` and `num_paths`; returns a module (B, L, D) -> (B, L, D).
        width: D, if the mixer needs a specific one.

    Raises:
        ContractError: the mixer violates its contract; names the requirement, the position and the values.
    """
    name = name_of(mixer)
    one = perturbed(build(mixer, Mixer, width=width, num_paths=1))
    _check_new_state(name, one)
    reader = Reader(
        name,
        width,
        forward=lambda x, segments: one(x, None, segments),
        prefill=lambda x, lengths, state: one.prefill(x, lengths, state.layers[0]),
        step=lambda x, state: one.step(x, state.layers[0]),
        new_state=lambda rows: RecurrentState(name, [one.new_state(rows)]),
        min_length=0,  # when a language model reads a batch in chunks, some rows may have ended
    )
    check_reader(reader)
    x = torch.randn(ROWS, LENGTH, width)
    require_gradients(name, one, one(x))
    state = one.new_state(ROWS)
    outputs = one.prefill(x, torch.full((ROWS,), LENGTH), state), one.step(x[:, 0], state)
    require(not any(y.requires_grad for y in outputs), f"{name}: prefill and step must not build an autograd graph")
    what = f"{name} over the single path of raster must equal the result without paths"
    require_equal(what, one(x, Paths.of(raster(GRID))), one(x))
    _check_two_paths(name, perturbed(build(mixer, Mixer, width=width, num_paths=2)), x)


@seeded()
def check_language_model(language_model: Callable[[], nn.Module]) -> None:
    """Check that a language model is causal, isolates rows, continues from its state and shards only its blocks.

    Embedding and head must not be in `shard_units`. A `recurrent` model must also isolate segments, and its state must
    have a fixed size and be writable row by row.
    `check_language_model(functools.partial(MyModel, width=64, num_layers=2, num_tokens=20))`.

    Args:
        language_model: called without arguments; returns a module with `embed`, `backbone` and `head`.

    Raises:
        ContractError: the model violates its contract; names the requirement, the position and the values.
    """
    name = name_of(language_model)
    model = perturbed(build(language_model, LanguageModel))
    sizes = f"num_tokens is {model.num_tokens}, vocab_rows is {model.vocab_rows}"
    require(0 < model.num_tokens <= model.vocab_rows, f"{name}: every token needs a row of the vocabulary; {sizes}")
    ids = torch.randint(model.num_tokens, (ROWS, LENGTH))
    ids[0, 0] = model.num_tokens - 1
    embeds = model.embed(ids)
    require_tensor(f"{name}.embed of ids {tuple(ids.shape)}", embeds, ROWS, LENGTH, model.width)
    hidden = model.backbone(embeds)
    require_tensor(f"{name}.backbone", hidden, ROWS, LENGTH, model.width)
    logits = model.head(hidden)
    require_tensor(f"{name}.head", logits, ROWS, LENGTH, model.vocab_rows)
    require_equal(f"{name}.head must process each position independently", model.head(hidden[0, :2]), logits[0, :2])
    check_reader(
        Reader(
            name,
            model.width,
            forward=model.backbone,
            prefill=model.prefill,
            step=model.step,
            new_state=model.new_state,
            min_length=0,
            recurrent=model.recurrent,
        )
    )
    require_units(name, model)
    _check_root(name, model, model.embed(ids), model.head(hidden.detach()))


def _check_root(name: str, model: nn.Module, *outputs: Tensor) -> None:
    """Require that no parameter of the embedding or the head, identified by its gradient, is in a unit.

    They may be tied and are used outside all units, so they belong to the model's root unit.
    """
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = [gradients_of(output, *parameters) for output in outputs]
    units = [set(unit.parameters()) for unit in cast(LanguageModel, model).shard_units()]
    for parameter_name, parameter, *reached in zip(names, parameters, *gradients, strict=True):
        in_unit = any(parameter in unit for unit in units)
        used = any(gradient is not None for gradient in reached)
        require(
            not (in_unit and used),
            f"{name}.shard_units must not contain {parameter_name}, a parameter of the embedding or the head",
        )


def _check_new_state(name: str, mixer: Any) -> None:
    """Check a new state on the CPU and on `meta`, where language models use it for shapes."""
    for device in ("cpu", "meta"):
        state = mixer.new_state(ROWS, device)
        tensors = state if isinstance(state, tuple) and hasattr(state, "_asdict") else ()
        received = {
            f"{tuple(t.shape)[:1]} on {t.device}" if isinstance(t, Tensor) else type(t).__name__ for t in tensors
        }
        expected = f"({ROWS},) on {device}"
        shown = ", ".join(sorted(received)) or type(state).__name__
        what = f"{name}.new_state must return a named tuple of tensors {expected}, rows first"
        require(received == {expected}, f"{what}; received {shown}")


def _check_two_paths(name: str, mixer: nn.Module, x: Tensor) -> None:
    y, middle = mixer(x, Paths.of(bsm(GRID))), LENGTH // 2
    require_tensor(f"{name} over two paths", y, *x.shape)
    for end in (0, LENGTH - 1):
        changed = x.clone()
        changed[:, end] += 1
        unmoved = mixer(changed, Paths.of(bsm(GRID)))[:, middle].equal(y[:, middle])
        what = f"{name} over a path and its reverse must read in both directions"
        require(not unmoved, f"{what}; a change at position {end} does not affect position {middle}")
    by_columns = mixer(x, Paths.of(csm(GRID)[2:]))
    require(not by_columns.equal(y), f"{name} must follow `paths`; row-wise and column-wise paths give the same result")
    require_gradients(f"{name} over two paths", mixer, y)
