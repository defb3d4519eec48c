"""Plans: shortened models against full ones, emulated autocast against torch's, and the effects of settings."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

import ssmvl
from ssmvl.errors import RecipeError
from ssmvl.model.costs import autocast_on_meta
from ssmvl.model.vlm import VisionLanguageModel
from ssmvl.recipes.merge import Recipe
from ssmvl.training.planning import dry_run
from ssmvl.training.planning.device_emulation import Device
from ssmvl.training.planning.dry_run import WorstBatch, peaks
from ssmvl.training.planning.memory_ledger import ACTIVATIONS, GRADIENTS, LOGITS, Ledger
from ssmvl.training.planning.plan import BUCKETS, GATHERED, OPTIMIZER, PARAMETERS, STEP, StagePlan, stage_plans

TEXT = "stages.finetune.max_text_tokens=64"
CHECKPOINTING = "stages.finetune.activation_checkpointing=true"
ATTENTION = (
    "model.language={name: causal_lm, num_tokens: 339, config: {model_type: llama, hidden_size: 128, vocab_size: 352,"
    " intermediate_size: 256, num_hidden_layers: 8, num_attention_heads: 4, num_key_value_heads: 2}}"
)
LANGUAGE = {
    "mamba2": "model.language.num_layers=8",
    "mamba1": "model.language={name: mamba1_lm, width: 128, num_layers: 8, num_tokens: 339}",
    "attention": ATTENTION,
}


def recipe(*overrides: str) -> Recipe:
    return ssmvl.load_recipe("quickstart", TEXT, *overrides)


def plan(*overrides: str, gpus: int = 1) -> StagePlan:
    return stage_plans(recipe(*overrides), gpus)["finetune"]


def peak_bytes(moments: list[Counter[str]]) -> int:
    return max(moment.total() for moment in moments)


@pytest.mark.parametrize(
    ("language", "checkpointing", "gpu", "again"),
    [
        ("mamba2", False, True, True),
        ("mamba2", True, True, False),
        ("mamba1", False, False, False),
        ("mamba1", True, True, True),
        ("attention", False, True, False),
        ("attention", True, False, True),
    ],
)
def test_three_blocks_stand_for_all(language: str, checkpointing: bool, gpu: bool, again: bool) -> None:
    planned = plan(LANGUAGE[language], f"stages.finetune.activation_checkpointing={str(checkpointing).lower()}")
    batch = WorstBatch(3, 64, packed=language == "mamba2")

    def peak() -> int:
        with planned.as_trained(checkpointing):
            return peak_bytes(peaks(planned.model, batch, gpu=gpu, shards=1, again=again))

    shortened = peak()
    with patch.object(dry_run, "RUN", 100):
        full = peak()
    assert shortened == pytest.approx(full, rel=0.02)
    assert len(planned.model.language.shard_units()) == 8  # all blocks are restored


@pytest.mark.parametrize("overrides", [(), (CHECKPOINTING,), ("stages.finetune.packed=true",)])
@pytest.mark.parametrize("samples", [8, 64])
def test_extrapolation_matches_a_run_of_all_samples(overrides: tuple[str, ...], samples: int) -> None:
    planned = plan(f"stages.finetune.batch={samples}", *overrides)
    with planned.as_trained(bool(CHECKPOINTING in overrides)):
        batch = WorstBatch(samples, 64, bool("stages.finetune.packed=true" in overrides))
        direct = peak_bytes(peaks(planned.model, batch, gpu=True, shards=1, again=False))
    static = planned.memory()[PARAMETERS] + planned.memory()[OPTIMIZER]
    assert planned.memory().total() - static == pytest.approx(direct, rel=0.03)


@pytest.mark.parametrize("language", LANGUAGE)
def test_emulated_autocast_keeps_the_bytes_of_torchs(language: str) -> None:
    """Compared on a CPU, where autocast covers the same ops here. It has no tiled attention for shared key heads."""
    language = LANGUAGE[language].replace("key_value_heads: 2", "key_value_heads: 4")
    batch, kept = WorstBatch(3, 64, packed=language == LANGUAGE["mamba2"]), []
    meta = ssmvl.build_model(recipe(language), device="meta")
    real = ssmvl.build_model(recipe(language))
    inputs = batch.inputs(meta)
    values = {key: torch.zeros_like(value, device="cpu") for key, value in inputs.items() if key != "images"}
    values["image_positions"] = torch.arange(3 * meta.tokens_per_image)
    values["images"] = {spec: torch.zeros_like(pixels, device="cpu") for spec, pixels in inputs["images"].items()}
    emulated = Device(True, Ledger((0, 0)))
    with emulated.ledger, emulated, patch.object(torch, "autocast", autocast_on_meta):
        kept.append(bytes_kept(meta, inputs))
    with torch.autocast("cpu", torch.bfloat16):
        kept.append(bytes_kept(real, values))
    assert kept[0] == pytest.approx(kept[1], rel=0.02)


def bytes_kept(model: VisionLanguageModel, inputs: dict[str, Any]) -> int:
    """Return the bytes that a forward keeps for backward, except weights."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith("encoders"))
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()  # kept, so that its address is not reused
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model(**inputs)
    assert logits.dtype == torch.bfloat16
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    return sum(storage.nbytes() for key, storage in kept.items() if key not in weights)


def test_bytes_of_parameters_gradients_and_optimizer() -> None:
    planned, model = plan("stages.finetune.microbatch=8"), ssmvl.build_model("quickstart", device="meta")
    trained = sum(p.nbytes for n, p in model.named_parameters() if not n.startswith("encoders"))
    memory = planned.memory()
    assert memory[PARAMETERS] == sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    assert memory[OPTIMIZER] == 2 * trained
    assert memory[GRADIENTS] == trained  # those of earlier micro-batches
    assert memory[GATHERED] == memory[BUCKETS] == 0
    assert memory[LOGITS] >= 2 * 8 * 64 * 352  # in bf16


def test_fsdp2_shards_and_gathers_ddp_does_neither() -> None:
    single, sharded = plan("stages.finetune.microbatch=4"), plan("stages.finetune.microbatch=4", gpus=4)
    replicated = plan("stages.finetune.microbatch=4", "stages.finetune.sharding=ddp", gpus=4)
    one, fsdp2, ddp = (planned.memory() for planned in (single, sharded, replicated))
    for kind in (OPTIMIZER, GRADIENTS):
        assert ddp[kind] == one[kind]
        assert fsdp2[kind] == pytest.approx(one[kind] / 4, rel=0.02)
    assert ddp[BUCKETS] == one[OPTIMIZER] / 2
    assert fsdp2[BUCKETS] == one[GATHERED] == ddp[GATHERED] == 0
    assert 0 < fsdp2[GATHERED] < 2 * one[PARAMETERS]
    assert fsdp2[ACTIVATIONS] == one[ACTIVATIONS]


def test_a_small_batch_peaks_in_the_optimizers_step() -> None:
    tall = ("model.language.width=512", "stages.finetune.max_text_tokens=1", "stages.finetune.batch=1")
    memory = plan(*tall, CHECKPOINTING).memory()
    assert memory[STEP] == memory[GRADIENTS] == memory[OPTIMIZER] / 2
    assert memory[ACTIVATIONS] == 0


def test_the_largest_microbatch_fits_and_twice_it_does_not() -> None:
    planned = plan()
    sizes = {size: planned.memory(replace(planned.setting, microbatch=size)).total() for size in (1, 2, 4, 8, 16, 64)}
    assert sorted(sizes.values()) == list(sizes.values())
    assert planned.largest(sizes[4]) == 4
    assert planned.largest(sizes[4] - 1) == 2
    assert planned.largest(sizes[1] - 1) == 0
    assert planned.largest(10 * sizes[64]) == 64


@pytest.mark.long
def test_remedies_fit_and_come_with_fewest_changes_first() -> None:
    planned = plan("stages.finetune.sharding=ddp", gpus=4)
    limit = 0.5 * planned.memory().total()
    remedies = list(planned.remedies(limit))
    assert [(s.sharding, s.activation_checkpointing) for s in remedies] == [
        *(("ddp", False), ("ddp", True), ("fsdp2", False), ("fsdp2", True))
    ]
    assert all(planned.memory(setting).total() <= limit for setting in remedies)
    assert {setting.gpus for setting in remedies} == {4}


@pytest.mark.slow
def test_more_gpus_if_nothing_else_fits() -> None:
    planned = plan("model.language.width=512")
    one_sample = replace(planned.setting, microbatch=1, activation_checkpointing=True)
    (remedy,) = planned.remedies(planned.memory(one_sample).total() - 1)
    assert remedy.gpus > 1
    assert remedy.activation_checkpointing
    assert list(planned.remedies(1e6)) == []
    least, gpus = planned.least()
    assert [setting.gpus for setting in planned.remedies(least)] == [gpus] == [64]
    assert list(planned.remedies(least - 1)) == []


def test_planning_leaves_the_model_unchanged() -> None:
    planned = plan(CHECKPOINTING)
    planned.memory()
    assert all("forward" not in vars(unit) for unit in planned.model.shard_units())
    assert all(parameter.grad is None for parameter in planned.model.parameters())
    assert len(planned.model.language.layers) == 4
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in planned.model.modules())


@pytest.mark.parametrize(("duration", "steps"), [("250ba", 250), ("129sp", 3), ("2ep", None), ("5tok", None)])
def test_steps_are_known_if_the_duration_states_them(duration: str, steps: int | None) -> None:
    unit = "".join(filter(str.isalpha, duration))
    assert plan(f"stages.finetune.duration={duration}", f"stages.finetune.warmup=1{unit}").steps() == steps


@pytest.mark.parametrize(
    ("overrides", "gpus", "expected"),
    [
        ((), 7, r"stages\.align\.batch: 64 samples cannot be split evenly across 7 GPUs; choose a multiple of 7"),
        (("stages.align=null", "stages.finetune=null", "stages.order=null"), 1, r"stages: expected a mapping with at"),
    ],
)
def test_a_recipe_that_cannot_be_planned(overrides: tuple[str, ...], gpus: int, expected: str) -> None:
    with pytest.raises(RecipeError, match=expected):
        stage_plans(recipe(*overrides), gpus)
