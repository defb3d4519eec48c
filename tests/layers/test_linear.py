"""Wrapped layers are called, not bypassed: LoRA, parametrizations, hooks, quantization; wrapped taps are rejected."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import peft
import pytest
import torch
from ssmvl_mamba_vlm.connectors import MambaProjector
from ssmvl_vl_mamba.connectors import vss_l2
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from ssmvl.connectors.projectors import MlpConnector
from ssmvl.errors import ContractError
from ssmvl.interfaces import Grid, Paths
from ssmvl.language.mamba_lm import Mamba1LM, MambaLM
from ssmvl.layers.mamba1 import Mamba1Mixer
from ssmvl.layers.mamba2 import Mamba2Mixer
from ssmvl.vision.fusion import SequenceFusion

GRID = Grid(1, 2, 3)
SEQUENCE = SequenceFusion({"a": 16, "b": 24}, {"a": GRID, "b": GRID})
IDS = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(0))


def run_lm(lm: Any) -> Tensor:
    return lm.head(lm.backbone(lm.embed(IDS)))


def run_connector(connector: Any) -> Tensor:
    return connector(torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0)), GRID)


def run_fusion(fusion: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return fusion({name: torch.randn(2, 6, width, generator=generator) for name, width in (("a", 16), ("b", 24))})


Case = tuple[Callable[[], nn.Module], Callable[[Any], Tensor]]
CASES: dict[str, Case] = {
    "mamba2": (lambda: MambaLM(width=64, num_layers=2, num_tokens=50), run_lm),
    "mamba1": (lambda: Mamba1LM(width=64, num_layers=2, num_tokens=50), run_lm),
    "mamba2 untied": (lambda: MambaLM(width=64, num_layers=1, num_tokens=50, tied=False), run_lm),
    "mamba1 untied": (lambda: Mamba1LM(width=64, num_layers=1, num_tokens=50, tied=False), run_lm),
    "mlp": (lambda: MlpConnector(32, 24, GRID), run_connector),
    "vss": (lambda: vss_l2(32, 24, GRID), run_connector),
    "projector of own paths": (lambda: MambaProjector(32, 24, Grid(1, 2, 3), scan_order=two_ways), run_connector),
    "fusion": (lambda: copy.deepcopy(SEQUENCE), run_fusion),
}


def two_ways(grid: Grid) -> Tensor:
    order = torch.arange(grid.length)
    return torch.stack([order, order.flip(0)])


def linears(module: nn.Module) -> list[str]:
    return [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]


@pytest.mark.parametrize("case", CASES)
def test_lora_on_every_linear_trains_acts_and_merges(case: str) -> None:
    torch.manual_seed(0)
    make, run = CASES[case]
    module = make()
    plain = run(module).detach()
    names = linears(module) + (["embedding"] if "tied" not in case and "mamba" in case else [])
    adapted = peft.get_peft_model(cast(Any, module), peft.LoraConfig(r=4, target_modules=names))
    base = adapted.base_model.model
    assert torch.allclose(run(base), plain, atol=1e-6)  # B starts at zero
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    y = run(base)
    assert (y - plain).abs().max() > 0.01
    y.square().mean().backward()
    untrained = [n for n, p in adapted.named_parameters() if "lora_" in n and (p.grad is None or not p.grad.any())]
    assert untrained == []
    with torch.no_grad():
        merged = run(adapted.merge_and_unload())
    assert torch.allclose(merged, y, atol=2e-5, rtol=1e-5)


class EightBits(nn.Module):
    """A Linear with an int8 weight, as quantization libraries insert it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.scale = float(linear.weight.detach().abs().max()) / 127
        self.weight = nn.Parameter((linear.weight / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = linear.bias
        self.in_features = linear.in_features

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


def replaced(module: nn.Module, change: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    for name in linears(module):
        parent, _, last = name.rpartition(".")
        setattr(module.get_submodule(parent), last, change(cast(nn.Linear, module.get_submodule(name))))
    return module


def rounded(linear: nn.Linear) -> nn.Linear:
    """A plain layer with the weights that `EightBits` computes with."""
    quantized = EightBits(linear)
    with torch.no_grad():
        linear.weight.copy_(quantized.weight * quantized.scale)
    return linear


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_quantized_linears_compute_with_their_own_weights(case: str) -> None:
    torch.manual_seed(0)
    make, run = CASES[case]
    module = make()
    expected = run(replaced(copy.deepcopy(module), rounded))
    assert torch.allclose(run(replaced(copy.deepcopy(module), EightBits)), expected, atol=1e-5, rtol=1e-5)
    dynamic = torch.ao.quantization.quantize_dynamic(module, {nn.Linear}, dtype=torch.qint8)
    assert (run(dynamic) - expected).norm() < 0.2 * expected.norm()


@torch.no_grad()
@pytest.mark.parametrize("kind", [MambaLM, Mamba1LM])
def test_decoding_of_a_quantized_language_model_equals_its_forward(kind: type[MambaLM]) -> None:
    torch.manual_seed(0)
    lm = replaced(kind(width=64, num_layers=2, num_tokens=50, tied=False).to(torch.bfloat16), EightBits).float()
    whole = run_lm(lm)
    state = lm.new_state(2)
    hidden = lm.prefill(lm.embed(IDS[:, :5]), torch.tensor([5, 5]), state)
    assert torch.allclose(lm.head(hidden), whole[:, :5], atol=1e-4)
    for t in range(5, 9):
        assert torch.allclose(lm.head(lm.step(lm.embed(IDS[:, t]), state)), whole[:, t], atol=1e-4)


@pytest.mark.parametrize("mixer", [Mamba1Mixer, Mamba2Mixer])
@pytest.mark.parametrize("paths", [1, 2])
def test_parametrizations_and_hooks_of_linears_act(mixer: type[nn.Module], paths: int) -> None:
    torch.manual_seed(0)
    x, table = torch.randn(2, 6, 32), Paths.of(two_ways(GRID)) if paths == 2 else None
    plain: Any = mixer(32, paths)
    expected = plain(x, table)
    parametrized, merged = copy.deepcopy(plain), copy.deepcopy(plain)
    for name in linears(plain):
        layer = parametrized.get_submodule(name)
        parametrizations.weight_norm(layer)
        layer.parametrizations.weight.original0.data.mul_(1.5)
        merged.get_submodule(name).weight.data.copy_(layer.weight)
    assert torch.allclose(parametrized(x, table), merged(x, table), atol=1e-5)
    assert not torch.allclose(parametrized(x, table), expected, atol=1e-3)
    for name in linears(plain):
        hooked = copy.deepcopy(plain)
        hooked.get_submodule(name).register_forward_hook(lambda *call: 2 * call[-1])
        assert not torch.allclose(hooked(x, table), expected, atol=1e-4), name


@pytest.mark.parametrize("paths", [1, 2])
def test_a_replaced_forward_a_bias_and_backward_hooks_act_on_x_proj_and_dt_proj(paths: int) -> None:
    torch.manual_seed(0)
    x, table = torch.randn(2, 6, 32), Paths.of(two_ways(GRID)) if paths == 2 else None
    plain: Any = Mamba1Mixer(32, paths)
    expected = plain(x, table)
    for name in ("x_proj", "dt_proj"):
        changed: Any = copy.deepcopy(plain)
        layer, calls = getattr(changed, name), list[int]()
        forward = layer.forward
        layer.forward = lambda x, forward=forward: 2 * forward(x)
        assert not torch.allclose(changed(x, table), expected, atol=1e-4)
        hooked: Any = copy.deepcopy(plain)
        getattr(hooked, name).register_full_backward_hook(lambda *_, calls=calls: calls.append(1))
        hooked(x, table).sum().backward()
        assert calls == [1]
    plain.x_proj.bias = nn.Parameter(torch.ones(plain.x_proj.out_features))
    assert not torch.allclose(plain(x, table), expected, atol=1e-4)


@pytest.mark.parametrize("mixer", [Mamba1Mixer, Mamba2Mixer])
def test_wrappers_of_the_convolution_are_rejected_because_they_would_be_bypassed(mixer: type[nn.Module]) -> None:
    x = torch.randn(2, 6, 32)
    wrapped, hooked, allowed = (mixer(32) for _ in range(3))
    wrapped.conv1d = nn.Sequential(cast(nn.Module, wrapped.conv1d))
    with pytest.raises(ContractError, match="conv1d is a Sequential, which would be bypassed"):
        wrapped(x)
    torch.nn.utils.spectral_norm(cast(nn.Module, hooked.conv1d))
    with pytest.raises(ContractError, match="conv1d has forward pre-hooks or a replaced forward, which would be"):
        hooked(x)
    patched = mixer(32)
    cast(Any, patched.conv1d).forward = lambda x: x
    with pytest.raises(ContractError, match="a replaced forward"):
        patched(x)
    parametrizations.weight_norm(cast(nn.Module, allowed.conv1d))
    allowed(x).sum().backward()
    assert cast(Any, allowed.conv1d).parametrizations.weight.original0.grad is not None
