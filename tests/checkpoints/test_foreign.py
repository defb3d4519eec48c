"""Third-party checkpoints: opened lazily, rejected if they are damaged or would execute code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ssmvl.checkpoints import files as own_files
from ssmvl.checkpoints import open_checkpoint, write_tensors
from ssmvl.checkpoints.files import write_folder
from ssmvl.errors import CheckpointError

TENSORS = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}


def same(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return tensors.keys() == expected.keys() and all(
        tensors[n].dtype == t.dtype and torch.equal(tensors[n], t) for n, t in expected.items()
    )


@pytest.mark.parametrize("name", ["x.safetensors", "model.safetensors", "pytorch_model.bin", "x.pt", "x.pth"])
def test_a_file_or_its_directory(tmp_path: Path, name: str) -> None:
    if name.endswith("safetensors"):
        write_tensors(tmp_path / name, TENSORS)
    else:
        torch.save(TENSORS, tmp_path / name)
    (tmp_path / "config.json").write_text('{"d_model": 3}')
    for path in (tmp_path, tmp_path / name, str(tmp_path / name)):
        opened = open_checkpoint(path)
        assert same(opened.tensors, TENSORS)
        assert opened.config == {"d_model": 3}
        assert opened.source == str(tmp_path / name)


def test_nested_mappings_are_joined_by_dots_and_other_leaves_ignored(tmp_path: Path) -> None:
    torch.save({"model": {"mlp": {"0.weight": torch.ones(2)}, "step": 3}, "note": "x"}, tmp_path / "x.pt")
    assert same(open_checkpoint(tmp_path / "x.pt").tensors, {"model.mlp.0.weight": torch.ones(2)})


def test_shards_of_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_files, "SHARD", 30)
    write_folder(tmp_path / "model", TENSORS, {"about.txt": "x"})
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert names == {
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "about.txt",
        "SHA256SUMS",
    }
    assert same(open_checkpoint(tmp_path / "model").tensors, TENSORS)
    monkeypatch.undo()
    write_folder(tmp_path / "model", TENSORS, {"about.txt": "x"})  # replaces the shards
    assert {path.name for path in (tmp_path / "model").iterdir()} == {
        "model.safetensors",
        "about.txt",
        "SHA256SUMS",
    }


def test_a_tensor_with_two_names_is_written_once(tmp_path: Path) -> None:
    write_folder(tmp_path / "model", {"a": TENSORS["b"], "head": TENSORS["b"], "none": torch.empty(0)}, {})
    assert open_checkpoint(tmp_path / "model").tensors.keys() == {"a", "none"}


def sharded(folder: Path) -> Path:
    """Write two torch files and their index in the format of transformers."""
    torch.save({"a.weight": TENSORS["a.weight"]}, folder / "pytorch_model-00001-of-00002.bin")
    torch.save({"b": TENSORS["b"]}, folder / "pytorch_model-00002-of-00002.bin")
    weight_map = {"a.weight": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
    return write_index(folder, weight_map)


def write_index(folder: Path, weight_map: Any) -> Path:
    path = folder / "pytorch_model.bin.index.json"
    path.write_text(json.dumps({"weight_map": weight_map}))
    return path


def test_shards_of_torch(tmp_path: Path) -> None:
    index = sharded(tmp_path)
    for path in (index, tmp_path):
        assert same(open_checkpoint(path).tensors, TENSORS)


def test_a_missing_shard(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(CheckpointError, match=r"00002-of-00002\.bin: missing, but .* is the download complete"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a.weight": "pytorch_model-00001-of-00002.bin", "b": "../b.bin"}, "is in another directory"),
        (
            {"a.weight": "pytorch_model-00001-of-00002.bin", "c": "pytorch_model-00002-of-00002.bin"},
            "do not match .*: b, c",
        ),
        ({}, "weight_map"),
        ([], "weight_map"),
        ({"a": 3}, "weight_map"),
        ({"a": "pytorch_model.bin.index.json"}, "is not a tensor file"),
        ({"a": ""}, r"missing, but pytorch_model\.bin\.index\.json lists it"),
        ({"a": ".."}, "missing, but"),
        ({"a": "x" * 5000}, "is not a valid path"),
        ({"a": "x" * 5000 + "/y"}, "is in another directory"),
        ({"a": "\0.bin"}, "missing, but"),
        ({"a": {"b": "c"}}, "weight_map"),
        ("pytorch_model-00001-of-00002.bin", "weight_map"),
    ],
)
def test_an_invalid_index(tmp_path: Path, weight_map: Any, message: str) -> None:
    sharded(tmp_path)
    write_index(tmp_path, weight_map)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": {"b": 1.0}, "a.b": 2.0}, r"two tensors of one name, 'a' > 'b' and 'a\.b'"),
        ({"a": {1: 1.0, "1": 2.0}}, r"two tensors of one name, 'a' > 1 and 'a' > '1'"),
        ({"a": {"b": [1, 2.0]}}, r"a tensor in a list \('a' > 'b' > 1\), without a name"),
        ({"a": ({"b": 2.0},)}, r"a tensor in a list \('a' > 0 > 'b'\), without a name"),
        ({"x" * 5000: {"b": 1.0}, "x" * 5000 + ".b": 1.0}, "two tensors of one name"),
    ],
)
def test_tensors_without_a_unique_name(tmp_path: Path, tree: dict[Any, Any], message: str) -> None:
    def tensors(node: Any) -> Any:  # floats stand for tensors
        if isinstance(node, dict):
            return {key: tensors(value) for key, value in node.items()}
        if isinstance(node, list | tuple):
            return type(node)(map(tensors, node))
        return torch.full((2,), node) if isinstance(node, float) else node

    torch.save(tensors(tree), tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=message) as error:
        open_checkpoint(tmp_path / "x.pt")
    assert len(str(error.value)) < 1500


def test_lists_without_tensors_are_ignored(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2), "args": {"betas": (0.9, 0.99), "names": ["x", {"y": 1}]}}, tmp_path / "x.pt")
    assert same(open_checkpoint(tmp_path / "x.pt").tensors, {"a": torch.ones(2)})


def test_a_cyclic_file(tmp_path: Path) -> None:
    tree: dict[str, Any] = {"a": torch.ones(2)}
    tree["self"] = {"again": tree}
    torch.save(tree, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"x\.pt: is cyclic"):
        open_checkpoint(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.eye(3).to_sparse(), r"a is torch\.sparse_coo; save dense tensors"),
        (torch.ones(3, device="meta"), "a is on meta, without values; save dense tensors"),
    ],
)
def test_tensors_without_dense_values(tmp_path: Path, tensor: Tensor, message: str) -> None:
    torch.save({"a": tensor}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "x.pt")


class Exploit:
    """Object that creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_a_pickle_with_other_objects_is_rejected_and_not_executed(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1), "args": Exploit(tmp_path / "ran")}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"x\.pt: contains more than tensors.*rejected.*safetensors"):
        open_checkpoint(tmp_path / "x.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["x.safetensors", "x.pt"])
@pytest.mark.parametrize("keep", [0, 3, 100, -1])
def test_a_truncated_file(tmp_path: Path, name: str, keep: int) -> None:
    if name == "x.pt":
        torch.save(TENSORS, tmp_path / name)
    else:
        write_tensors(tmp_path / name, TENSORS)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=rf"{name}: cannot be read"):
        open_checkpoint(tmp_path / name)


@pytest.mark.parametrize("name", ["x.safetensors", "x.pt"])
def test_a_git_lfs_pointer(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(CheckpointError, match=rf"{name}: is a Git LFS pointer.*git lfs pull"):
        open_checkpoint(tmp_path / name)


def test_a_file_of_an_old_torch_version(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "x.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"x\.bin: cannot be read.*zip file.*before 1\.6.*weights_only=True"):
        open_checkpoint(tmp_path / "x.bin")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "contains none"),
        (["a.pt", "b.pt"], r"contains several \(a\.pt, b\.pt\)"),
        (["config.json"], "contains none"),
    ],
)
def test_a_directory_without_exactly_one_checkpoint(tmp_path: Path, files: list[str], message: str) -> None:
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def test_the_first_of_the_usual_files_in_a_directory_is_used(tmp_path: Path) -> None:
    """Models on the Hub may have both safetensors and pickles, or both shards and a single file; the id names none."""
    single = {"b": torch.zeros(1)}
    torch.save(single, tmp_path / "pytorch_model.bin")
    torch.save(single, tmp_path / "optimizer.bin")
    assert same(open_checkpoint(tmp_path).tensors, single)
    path = sharded(tmp_path)
    assert same(open_checkpoint(tmp_path).tensors, TENSORS)
    assert same(open_checkpoint(tmp_path / "pytorch_model.bin").tensors, single)
    safe = {"a.weight": torch.zeros(2, 3)}
    write_tensors(tmp_path / "model.safetensors", safe)
    assert same(open_checkpoint(tmp_path).tensors, safe)
    shard = {"c": torch.ones(3)}
    write_tensors(tmp_path / "b.safetensors", shard)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"c": "b.safetensors"}}))
    assert same(open_checkpoint(tmp_path).tensors, shard)
    assert same(open_checkpoint(path).tensors, TENSORS)


@pytest.mark.parametrize("path", ["~nouser/x.pt", "x" * 5000, "~nouser"])
def test_an_invalid_path(path: str) -> None:
    with pytest.raises(CheckpointError, match="is not a valid path") as error:
        open_checkpoint(path)
    assert len(str(error.value)) < 1500


def test_infinity_as_newer_transformers_write_it(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x.safetensors", TENSORS)
    (tmp_path / "config.json").write_text('{"time_step_limit": [0.0, {"__float__": "Infinity"}]}')
    assert open_checkpoint(tmp_path).config == {"time_step_limit": [0.0, float("inf")]}


def test_a_missing_path_an_unknown_suffix_and_a_broken_config(tmp_path: Path) -> None:
    (tmp_path / "x.npz").touch()
    write_tensors(tmp_path / "x.safetensors", TENSORS)
    for text in ("{", "[]", "[" * 100_000, '{"a":' * 100_000, '{"a": {"__float__": []}}', '{"a": {"__float__": "x"}}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"config\.json"):
            open_checkpoint(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint(tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match=r"must end in one of \.safetensors, \.bin"):
        open_checkpoint(tmp_path / "x.npz")
