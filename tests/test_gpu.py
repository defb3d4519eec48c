"""Tests that need a CUDA device. Run by scripts/gpu_check; Composer is not needed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

import ssmvl
from ssmvl.generation.assistant import Assistant
from ssmvl.language.mamba_lm import Mamba1LM, MambaLM
from ssmvl.model.build import build_processor
from ssmvl.ops.backends import report
from ssmvl.ops.selective_scan import selective_scan
from ssmvl.ops.ssd import ssd
from ssmvl.processing.batch import collate, pack

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_ssd_equals_the_cpu_forward_and_backward() -> None:
    shapes = {"x": (2, 200, 8, 16), "dt": (2, 200, 8), "B": (2, 200, 2, 32), "C": (2, 200, 2, 32)}
    values = {name: torch.rand(shape) - (0.5 if name != "dt" else 0) for name, shape in shapes.items()}
    by_device = []
    for device in ("cpu", "cuda"):
        moved = {name: v.to(device).requires_grad_() for name, v in values.items()}
        y, state = ssd(**moved, A=-torch.ones(8, device=device))
        (y.sum() + state.sum()).backward()
        by_device.append([t.detach().cpu() for t in (y, state, *(v.grad for v in moved.values()))])
    for ours, theirs in zip(*by_device, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


def test_selective_scan_equals_the_cpu_forward_and_backward() -> None:
    shapes = {"x": (2, 200, 64), "dt": (2, 200, 64), "B": (2, 200, 2, 16), "C": (2, 200, 2, 16)}
    values = {name: torch.rand(shape) - (0.5 if name != "dt" else 0) for name, shape in shapes.items()}
    by_device = []
    for device in ("cpu", "cuda"):
        moved = {name: v.to(device).requires_grad_() for name, v in values.items()}
        y, _ = selective_scan(**moved, A=-torch.ones(64, 16, device=device))
        y.sum().backward()
        by_device.append([t.detach().cpu() for t in (y, *(v.grad for v in moved.values()))])
    for ours, theirs in zip(*by_device, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("build", [MambaLM, Mamba1LM])
def test_a_language_model_decodes_as_on_the_cpu(build: type[MambaLM]) -> None:
    lm, lengths = build(width=64, num_layers=2, num_tokens=50), torch.tensor([40, 7])
    ids, by_device = torch.randint(50, (2, 41)), []
    for device in ("cpu", "cuda"):
        lm.to(device)
        state = lm.new_state(2)
        hidden = lm.prefill(lm.embed(ids[:, :40].to(device)), lengths.to(device), state)
        by_device.append([hidden[0].cpu(), lm.step(lm.embed(ids[:, 40].to(device)), state).cpu()])
    for ours, theirs in zip(*by_device, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("build", [MambaLM, Mamba1LM])
@pytest.mark.parametrize("backend", ["torch", "mamba_ssm"])
def test_bf16_autocast_trains_prefills_and_decodes_like_fp32(
    build: type[MambaLM], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reasons = [reason for reason in report("cuda")[backend].values() if reason]
    if reasons:
        pytest.skip(reasons[0])
    lm = build(width=256, num_layers=4, num_tokens=500).cuda()
    ids, lengths = torch.randint(500, (4, 300), device="cuda"), torch.tensor([299, 299, 299, 299], device="cuda")
    losses, gradients, logits = [], [], []
    for name, autocast in (("torch", False), (backend, True)):
        monkeypatch.setenv("SSMVL_BACKEND", name)
        lm.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            forward = lm.head(lm.backbone(lm.embed(ids)))
            loss = F.cross_entropy(forward[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
            loss.backward()
            with torch.no_grad():
                state = lm.new_state(4)
                lm.prefill(lm.embed(ids[:, :-1]), lengths, state)
                decoded = lm.head(lm.step(lm.embed(ids[:, -1]), state))
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in lm.parameters() if p.grad is not None]))
        logits += [forward[:, -1].float(), decoded.float()]
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
    assert F.cosine_similarity(*gradients, dim=0) > 0.99
    for other in logits[1:]:
        assert F.cosine_similarity(logits[0], other).min() > 0.99


def test_the_model_trains_in_bf16_autocast_and_answers() -> None:
    recipe = ssmvl.load_recipe("quickstart")
    model = ssmvl.build_model(recipe, weights="recipe")
    processor = build_processor(recipe, model)
    talk = [{"role": "user", "content": "Which row?"}, {"role": "assistant", "content": "2"}]
    image = torch.zeros(48, 48, 3, dtype=torch.uint8).numpy()
    from PIL import Image

    inputs = pack(collate([processor.encode(talk, [Image.fromarray(image)])] * 4))
    before = Assistant(copy.deepcopy(model), processor, recipe).generate(["Which row?"], max_new_tokens=4)
    model.cuda()
    assert Assistant(model, processor, recipe).generate(["Which row?"], max_new_tokens=4) == before
    moved = {k: v.cuda() if torch.is_tensor(v) else {s: p.cuda() for s, p in v.items()} for k, v in inputs.items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(20):
        with torch.autocast("cuda", torch.bfloat16):
            loss = F.cross_entropy(model(**moved).float(), moved["labels"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 4
    with torch.autocast("cuda", torch.bfloat16):
        assert Assistant(model, processor, recipe).generate(["Which row?"] * 2, max_new_tokens=4)[0]
