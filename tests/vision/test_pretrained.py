"""Where an encoder's weights come from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ssmvl.checkpoints import write_tensors
from ssmvl.checkpoints.hub import hub_file
from ssmvl.errors import CheckpointError, ContractError
from ssmvl.vision.pretrained import (
    PICKLES,
    Source,
    Trained,
    adapting,
    folder_file,
    parse_weights,
    read_under,
    require_statistics,
)


@pytest.mark.parametrize(
    ("weights", "source"),
    [
        ("none", Source("none")),
        ("a/b.safetensors", Source("file", "a/b.safetensors")),
        ("openai", Source("tag", "openai")),
        ("local-dir:/a/b", Source("folder", "/a/b")),
        ("local-dir:x.safetensors", Source("folder", "x.safetensors")),
    ],
)
def test_what_weights_say(weights: str, source: Source) -> None:
    assert parse_weights(weights, ["openai"], "vit") == source


@pytest.mark.parametrize("suffix", PICKLES)
def test_pickles_are_refused_with_the_reason(suffix: str) -> None:
    with pytest.raises(ContractError, match="reading a pickle can run any code; save its tensors as safetensors"):
        parse_weights(f"model{suffix}", ["openai"], "vit")


def test_a_model_without_tags_allows_none() -> None:
    with pytest.raises(ContractError, match=r"nor a tag of 'vit'\. Allowed: nothing"):
        parse_weights("openai", [], "vit")


def test_a_malformed_repository_is_a_checkpoint_error() -> None:
    with pytest.raises(CheckpointError, match=r"model\.safetensors of a/b/c cannot be fetched .*local-dir:FOLDER"):
        hub_file("a/b/c", "model.safetensors")


def test_a_home_folder_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.json").write_text('{"a": 1}')
    assert folder_file("~", "a.json") == tmp_path / "a.json"


def test_an_empty_folder_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"must hold a\.json.*Found: nothing"):
        folder_file(str(tmp_path), "a.json")


def test_reads_what_lies_under_a_prefix(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"visual.a": torch.ones(2), "text.a": torch.zeros(2)})
    found = read_under(path, "visual.")
    assert found.keys() == {"a"}
    assert torch.equal(found["a"], torch.ones(2))
    with pytest.raises(CheckpointError, match=r"holds no tensor named vision\.\*, but text\.a, visual\.a"):
        read_under(path, "vision.")


def test_statistics_may_be_absent_or_equal(tmp_path: Path) -> None:
    half = (0.5, 0.5, 0.5)
    require_statistics(tmp_path, {}, half, half, "vit.", {})
    require_statistics(tmp_path, {"mean": [0.5] * 3, "std": [0.5] * 3}, half, half, "vit.", {})
    with pytest.raises(CheckpointError, match=r"and std \(1\.0,\), the encoder .*; no tag vit\.TAG has those$"):
        require_statistics(tmp_path, {"std": [1.0]}, half, half, "vit.", {"own": Trained(half, half, False)})


@pytest.mark.parametrize("error", [KeyError("pos"), RuntimeError("pos"), AssertionError("pos")])
def test_what_fails_while_adapting_names_the_file(error: Exception) -> None:
    with pytest.raises(CheckpointError, match=rf"a\.safetensors: does not fit the model \({type(error).__name__}"):
        with adapting(Path("a.safetensors")):
            raise error


def test_an_error_that_names_a_file_already_is_left_as_it_is() -> None:
    with pytest.raises(CheckpointError, match=r"^b: another model$"):
        with adapting(Path("a.safetensors")):
            raise CheckpointError("b: another model")
