"""Parsing of the `weights` option, and checks of normalization statistics."""

from __future__ import annotations

import pytest

from ssmvl.checkpoints.hub import hub_file
from ssmvl.errors import CheckpointError, ContractError
from ssmvl.vision.pretrained import (
    PICKLES,
    Source,
    Trained,
    parse_weights,
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
def test_parse_weights(weights: str, source: Source) -> None:
    assert parse_weights(weights, ["openai"], "vit") == source


@pytest.mark.parametrize("suffix", PICKLES)
def test_pickles_are_rejected_with_the_reason(suffix: str) -> None:
    with pytest.raises(ContractError, match="a pickle can run arbitrary code; save its tensors as safetensors"):
        parse_weights(f"model{suffix}", ["openai"], "vit")


def test_a_model_without_tags_allows_none() -> None:
    with pytest.raises(ContractError, match=r"or a tag of 'vit', received 'openai'\. Allowed: nothing"):
        parse_weights("openai", [], "vit")


def test_a_malformed_repository_is_a_checkpoint_error() -> None:
    match = r"model\.safetensors of a/b/c cannot be downloaded .*local-dir:DIRECTORY"
    with pytest.raises(CheckpointError, match=match):
        hub_file("a/b/c", "model.safetensors")


def test_statistics_may_be_absent_or_equal() -> None:
    half = (0.5, 0.5, 0.5)
    require_statistics({}, half, half, "vit.", {})
    require_statistics({"mean": [0.5] * 3, "std": [0.5] * 3}, half, half, "vit.", {})
    match = r"and std \(1\.0,\), but the encoder .*; no tag vit\.TAG has these values$"
    with pytest.raises(CheckpointError, match=match):
        require_statistics({"std": [1.0]}, half, half, "vit.", {"own": Trained(half, half, False)})
