"""The checks of what reads sequences: mixers and language models."""

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
    moved,
    name_of,
    require,
    require_equal,
    require_gradients,
    require_tensor,
    require_units,
    seeded,
)
from ssmvl.testing.states import LENGTH, ROWS, Reader, check_reader

GRID = Grid(1, 3, 4)  # of LENGTH positions


@seeded()
def check_mixer(mixer: Callable[..., nn.Module], *, width: int = 64) -> None:
    """The mixer is causal, keeps rows and segments apart, goes on from its state, follows paths, and can be trained.

    It is built with `num_paths=1` and `num_paths=2`. Its state is a named tuple of tensors, rows first: what a
    language model collects. `check_mixer(functools.partial(MyMixer, d_state=16), width=32)`.

    Args:
        mixer: called with `width` and `num_paths`; gives a module (B, L, D) -> (B, L, D).
        width: D, where the mixer needs a certain one.

    Raises:
        ContractError: it does not; names the claim, the place and the values.
    """
    name = name_of(mixer)
    one = moved(build(mixer, Mixer, width=width, num_paths=1))
    _check_new_state(name, one)
    reader = Reader(
        name,
        width,
        forward=lambda x, segments: one(x, None, segments),
        prefill=lambda x, lengths, state: one.prefill(x, lengths, state.layers[0]),
        step=lambda x, state: one.step(x, state.layers[0]),
        new_state=lambda rows: RecurrentState(name, [one.new_state(rows)]),
        shortest=0,  # a language model that reads in stretches comes with nothing left of a row
    )
    check_reader(reader)
    x = torch.randn(ROWS, LENGTH, width)
    require_gradients(name, one, one(x))
    state = one.new_state(ROWS)
    outputs = one.prefill(x, torch.full((ROWS,), LENGTH), state), one.step(x[:, 0], state)
    require(not any(y.requires_grad for y in outputs), f"{name}: prefill and step must keep no graph for gradients")
    require_equal(f"{name} along the one path of raster must be as without", one(x, Paths.of(raster(GRID))), one(x))
    _check_two_paths(name, moved(build(mixer, Mixer, width=width, num_paths=2)), x)


@seeded()
def check_language_model(language_model: Callable[[], nn.Module]) -> None:
    """The model is causal, keeps rows apart, goes on from its state, and leaves embedding and head out of its units.

    A `recurrent` one also keeps segments apart, and its state is of one size and can be overwritten row by row.
    `check_language_model(functools.partial(MyModel, width=64, num_layers=2, num_tokens=20))`.

    Args:
        language_model: called with nothing; gives a module with `embed`, `backbone` and `head`.

    Raises:
        ContractError: it does not; names the claim, the place and the values.
    """
    name = name_of(language_model)
    model = moved(build(language_model, LanguageModel))
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
    require_equal(f"{name}.head must treat each position alone", model.head(hidden[0, :2]), logits[0, :2])
    check_reader(
        Reader(
            name,
            model.width,
            forward=model.backbone,
            prefill=model.prefill,
            step=model.step,
            new_state=model.new_state,
            shortest=0,
            recurrent=model.recurrent,
        )
    )
    require_units(name, model)
    _check_root(name, model, model.embed(ids), model.head(hidden.detach()))


def _check_root(name: str, model: nn.Module, *outputs: Tensor) -> None:
    """Parameters of the embedding and the head, found by their gradients, are in no unit.

    They may be tied, and are used outside of every unit: they belong to the whole model's.
    """
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = [gradients_of(output, *parameters) for output in outputs]
    units = [set(unit.parameters()) for unit in cast(LanguageModel, model).shard_units()]
    for parameter_name, parameter, *reached in zip(names, parameters, *gradients, strict=True):
        held = any(parameter in unit for unit in units)
        used = any(gradient is not None for gradient in reached)
        require(not (held and used), f"{name}.shard_units holds {parameter_name}, of the embedding or the head")


def _check_new_state(name: str, mixer: Any) -> None:
    """A language model asks for a state on `meta` too, for its shapes."""
    for device in ("cpu", "meta"):
        state = mixer.new_state(ROWS, device)
        tensors = state if isinstance(state, tuple) and hasattr(state, "_asdict") else ()
        found = {f"{tuple(t.shape)[:1]} on {t.device}" if isinstance(t, Tensor) else type(t).__name__ for t in tensors}
        wanted = f"({ROWS},) on {device}"
        got = ", ".join(sorted(found)) or type(state).__name__
        require(found == {wanted}, f"{name}.new_state: a named tuple of tensors {wanted}, rows first; received {got}")


def _check_two_paths(name: str, mixer: nn.Module, x: Tensor) -> None:
    y, middle = mixer(x, Paths.of(bsm(GRID))), LENGTH // 2
    require_tensor(f"{name} over two paths", y, *x.shape)
    for end in (0, LENGTH - 1):
        changed = x.clone()
        changed[:, end] += 1
        unmoved = mixer(changed, Paths.of(bsm(GRID)))[:, middle].equal(y[:, middle])
        what = f"{name} over a path and its reverse must read both ways"
        require(not unmoved, f"{what}; a change at position {end} does not reach position {middle}")
    require(
        not mixer(x, Paths.of(csm(GRID)[2:])).equal(y), f"{name} must follow `paths`; rows and columns give the same"
    )
    require_gradients(f"{name} over two paths", mixer, y)
