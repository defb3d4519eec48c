"""Options of a file's config that must match the recipe, in every notation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_causal_lm_weights import CONFIGS, SIZES, load, make

from ssmvl.errors import CheckpointError

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 32}


@pytest.mark.parametrize("rope", [{"rope_type": "yarn", "factor": 4.0}, {"rope_type": "linear", "factor": 2.0}, LLAMA3])
def test_max_position_embeddings_must_match_for_yarn(rope: dict[str, Any], tmp_path: Path) -> None:
    scaling, yarn = {"rope_scaling": rope}, rope["rope_type"] == "yarn"
    make(1, **CONFIGS["llama"], **scaling, max_position_embeddings=64).model.save_pretrained(tmp_path)
    load(make(2, **CONFIGS["llama"], **scaling, max_position_embeddings=64), tmp_path)
    other = make(2, **CONFIGS["llama"], **scaling, max_position_embeddings=128)
    if yarn:
        with pytest.raises(CheckpointError, match=r"max_position_embeddings is 128, the checkpoint needs 64"):
            load(other, tmp_path)
    else:
        load(other, tmp_path)


def rewrite(folder: Path, **change: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))


NEOX = {"partial_rotary_factor": 0.5}
GEMMA = {"sliding_attention": {"rope_type": "default", "rope_theta": 7.0}}


@pytest.mark.parametrize(
    ("kind", "parameters", "options", "wrong"),
    [
        ("llama", {"rope_type": "default"}, {"rope_theta": 5e5}, {}),
        ("mistral", {"rope_type": "default"}, {"rope_theta": 5e5}, {}),
        (
            "llama",
            {"rope_type": "linear", "factor": 2.0},
            {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_theta": 5e5},
        ),
        (
            "gpt_neox",
            {"rope_type": "default", **NEOX},
            {"rotary_emb_base": 5e5, "rotary_pct": 0.5},
            {"rotary_emb_base": 5e5},
        ),
        ("gemma3_text", GEMMA, {"rope_theta": 5e5, "rope_local_base_freq": 7.0}, {"rope_theta": 5e5}),
    ],
)
def test_rotary_options_as_transformers_5_writes_them(
    kind: str, parameters: dict[str, Any], options: dict[str, Any], wrong: dict[str, Any], tmp_path: Path
) -> None:
    more = {"head_dim": 4, "num_key_value_heads": 4}
    base = {"model_type": kind, **SIZES, **(more if kind in ("mistral", "gemma3_text") else {})}
    written = make(1, **base, **options)
    written.model.save_pretrained(tmp_path)
    theta = {"rope_type": "default", "rope_theta": 5e5}
    parameters = {**parameters, "full_attention": theta} if kind == "gemma3_text" else {**parameters, "rope_theta": 5e5}
    (tmp_path / "config.json").write_text(json.dumps({**base, "rope_parameters": parameters}))
    for notation in ({"rope_parameters": parameters}, options):
        lm = make(2, **base, **notation)
        load(lm, tmp_path)
        embeds = torch.randn(1, 5, 16)
        assert torch.equal(lm.backbone(embeds), written.backbone(embeds))
    with pytest.raises(CheckpointError, match=r"model\.config\.(rope|rotary|partial)_\w+ is .*, the checkpoint needs"):
        load(make(2, **base, **wrong), tmp_path)


@pytest.mark.parametrize(
    ("in_file", "in_recipe"),
    [
        ({"type": "linear", "factor": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        ({"rope_type": "linear", "factor": 2.0}, {"type": "linear", "factor": 2.0}),
        ({"rope_type": "default"}, None),
        (None, {"type": "default"}),
    ],
)
@pytest.mark.parametrize("kind", ["llama", "falcon"])
def test_one_rope_scaling_in_two_notations(
    kind: str, in_file: dict[str, Any] | None, in_recipe: dict[str, Any] | None, tmp_path: Path
) -> None:
    base = CONFIGS[kind]
    make(1, **base).model.save_pretrained(tmp_path)
    rewrite(tmp_path, rope_scaling=in_file)
    load(make(2, **base, rope_scaling=in_recipe), tmp_path)
    with pytest.raises(CheckpointError, match=r"rope_\w+ is .*, the checkpoint needs"):
        load(make(2, **base, rope_scaling={"rope_type": "linear", "factor": 3.0}), tmp_path)


def test_a_rope_scaling_that_the_architecture_does_not_have(tmp_path: Path) -> None:
    make(1, model_type="mistral", **SIZES).model.save_pretrained(tmp_path)
    rewrite(tmp_path, rope_scaling={"type": "linear", "factor": 2.0})
    with pytest.raises(CheckpointError, match=r"rope_\w+ is .*, the checkpoint needs .*linear"):
        load(make(2, model_type="mistral", **SIZES), tmp_path)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("opt", {"init_std": 0.5}),
        ("gpt2", {"summary_type": "last", "summary_use_proj": False}),
        ("mixtral", {"router_aux_loss_coef": 0.5, "router_jitter_noise": 0.1, "output_router_logits": True}),
        ("qwen2", {"max_window_layers": 1}),
    ],
)
def test_options_without_effect_may_differ(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    base = CONFIGS.get(kind, {"model_type": kind, **SIZES, "num_key_value_heads": 4})
    written = make(1, **base, **options)
    written.model.save_pretrained(tmp_path)
    lm = make(2, **base)
    load(lm, tmp_path)
    assert all(torch.equal(tensor, written.state_dict()[name]) for name, tensor in lm.state_dict().items())


def test_max_window_layers_must_match_with_sliding_windows(tmp_path: Path) -> None:
    base = {"model_type": "qwen2", **SIZES, "num_key_value_heads": 4, "use_sliding_window": True, "sliding_window": 3}
    make(1, **base, max_window_layers=1).model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"max_window_layers is 2, the checkpoint needs 1"):
        load(make(2, **base, max_window_layers=2), tmp_path)
