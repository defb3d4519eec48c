"""Safetensors files: atomic writing and strict reading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ssmvl.checkpoints import copy_into, files, read_tensors, write_tensors
from ssmvl.errors import CheckpointError


def write(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    path = folder / "model.safetensors"
    write_tensors(path, tensors)
    return path


def load(module: nn.Module, path: Path) -> None:
    copy_into(module, read_tensors(path)[0], str(path))


def test_round_trip_keeps_values_dtypes_and_metadata(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(2, 3),
        "b.c": torch.randn(4).to(torch.bfloat16),
        "n": torch.tensor(7),
        "none": torch.empty(0, 3, dtype=torch.uint8),
    }
    write_tensors(tmp_path / "x.safetensors", tensors, {"who": "me"})
    read, metadata = read_tensors(tmp_path / "x.safetensors")
    assert metadata == {"who": "me"}
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(read[name], tensor, rtol=0, atol=0)


def test_without_metadata(tmp_path: Path) -> None:
    assert read_tensors(write(tmp_path, {"a": torch.zeros(1)}))[1] == {}


def test_parameters_and_transposed_views_are_written(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.randn(2, 3))
    tensors, _ = read_tensors(write(tmp_path, {"w": weight, "t": torch.arange(6).view(2, 3).T}))
    assert torch.equal(tensors["w"], weight)
    assert tensors["t"].tolist() == [[0, 3], [1, 4], [2, 5]]


def test_a_file_is_readable_by_all_and_leaves_no_temporary_files(tmp_path: Path) -> None:
    path = write(tmp_path, {"a": torch.zeros(1)})
    assert path.stat().st_mode & 0o777 == 0o644
    assert list(tmp_path.iterdir()) == [path]


def test_a_crash_while_writing_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, {"a": torch.ones(1)})
    before = path.read_bytes()

    def crash(tensors: Any, filename: Path, metadata: Any) -> None:
        Path(filename).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(files, "save_file", crash)
    with pytest.raises(OSError, match="no space left"):
        write(tmp_path, {"a": torch.zeros(1)})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_new_file_replaces_the_old_one(tmp_path: Path) -> None:
    write(tmp_path, {"a": torch.ones(1)})
    tensors, _ = read_tensors(write(tmp_path, {"b": torch.zeros(2)}))
    assert tensors.keys() == {"b"}


@pytest.mark.parametrize("keep", [0, 4, 60, -1])
def test_a_truncated_file_is_rejected(tmp_path: Path, keep: int) -> None:
    path = write(tmp_path, {"a": torch.ones(8)})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read"):
        read_tensors(path)


def test_a_missing_file_and_a_directory_are_rejected(tmp_path: Path) -> None:
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(CheckpointError, match=f"{path.name}: cannot be read"):
            read_tensors(path)


def test_load_copies_every_value(tmp_path: Path) -> None:
    source, target = nn.Linear(3, 2), nn.Linear(3, 2)
    load(target, write(tmp_path, source.state_dict()))
    assert torch.equal(target.weight, source.weight)
    assert torch.equal(target.bias, source.bias)
    assert target.weight.requires_grad


def test_load_casts_to_the_modules_dtypes(tmp_path: Path) -> None:
    source, target = nn.Linear(3, 2), nn.Linear(3, 2).to(torch.bfloat16)
    load(target, write(tmp_path, source.state_dict()))
    assert target.weight.dtype == torch.bfloat16
    assert torch.equal(target.weight, source.weight.to(torch.bfloat16))


def test_the_error_lists_every_difference_and_copies_nothing(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tensors = {name: torch.full_like(tensor, 9) for name, tensor in before.items()}
    del tensors["0.bias"]
    tensors |= {"1.weight": torch.zeros(2, 5), "2.extra": torch.zeros(4)}
    with pytest.raises(CheckpointError) as error:
        load(model, write(tmp_path, tensors))
    assert str(error.value).splitlines()[1:] == [
        "  1.weight is (2, 5), the model has (2, 2)",
        "  missing 0.bias (2,)",
        "  unexpected 2.extra (4,)",
    ]
    assert "model.safetensors does not fit" in str(error.value)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_a_long_list_of_differences_is_shortened(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.zeros(1) for i in range(25)}
    with pytest.raises(CheckpointError, match="and 5 more") as error:
        load(nn.Module(), write(tmp_path, tensors))
    assert len(str(error.value).splitlines()) == 22
