"""Plans: what is run in small against what is run whole, autocast against torch's own, and the switches."""

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


def fullest(moments: list[Counter[str]]) -> int:
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

    def most() -> int:
        with planned.as_trained(checkpointing):
            return fullest(peaks(planned.model, batch, gpu=gpu, shards=1, again=again))

    short = most()
    with patch.object(dry_run, "RUN", 100):
        whole = most()
    assert short == pytest.approx(whole, rel=0.02)
    assert len(planned.model.language.shard_units()) == 8  # all are there again


@pytest.mark.parametrize("overrides", [(), (CHECKPOINTING,), ("stages.finetune.packed=true",)])
@pytest.mark.parametrize("samples", [8, 64])
def test_what_two_samples_need_says_what_many_do(overrides: tuple[str, ...], samples: int) -> None:
    planned = plan(f"stages.finetune.batch={samples}", *overrides)
    with planned.as_trained(bool(CHECKPOINTING in overrides)):
        batch = WorstBatch(samples, 64, bool("stages.finetune.packed=true" in overrides))
        direct = fullest(peaks(planned.model, batch, gpu=True, shards=1, again=False))
    static = planned.memory()[PARAMETERS] + planned.memory()[OPTIMIZER]
    assert planned.memory().total() - static == pytest.approx(direct, rel=0.03)


@pytest.mark.parametrize("language", LANGUAGE)
def test_autocast_keeps_what_torchs_own_keeps(language: str) -> None:
    """The CPU's, whose lists of operations agree in what is run here. It has no tiled attention for shared heads."""
    language = LANGUAGE[language].replace("key_value_heads: 2", "key_value_heads: 4")
    batch, kept = WorstBatch(3, 64, packed=language == LANGUAGE["mamba2"]), []
    meta = ssmvl.build_model(recipe(language), device="meta")
    real = ssmvl.build_model(recipe(language))
    inputs = batch.inputs(meta)
    values = {key: torch.zeros_like(value, device="cpu") for key, value in inputs.items() if key != "images"}
    values["image_positions"] = torch.arange(3 * meta.tokens_per_image)
    values["images"] = {spec: torch.zeros_like(pixels, device="cpu") for spec, pixels in inputs["images"].items()}
    as_gpu = Device(True, Ledger((0, 0)))
    with as_gpu.ledger, as_gpu, patch.object(torch, "autocast", autocast_on_meta):
        kept.append(bytes_kept(meta, inputs))
    with torch.autocast("cpu", torch.bfloat16):
        kept.append(bytes_kept(real, values))
    assert kept[0] == pytest.approx(kept[1], rel=0.02)


def bytes_kept(model: VisionLanguageModel, inputs: dict[str, Any]) -> int:
    """Of what a forward keeps for backward, weights apart."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith("encoders"))
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()  # held: no other comes to stand there
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model(**inputs)
    assert logits.dtype == torch.bfloat16
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    return sum(storage.nbytes() for key, storage in kept.items() if key not in weights)


def test_what_is_held_of_each_parameter() -> None:
    planned, model = plan("stages.finetune.microbatch=8"), ssmvl.build_model("quickstart", device="meta")
    trained = sum(p.nbytes for n, p in model.named_parameters() if not n.startswith("encoders"))
    memory = planned.memory()
    assert memory[PARAMETERS] == sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    assert memory[OPTIMIZER] == 2 * trained
    assert memory[GRADIENTS] == trained  # those of the micro-batches before
    assert memory[GATHERED] == memory[BUCKETS] == 0
    assert memory[LOGITS] >= 2 * 8 * 64 * 352  # in bf16


def test_fsdp2_shares_and_gathers_ddp_does_neither() -> None:
    alone, shared = plan("stages.finetune.microbatch=4"), plan("stages.finetune.microbatch=4", gpus=4)
    copied = plan("stages.finetune.microbatch=4", "stages.finetune.sharding=ddp", gpus=4)
    one, fsdp2, ddp = (planned.memory() for planned in (alone, shared, copied))
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
def test_remedies_fit_and_change_least_first() -> None:
    planned = plan("stages.finetune.sharding=ddp", gpus=4)
    limit = 0.5 * planned.memory().total()
    found = list(planned.remedies(limit))
    assert [(s.sharding, s.activation_checkpointing) for s in found] == [
        *(("ddp", False), ("ddp", True), ("fsdp2", False), ("fsdp2", True))
    ]
    assert all(planned.memory(setting).total() <= limit for setting in found)
    assert {setting.gpus for setting in found} == {4}


@pytest.mark.slow
def test_more_gpus_where_nothing_else_fits() -> None:
    planned = plan("model.language.width=512")
    one_sample = replace(planned.setting, microbatch=1, activation_checkpointing=True)
    (remedy,) = planned.remedies(planned.memory(one_sample).total() - 1)
    assert remedy.gpus > 1
    assert remedy.activation_checkpointing
    assert list(planned.remedies(1e6)) == []
    least, gpus = planned.least()
    assert [setting.gpus for setting in planned.remedies(least)] == [gpus] == [64]
    assert list(planned.remedies(least - 1)) == []


def test_what_was_planned_leaves_the_model_as_it_was() -> None:
    planned = plan(CHECKPOINTING)
    planned.memory()
    assert all("forward" not in vars(unit) for unit in planned.model.shard_units())
    assert all(parameter.grad is None for parameter in planned.model.parameters())
    assert len(planned.model.language.layers) == 4
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in planned.model.modules())


@pytest.mark.parametrize(("duration", "steps"), [("250ba", 250), ("129sp", 3), ("2ep", None), ("5tok", None)])
def test_steps_are_known_where_the_duration_says_them(duration: str, steps: int | None) -> None:
    unit = "".join(filter(str.isalpha, duration))
    assert plan(f"stages.finetune.duration={duration}", f"stages.finetune.warmup=1{unit}").steps() == steps


@pytest.mark.parametrize(
    ("overrides", "gpus", "expected"),
    [
        ((), 7, r"stages\.align\.batch: 64 samples cannot be shared by 7 GPUs; choose a multiple of 7"),
        (("stages.align=null", "stages.finetune=null", "stages.order=null"), 1, r"stages: expected a mapping with at"),
    ],
)
def test_a_recipe_that_cannot_be_planned(overrides: tuple[str, ...], gpus: int, expected: str) -> None:
    with pytest.raises(RecipeError, match=expected):
        stage_plans(recipe(*overrides), gpus)
