"""Planned memory against CUDA's allocator, in a bare loop under bf16 autocast. Composer is not needed."""

from __future__ import annotations

import gc
from functools import partial

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import ssmvl
from ssmvl.training.checked import check
from ssmvl.training.planning.dry_run import WorstBatch
from ssmvl.training.planning.plan import StagePlan

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
TEXT, SAMPLES = 512, 8
STAGE = (
    *("stages.align=null", "stages.order=null", f"stages.finetune.batch={SAMPLES}", "stages.finetune.packed=true"),
    *("model.language.width=768", "model.language.num_layers=12", f"stages.finetune.max_text_tokens={TEXT}"),
)


@pytest.mark.parametrize("microbatch", [4, SAMPLES])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_memory_of_a_step_is_as_planned(
    checkpointing: bool, microbatch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSMVL_BACKEND", "torch")  # the backend that plans assume
    overrides = (f"stages.finetune.activation_checkpointing={str(checkpointing).lower()}",)
    recipe = ssmvl.load_recipe("quickstart", *STAGE, *overrides, f"stages.finetune.microbatch={microbatch}")
    stage = check(recipe).plan.stages["finetune"]
    planned = StagePlan(ssmvl.build_model(recipe, device="meta"), stage, 1).memory().total()

    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    model = ssmvl.build_model(recipe).cuda()
    model.encoders.requires_grad_(False)
    for unit in model.shard_units() if checkpointing else ():
        unit.forward = partial(checkpoint, unit.forward, use_reentrant=False)
    image_tokens = model.tokens_per_image
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    starts = torch.arange(microbatch)[:, None] * (image_tokens + TEXT)
    shapes = WorstBatch(microbatch, TEXT, packed=True).inputs(model)
    inputs = {
        "ids": torch.zeros(shapes["ids"].shape, dtype=torch.int64),
        "segments": torch.arange(microbatch).repeat_interleave(image_tokens + TEXT)[None].int(),
        "image_positions": (starts + torch.arange(image_tokens)).flatten(),
        "label_positions": (starts + image_tokens - 1 + torch.arange(TEXT)).flatten(),
    }
    inputs = {key: value.cuda() for key, value in inputs.items()}
    images = {spec: torch.zeros(pixels.shape, dtype=torch.uint8).cuda() for spec, pixels in shapes["images"].items()}
    labels = torch.zeros(microbatch * TEXT, dtype=torch.int64).cuda()
    for _ in range(3):
        torch.cuda.reset_peak_memory_stats()
        optimizer.zero_grad()
        for _ in range(SAMPLES // microbatch):
            with torch.autocast("cuda", torch.bfloat16):
                logits = model(**inputs, images=images)
                loss = F.cross_entropy(logits.float(), labels, reduction="sum") / len(labels)
            loss.backward()
        optimizer.step()
    measured = torch.cuda.max_memory_allocated() - before
    assert planned == pytest.approx(measured, rel=0.15)
