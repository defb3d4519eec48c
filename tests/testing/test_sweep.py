"""Every registered component, and every recipe that is shipped, keeps the contract of its kind."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import ssmvl
from ssmvl import testing
from ssmvl.core_plugin import components
from ssmvl.data.shards import ensure_shards
from ssmvl.recipe import recipe_names
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
}
# Names that tell each layout, and overrides of the quickstart that make a model it fits.
MARKS: dict[str, tuple[list[str], list[str]]] = {
    "ssmvl": (["encoders.a", "connector.a", "language.a"], []),
    "state_spaces": (["backbone.embedding.weight"], []),
    "transformers_mamba": (["backbone.embeddings.weight"], []),
    "ml_mamba_release": (["model.bidirectional_mamba.norm_f.weight"], []),
    "cobra_release": (["model.projector.projector.0.weight"], ["model.connector=mlp"]),
    "transformers": (
        ["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "lm_head.weight"],
        [f"model.language={{name: causal_lm, num_tokens: 339, config: {json.dumps(LLAMA)}}}"],
    ),
}
SWEPT = [
    pytest.param(entry, options, id=" ".join([entry.kind, entry.name, *map(str, options.values())]))
    for entry in components().entries()
    if entry.kind not in ("recipe", "checkpoint")
    for options in OPTIONS.get((entry.kind, entry.name), [{}])
]


def test_every_kind_has_a_check_and_is_swept() -> None:
    assert sorted(testing.__all__) == sorted(f"check_{kind}" for kind in INJECTED)
    assert {entry.kind for entry, _ in (param.values for param in SWEPT)} | {"recipe", "checkpoint"} == set(INJECTED)
    assert set(MARKS) == set(components().names("checkpoint"))
    assert set(OPTIONS) <= {(entry.kind, entry.name) for entry in components().entries()}


@pytest.mark.parametrize(("entry", "options"), SWEPT)
def test_component_keeps_its_contract(
    entry: Entry, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where data sets are written
    talk = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    for split in ("train", "test") if entry.name == "shards" else ():
        record = {"id": split, "type": "", "conversation": talk, "images": []}
        ensure_shards(Path("shards") / split, lambda record=record: [record], 1)
    check = getattr(testing, f"check_{entry.kind}")
    assert check(partial(entry.load(), **options)) is None


@pytest.mark.parametrize("name", MARKS)
def test_layout_keeps_its_contract(name: str) -> None:
    layout, (marks, overrides) = components().find("checkpoint", name).load(), MARKS[name]
    model = ssmvl.build_model("quickstart", *overrides)
    found = layout(names=marks, config={})
    module = model if found.part == "model" else model.language
    named = module.state_dict()
    tensors = {
        theirs: part.clone()
        for own, names in found.table(named).items()
        for theirs, part in zip(names, named[own].chunk(len(names)), strict=True)
    }
    assert testing.check_checkpoint(layout, tensors, module) is None


@pytest.mark.parametrize("name", recipe_names())
def test_recipe_keeps_its_contract(name: str) -> None:
    assert testing.check_recipe(name) is None


def test_the_checks_import_nothing_heavy_before_they_need_it() -> None:
    heavy = {"streaming", "composer", "timm", "transformers", "matplotlib"}
    code = f"import sys; from ssmvl.testing import check_scan_order; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_a_check_is_the_same_each_time_and_leaves_random_numbers_alone() -> None:
    before = torch.get_rng_state()
    testing.check_mixer(components().find("mixer", "mamba1").load())
    assert torch.equal(torch.get_rng_state(), before)
