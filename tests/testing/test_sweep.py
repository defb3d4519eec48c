"""Contract checks of every registered component and every shipped recipe."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import ssmvl
from ssmvl import testing
from ssmvl.data.mix import Share
from ssmvl.data.shards import ensure_shards, existing_shards
from ssmvl.plugins import components
from ssmvl.recipes.files import recipe_names
from ssmvl.registry import INJECTED, Entry

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 400,
}
TINY = {"width": 64, "num_layers": 2, "num_tokens": 20}
OPTIONS: dict[tuple[str, str], list[dict[str, Any]]] = {
    ("encoder", "timm"): [{"model": "vit_tiny_patch16_224"}],
    ("encoder", "open_clip"): [{"model": "ViT-S-16"}],
    ("encoder", "digit_vit"): [{"stem": "fine"}, {"stem": "coarse"}],
    ("language_model", "causal_lm"): [{"num_tokens": 300, "config": LLAMA}],
    ("language_model", "mamba1_lm"): [TINY],
    ("language_model", "mamba2_lm"): [TINY],
    ("dataset", "digit_scenes"): [{"train_size": 8, "test_size": 5}],
    ("dataset", "shards"): [{"folder": "shards"}],
    ("dataset", "mix"): [
        {"streams": {name: Share(data=partial(existing_shards, folder=name)) for name in ("shards", "others")}}
    ],
}
SMALL = [f"model.language.{key}={value}" for key, value in {"width": 32, "num_layers": 2, "num_tokens": 339}.items()]
MAMBA2 = "mixer={name: mamba2, d_state: 8, head_dim: 16, num_groups: 1}"
ENCODERS = [f"model.encoders.{name}={{name: digit_vit, stem: fine}}" for name in ("dinov2", "siglip")]
# For each layout: tensor names that identify it, the config of such a file, and the recipe and overrides of a model
# that it fits. The layout yields the other names; tests/checkpoints and tests/language write them out by hand.
FILES: dict[str, tuple[list[str], dict[str, Any], list[str]]] = {
    "ssmvl": (["encoders.a", "connector.a", "language.a"], {}, ["quickstart"]),
    "state_spaces": (
        ["backbone.embedding.weight", "backbone.layers.0.mixer.dt_bias"],
        {"ssm_cfg": {"layer": "Mamba2", "d_state": 8, "headdim": 16}},
        ["quickstart", *SMALL, f"model.language.{MAMBA2}"],
    ),
    "transformers_mamba": (
        ["backbone.embeddings.weight", "backbone.layers.0.mixer.dt_bias"],
        {"model_type": "mamba2", "n_groups": 1, "state_size": 8, "head_dim": 16, "time_step_limit": [0.0, math.inf]},
        ["quickstart", *SMALL, f"model.language.{MAMBA2}"],
    ),
    "ml_mamba_release": (
        ["model.bidirectional_mamba.norm_f.weight"],
        {},
        ["ml_mamba", *ENCODERS, *SMALL, f"model.language.{MAMBA2}", f"model.connector.{MAMBA2}"],
    ),
    "cobra_release": (["model.projector.projector.0.weight"], {}, ["cobra", *ENCODERS, *SMALL]),
    "transformers": (
        ["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "lm_head.weight"],
        LLAMA,
        ["quickstart", f"model.language={{name: causal_lm, num_tokens: 339, config: {json.dumps(LLAMA)}}}"],
    ),
}
SWEPT = [
    pytest.param(
        entry,
        options,
        id=" ".join(
            [entry.kind, entry.name, *(str(value) for value in options.values() if not isinstance(value, dict))]
        ),
    )
    for entry in components().entries()
    if entry.kind not in ("recipe", "checkpoint")
    for options in OPTIONS.get((entry.kind, entry.name), [{}])
]


def test_every_kind_has_a_check_and_is_checked() -> None:
    assert sorted(testing.__all__) == sorted(f"check_{kind}" for kind in INJECTED)
    assert {entry.kind for entry, _ in (param.values for param in SWEPT)} | {"recipe", "checkpoint"} == set(INJECTED)
    assert set(FILES) == set(components().names("checkpoint"))
    assert set(OPTIONS) <= {(entry.kind, entry.name) for entry in components().entries()}


@pytest.mark.parametrize(("entry", "options"), SWEPT)
def test_component_keeps_its_contract(
    entry: Entry, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # datasets are written here
    talk = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    for folder in ("shards/train", "shards/test", "others/train", "others/test") if entry.kind == "dataset" else ():
        record = {"id": folder, "type": "", "conversation": talk, "images": []}
        ensure_shards(Path(folder), lambda record=record: [record], 1)
    check = getattr(testing, f"check_{entry.kind}")
    check(partial(entry.load(), **options))


@pytest.mark.parametrize("name", FILES)
def test_layout_keeps_its_contract(name: str) -> None:
    factory, (identifying_names, config, recipe) = components().find("checkpoint", name).load(), FILES[name]
    model = ssmvl.build_model(*recipe)
    layout = factory(names=identifying_names, config=config)
    module = model if layout.part == "model" else model.language
    state = module.state_dict()
    tensors = {
        file_name: part.clone()
        for own, file_names in layout.table(state).items()
        for file_name, part in zip(file_names, state[own].chunk(len(file_names)), strict=True)
    }
    testing.check_checkpoint(factory, tensors, module, config)


@pytest.mark.parametrize("name", recipe_names())
def test_recipe_keeps_its_contract(name: str) -> None:
    testing.check_recipe(name)


def test_importing_the_checks_imports_no_heavy_package() -> None:
    heavy = {"streaming", "composer", "timm", "transformers", "matplotlib"}
    code = f"import sys; from ssmvl.testing import check_scan_order; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_a_check_restores_the_random_state() -> None:
    before = torch.get_rng_state()
    testing.check_mixer(components().find("mixer", "mamba1").load())
    assert torch.equal(torch.get_rng_state(), before)
