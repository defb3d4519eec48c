"""The state of a recurrent language model."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ssmvl.checkpoints import read_tensors, write_tensors
from ssmvl.errors import CheckpointError, ShapeError
from ssmvl.interfaces import State
from ssmvl.language.mamba_lm import MambaLM
from ssmvl.language.state import RecurrentState
from ssmvl.layers.mamba2 import Mamba2Mixer


def build(width: int = 16, num_layers: int = 2) -> MambaLM:
    mixer = functools.partial(Mamba2Mixer, d_state=8, head_dim=8)
    return MambaLM(width=width, num_layers=num_layers, num_tokens=20, mixer=mixer).eval()


@pytest.fixture(scope="module")
def model() -> MambaLM:
    return build()


def advance(model: MambaLM, state: RecurrentState, tokens: int = 3) -> Tensor:
    """Logits of `tokens` more ids, different ones in each row."""
    rows = state.layers[0].conv.shape[0]
    ids = (torch.arange(rows * tokens).view(rows, tokens) * 7) % 20
    with torch.no_grad():
        return torch.stack([model.head(model.step(model.embed(ids[:, t]), state)) for t in range(tokens)], 1)


def used(model: MambaLM, rows: int = 3) -> RecurrentState:
    state = model.new_state(rows)
    advance(model, state)
    return state


def tensors(state: RecurrentState) -> list[Tensor]:
    return [tensor for layer in state.layers for tensor in layer]


def same(a: RecurrentState, b: RecurrentState) -> bool:
    return a.model == b.model and all(map(torch.equal, tensors(a), tensors(b)))


def test_satisfies_the_contract(model: MambaLM) -> None:
    assert isinstance(model.new_state(1), State)


def test_nbytes_counts_every_tensor(model: MambaLM) -> None:
    conv, ssm = 3 * 3 * (32 + 16), 3 * 4 * 8 * 8
    assert model.new_state(3).nbytes == 2 * 4 * (conv + ssm)
    assert model.new_state(3, dtype=torch.bfloat16).nbytes == 2 * (2 * conv + 4 * ssm)


@pytest.mark.parametrize("index", [[2, 0, 0], torch.tensor([2, 0, 0])])
def test_rows_copies_in_the_requested_order(model: MambaLM, index: list[int] | Tensor) -> None:
    state = used(model)
    chosen = state.rows(index)
    for copy, original in zip(tensors(chosen), tensors(state), strict=True):
        assert torch.equal(copy, torch.stack([original[2], original[0], original[0]]))
    before = state.clone()
    advance(model, chosen)
    assert same(state, before)


def test_a_copied_row_continues_as_in_the_batch(model: MambaLM) -> None:
    state = used(model)
    alone = state.rows([0])
    torch.testing.assert_close(advance(model, alone), advance(model, state)[:1])


def test_write_replaces_only_these_rows(model: MambaLM) -> None:
    state, fresh = used(model), model.new_state(2)
    for tensor in tensors(fresh):
        tensor[0], tensor[1] = 1, 2
    before = state.clone()
    state.write([2, 0], fresh)
    for now, old in zip(tensors(state), tensors(before), strict=True):
        assert torch.equal(now[1], old[1])
        assert (now[2] == 1).all()
        assert (now[0] == 2).all()


def test_write_casts_to_the_dtype_of_the_state(model: MambaLM) -> None:
    state, other = model.new_state(1, dtype=torch.bfloat16), used(model, 1)
    state.write([0], other)
    assert torch.equal(state.layers[0].conv, other.layers[0].conv.to(torch.bfloat16))


def test_write_of_another_model_is_rejected(model: MambaLM) -> None:
    state = used(model)
    before = state.clone()
    for other in (build(width=32), build(num_layers=3)):
        with pytest.raises(ShapeError, match="cannot be written"):
            state.write([0], other.new_state(1))
    assert same(state, before)


def test_clone_is_a_copy(model: MambaLM) -> None:
    state = used(model)
    copy = state.clone()
    assert same(copy, state)
    advance(model, copy)
    assert not same(copy, state)
    assert same(state, used(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loaded_state_equals_the_saved_one(model: MambaLM, tmp_path: Path, dtype: torch.dtype) -> None:
    state = model.new_state(3, dtype=dtype)
    for tensor in tensors(state):
        tensor.normal_()
    state.save(tmp_path / "state.safetensors")
    loaded = model.new_state(3, dtype=dtype)
    loaded.load(tmp_path / "state.safetensors")
    assert same(loaded, state)


def test_loaded_state_continues_identically(model: MambaLM, tmp_path: Path) -> None:
    state = used(model)
    state.save(tmp_path / "state.safetensors")
    expected = advance(model, state)
    loaded = model.new_state(3)
    loaded.load(tmp_path / "state.safetensors")
    assert torch.equal(advance(model, loaded), expected)
    assert same(loaded, state)


def assert_rejected(state: RecurrentState, path: Path, match: str) -> None:
    before = state.clone()
    with pytest.raises(CheckpointError, match=match):
        state.load(path)
    assert same(state, before)


def test_state_of_another_model_is_rejected(model: MambaLM, tmp_path: Path) -> None:
    used(model).save(tmp_path / "s")
    for other in (build(width=32), build(num_layers=3)):
        assert_rejected(other.new_state(3), tmp_path / "s", "model is .*width 16, 2 layers.* needs")


def test_another_number_of_rows_is_rejected(model: MambaLM, tmp_path: Path) -> None:
    used(model).save(tmp_path / "s")
    assert_rejected(
        model.new_state(2), tmp_path / "s", r"0\.conv is .*\(3, 3, 48\), but this state needs .*\(2, 3, 48\)"
    )


def test_another_dtype_is_rejected(model: MambaLM, tmp_path: Path) -> None:
    used(model).save(tmp_path / "s")
    assert_rejected(model.new_state(3, dtype=torch.bfloat16), tmp_path / "s", r"float32 .* needs torch\.bfloat16")


def test_another_format_is_rejected(model: MambaLM, tmp_path: Path) -> None:
    used(model).save(tmp_path / "s")
    saved, metadata = read_tensors(tmp_path / "s")
    write_tensors(tmp_path / "s", saved, {**metadata, "state_format": "0"})
    assert_rejected(model.new_state(3), tmp_path / "s", "state_format is '0'")


def test_missing_tensor_is_rejected_before_anything_is_copied(model: MambaLM, tmp_path: Path) -> None:
    used(model).save(tmp_path / "s")
    saved, metadata = read_tensors(tmp_path / "s")
    del saved["1.ssm"]
    write_tensors(tmp_path / "s", saved, metadata)
    assert_rejected(model.new_state(3), tmp_path / "s", r"1\.ssm is missing")


def test_missing_file_and_weights_are_rejected(model: MambaLM, tmp_path: Path) -> None:
    assert_rejected(model.new_state(3), tmp_path / "none", "cannot be read")
    write_tensors(tmp_path / "weights", {"a": torch.zeros(1)})
    assert_rejected(model.new_state(3), tmp_path / "weights", "state_format is None")


def test_write_needs_one_row_for_each_index(model: MambaLM) -> None:
    with pytest.raises(ShapeError, match="2 rows cannot be overwritten with 1"):
        model.new_state(3).write([0, 1], model.new_state(1))


def test_one_number_is_one_row(model: MambaLM) -> None:
    state = used(model)
    assert same(state.rows(1), state.rows([1]))
    for index in ([0.5], [[0, 1]]):
        with pytest.raises(ShapeError, match="chosen by a list of integers or a mask"):
            state.rows(index)
