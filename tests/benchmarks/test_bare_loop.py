"""The bare training loop with a tiny model: its FLOP counts and its training, not the measured values."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from ssmvl.benchmarks import bare_loop
from ssmvl.benchmarks.bare_loop import LOOPS, PEAKS, Loop, loop_cases, token_operations
from ssmvl.benchmarks.memory import build
from ssmvl.benchmarks.model_cases import Row
from ssmvl.language.mamba_lm import MambaLM
from ssmvl.training.activation_checkpointing import checkpoint_activations

TOY = (Loop("toy", width=64, num_layers=2, rows=2, length=40, num_tokens=500),)


def rows() -> dict[str, Row]:
    return {row.case: row for row in loop_cases("cpu", TOY)}


def test_a_loop_learns_and_has_no_share_on_an_unknown_gpu() -> None:
    by_case = rows()
    assert list(by_case) == [f"{name} toy, torch" for name in ("train", "loss", "read", "write")]
    assert all(math.isfinite(row.value) and row.value > 0 for row in by_case.values())
    loss = by_case.pop("loss toy, torch")
    assert loss.limit == pytest.approx(math.log(500), rel=0.1)
    assert loss.value < 0.8 * loss.limit
    assert all((row.limit, row.of_limit) == (None, None) for row in by_case.values())


def test_a_batch_that_does_not_fit_is_checkpointed(monkeypatch: pytest.MonkeyPatch) -> None:
    models, cross_entropy = [], F.cross_entropy

    def recorded(model: MambaLM) -> None:
        models.append(model)
        checkpoint_activations(model)

    def loss(*args: Any) -> torch.Tensor:
        if not models:
            raise torch.OutOfMemoryError
        return cross_entropy(*args)

    monkeypatch.setattr(bare_loop, "checkpoint_activations", recorded)
    monkeypatch.setattr(bare_loop.F, "cross_entropy", loss)
    assert all(name.endswith(" toy, torch, checkpointed") for name in rows())
    assert models


def test_the_share_on_a_known_gpu_is_the_mfu(monkeypatch: pytest.MonkeyPatch) -> None:
    row = bare_loop.measure(TOY[0], "toy", "cpu", peak=2.0)[0]
    flops = 3 * token_operations(build(TOY[0].shape, "meta"), TOY[0].shape)
    assert row.limit == pytest.approx(2e12 / flops)
    assert row.of_limit == pytest.approx(row.value * flops / 2e12)


def products(total: Any, left: tuple[int, ...], right: tuple[int, ...], **_: Any) -> int:
    """FLOPs of a batched product; torch has no formula for the in-place operation."""
    return 2 * math.prod(left) * right[-1]


@pytest.mark.parametrize("loop", LOOPS)
def test_flops_equal_those_counted_by_torch(loop: Loop) -> None:
    loop = loop._replace(num_layers=2)
    model = build(loop.shape, "meta")
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.baddbmm_: products}) as counter:
        model.head(model.backbone(model.embed(torch.zeros(1, 2048, dtype=torch.long, device="meta"))))
    assert counter.get_total_flops() / 2048 == pytest.approx(token_operations(model, loop.shape), rel=0.05)


def test_the_sizes_match_their_names() -> None:
    for loop in LOOPS:
        model = build(loop.shape, "meta")
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(float(loop.name[:-1]) * 1e6, rel=0.02)
    assert PEAKS["NVIDIA A100-SXM4-80GB"] == 312
