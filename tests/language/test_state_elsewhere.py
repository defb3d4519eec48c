"""A saved state is continued in another process, which runs this file as a program."""

from __future__ import annotations

import functools
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ssmvl.checkpoints import copy_into, read_tensors, write_tensors
from ssmvl.errors import CheckpointError
from ssmvl.language.mamba_lm import Mamba1LM, MambaLM
from ssmvl.language.state import RecurrentState
from ssmvl.layers.mamba1 import Mamba1Mixer
from ssmvl.layers.mamba2 import Mamba2Mixer

KINDS = ["mamba2", "mamba1"]
CASES = list(itertools.product(KINDS, [torch.float32, torch.bfloat16]))


def build(kind: str, num_layers: int = 2, d_state: int = 4) -> MambaLM:
    if kind == "mamba1":
        mixer = functools.partial(Mamba1Mixer, d_state=d_state)
        return Mamba1LM(width=16, num_layers=num_layers, num_tokens=20, mixer=mixer)
    mixer = functools.partial(Mamba2Mixer, d_state=d_state, head_dim=8, num_groups=2)
    return MambaLM(width=16, num_layers=num_layers, num_tokens=20, mixer=mixer)


@torch.no_grad()
def advance(model: MambaLM, state: RecurrentState, seed: int) -> Tensor:
    """Hidden states of a prefill with mixed lengths and of 4 steps."""
    generator = torch.Generator().manual_seed(seed)
    embeds = torch.randn(3, 9, 16, generator=generator)
    read = model.prefill(embeds[:, :5], torch.tensor([5, 2, 4]), state)
    steps = [model.step(embeds[:, t], state) for t in range(5, 9)]
    return torch.cat([read, torch.stack(steps, 1)], 1)


def test_another_process_continues_identically(tmp_path: Path) -> None:
    states = {}
    for kind, dtype in CASES:
        folder, model = tmp_path / f"{kind}-{dtype}", build(kind).to(dtype)
        folder.mkdir()
        state = model.new_state(3)
        advance(model, state, seed=1)
        write_tensors(folder / "weights.safetensors", model.state_dict())
        state.save(folder / "before")
        states[kind, dtype] = model, state, folder
    subprocess.run([sys.executable, __file__, tmp_path], check=True)
    for model, state, folder in states.values():
        expected = advance(model, state, seed=2)
        assert torch.equal(read_tensors(folder / "hidden")[0]["hidden"], expected)
        saved, _ = read_tensors(folder / "after")
        assert len(saved) == 4
        for number, layer in enumerate(state.layers):
            assert all(torch.equal(saved[f"{number}.{name}"], tensor) for name, tensor in layer._asdict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_difference_is_named_and_nothing_is_copied(kind: str, tmp_path: Path) -> None:
    model, path = build(kind), tmp_path / "state"
    state = model.new_state(3)
    advance(model, state, seed=1)
    state.save(path)
    another = "mamba2" if kind == "mamba1" else "mamba1"
    rejected = {
        r"model is '.* LM, width 16, 2 layers, .*', but this state needs '.* 3 layers": build(kind, num_layers=3),
        rf"model is 'M{kind[1:]}Mixer LM, .*', but this state needs 'M{another[1:]}Mixer LM": build(another),
        r"model is '.*, ssm [^']*x4', but this state needs '.*, ssm [^']*x6": build(kind, d_state=6),
    }
    for message, other in rejected.items():
        assert_rejected(other.new_state(3), path, message)
    assert_rejected(model.new_state(2), path, r"0\.conv is .*\(3, 3, \d+\), but this state needs .*\(2, 3, \d+\)")
    assert_rejected(model.new_state(3, dtype=torch.float64), path, r"0\.conv is torch\.float32 .* needs torch\.float64")
    tensors, metadata = read_tensors(path)
    write_tensors(path, tensors, {**metadata, "state_format": "99"})
    assert_rejected(model.new_state(3), path, "state_format is '99', but this state needs '1'")


def assert_rejected(state: RecurrentState, path: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        state.load(path)
    assert "\n" not in str(caught.value)
    assert all(not tensor.any() for layer in state.layers for tensor in layer)


def continue_all(folder: Path) -> None:
    for kind, dtype in CASES:
        case, model = folder / f"{kind}-{dtype}", build(kind).to(dtype)
        copy_into(model, read_tensors(case / "weights.safetensors")[0], "weights")
        state = model.new_state(3)
        state.load(case / "before")
        write_tensors(case / "hidden", {"hidden": advance(model, state, seed=2)})
        state.save(case / "after")


if __name__ == "__main__":
    continue_all(Path(sys.argv[1]))
