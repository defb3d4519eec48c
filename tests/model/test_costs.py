"""Costs of parts, compared with parameter counts, products counted by hand, and a real forward on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from ssmvl_ml_mamba.connectors import msc_advanced
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import ssmvl
from ssmvl.connectors.projectors import MlpConnector
from ssmvl.errors import ContractError
from ssmvl.interfaces import Grid, ImageSpec
from ssmvl.language.mamba_lm import Mamba1LM, MambaLM
from ssmvl.layers.mamba1 import Mamba1Mixer
from ssmvl.layers.mamba2 import Mamba2Mixer
from ssmvl.model.costs import PartCost, describe, run_on_meta
from ssmvl.model.vlm import VisionLanguageModel
from ssmvl.vision.digit_vit import digit_vit
from ssmvl.vision.fusion import ChannelFusion

M = 9  # visual tokens of the digit ViTs
LANGUAGE: dict[str, Callable[[], MambaLM]] = {
    "mamba2": partial(
        MambaLM, width=32, num_layers=2, num_tokens=50, mixer=partial(Mamba2Mixer, d_state=8, head_dim=16, num_groups=2)
    ),
    "mamba1": partial(Mamba1LM, width=32, num_layers=2, num_tokens=50, mixer=partial(Mamba1Mixer, d_state=4)),
}


class Features(nn.Module):
    """An encoder without parameters."""

    def __init__(self, width: int, grid: Grid) -> None:
        super().__init__()
        self.width, self.grid, self.image_spec = width, grid, ImageSpec(14)

    def forward(self, pixels: Tensor) -> Tensor:
        return torch.zeros(len(pixels), self.grid.length, self.width, device=pixels.device)


class OwnHead(MambaLM):
    """A language model whose head is not tied to the embedding."""

    def __init__(self) -> None:
        super().__init__(width=32, num_layers=1, num_tokens=50)
        self.last = nn.Linear(32, 64, bias=False)

    def head(self, hidden: Tensor) -> Tensor:
        return self.last(hidden)


def small(language: Callable[[], nn.Module], **encoders: nn.Module) -> VisionLanguageModel:
    """Build a model on meta: the given encoders or one digit ViT, channel fusion and a three-layer MLP."""
    with torch.device("meta"):
        encoders = encoders or {"coarse": digit_vit("coarse")}
        widths, grids = ({n: getattr(e, key) for n, e in encoders.items()} for key in ("width", "grid"))
        fusion = ChannelFusion(widths, grids)
        return VisionLanguageModel(encoders, fusion, MlpConnector(fusion.width, 32, fusion.grid), language())


def numel(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def by_name(model: VisionLanguageModel, text: int = 7) -> dict[str, PartCost]:
    return {cost.name: cost for cost in describe(model, text)}


def whole_forward(model: VisionLanguageModel, text: int, device: str) -> Tensor:
    """Return the logits of `text` supervised positions after one image."""
    total = model.tokens_per_image + text
    return model(
        ids=torch.zeros(1, total, dtype=torch.int64, device=device),
        image_positions=torch.arange(total - text, device=device),
        label_positions=torch.arange(total - text - 1, total - 1, device=device),
        images={s: torch.zeros(1, 3, s.size, s.size, dtype=torch.uint8, device=device) for s in model.image_specs},
    )


@pytest.fixture(scope="module")
def quickstart() -> VisionLanguageModel:
    return ssmvl.build_model("quickstart", device="meta")


def test_each_parameter_is_counted_once(quickstart: VisionLanguageModel) -> None:
    costs = by_name(quickstart)
    assert {name: cost.parameters for name, cost in costs.items()} == {
        "encoders.fine": numel(quickstart.encoders["fine"]),
        "encoders.coarse": numel(quickstart.encoders["coarse"]),
        "fusion": 0,
        "connector": numel(quickstart.connector),
        "language.embedding": 352 * 128,
        "language.layers": numel(quickstart.language.layers, quickstart.language.norm_f),
        "language.head": 0,
    }
    assert sum(cost.parameters for cost in costs.values()) == numel(quickstart)


@pytest.mark.parametrize("text", [1, 64])
def test_shapes_are_those_of_a_real_forward(quickstart: VisionLanguageModel, text: int) -> None:
    model, shapes = ssmvl.build_model("quickstart"), {}
    watched = {f"encoders.{name}": encoder for name, encoder in model.encoders.items()}
    watched |= {"fusion": model.fusion, "connector": model.connector}
    watched |= {"language.embedding": model.language.embedding, "language.layers": model.language.norm_f}
    for name, module in watched.items():
        module.register_forward_hook(lambda *call, name=name: shapes.update({name: tuple(call[-1].shape)}))
    shapes["language.head"] = tuple(whole_forward(model, text, "cpu").shape)
    costs = by_name(quickstart, text)
    assert {name: cost.shape for name, cost in costs.items()} == shapes
    assert {len(cost.shape) - cost.letters.count(",") for cost in costs.values()} == {1}


@torch.no_grad()
def test_parts_sum_to_the_whole_forward(quickstart: VisionLanguageModel) -> None:
    in_place = torch.ops.aten.baddbmm_
    with FlopCounterMode(display=False, custom_mapping={in_place: baddbmm_flops}) as counter:
        whole_forward(quickstart, 300, "meta")
    assert counter.get_flop_counts()["Global"][in_place] > 0
    assert sum(cost.flops for cost in describe(quickstart, 300)) == counter.get_total_flops()


def baddbmm_flops(_: torch.Size, a: torch.Size, b: torch.Size, **__: object) -> int:
    return 2 * a[0] * a[1] * a[2] * b[2]


def test_flops_of_a_vit_by_hand() -> None:
    convolutions = 24 * 24 * 24 * 3 * 9 + 12 * 12 * 32 * 24 * 9 + M * 128 * 32 * 16
    block = M * 128 * 3 * 128 + 2 * M * M * 128 + M * 128 * 128 + 2 * M * 128 * 256
    assert by_name(small(LANGUAGE["mamba2"]))["encoders.coarse"].flops == 2 * (convolutions + 2 * block)  # of 3 blocks


def test_flops_of_the_mlp_connector_by_hand() -> None:
    costs = by_name(small(LANGUAGE["mamba2"]))
    assert costs["connector"].flops == 2 * M * (128 * 512 + 512 * 32 + 32 * 32)
    assert costs["fusion"].flops == 0


@pytest.mark.parametrize("text", [1, 7, 300])
def test_flops_of_embedding_and_head_by_hand(text: int) -> None:
    costs = by_name(small(LANGUAGE["mamba2"]), text)
    assert costs["language.embedding"].flops == 0
    assert costs["language.head"].flops == 2 * text * 32 * 64


@pytest.mark.parametrize("text", [7, 128 - M, 300])
def test_flops_of_mamba2_layers_by_hand(text: int) -> None:
    T, D, E, G, S, H = M + text, 32, 64, 2, 8, 4
    projections = T * D * (2 * E + 2 * G * S + H) + T * E * D
    chunks = [min(128, T - start) for start in range(0, T, 128)]
    within = sum(q * q * (G * S + E) for q in chunks)
    from_states, into_states = (T - chunks[0]) * E * S, T * E * S
    expected = 2 * 2 * (projections + within + from_states + into_states)  # two layers
    assert by_name(small(LANGUAGE["mamba2"]), text)["language.layers"].flops == expected


@pytest.mark.parametrize("text", [7, 300])
def test_flops_of_mamba1_layers_by_hand(text: int) -> None:
    T, D, E, S, R = M + text, 32, 64, 4, 2
    per_position = D * 2 * E + E * (R + 2 * S) + R * E + E * S + E * D  # the second E * S reads the state
    assert by_name(small(LANGUAGE["mamba1"]), text)["language.layers"].flops == 2 * 2 * T * per_position


@pytest.mark.parametrize("language", LANGUAGE)
def test_the_tied_head_is_counted_with_the_embedding(language: str) -> None:
    model = small(LANGUAGE[language])
    costs, rows = by_name(model), model.language.vocab_rows
    assert costs["language.embedding"].parameters == costs["language.head"].tied == rows * 32
    assert costs["language.head"].parameters == 0
    assert [name for name, cost in costs.items() if cost.tied] == ["language.head"]


def test_an_untied_head_is_counted_as_head() -> None:
    costs = by_name(small(OwnHead))
    assert [(cost.parameters, cost.tied) for cost in costs.values()][-3::2] == [(64 * 32, 0), (64 * 32, 0)]


def test_a_part_used_twice_is_counted_once() -> None:
    with torch.device("meta"):
        encoder = digit_vit("coarse")
    model = small(LANGUAGE["mamba2"], one=encoder, two=encoder)
    costs = by_name(model)
    assert (costs["encoders.one"].tied, costs["encoders.one"].parameters) == (0, numel(encoder))
    assert (costs["encoders.two"].tied, costs["encoders.two"].parameters) == (numel(encoder), 0)
    assert sum(cost.parameters for cost in costs.values()) == numel(model)


def test_unused_parameters_are_reported() -> None:
    model = small(LANGUAGE["mamba2"])
    vit = model.encoders["coarse"].vit
    costs = by_name(model)
    assert costs["encoders.coarse"].unused == numel(vit.blocks[-1], vit.norm, vit.head)
    assert [name for name, cost in costs.items() if cost.unused] == ["encoders.coarse"]


def test_ml_mamba_at_its_published_size() -> None:
    grid = Grid(1, 27, 27)
    with torch.device("meta"):
        encoders, fusion = {"both": Features(2176, grid)}, ChannelFusion({"both": 2176}, {"both": grid})
        language = MambaLM(width=2560, num_layers=64, num_tokens=50277)
        model = VisionLanguageModel(encoders, fusion, msc_advanced(2176, 2560, grid), language)
    costs = by_name(model, 64)
    assert costs["connector"].parameters == 184_405_440
    assert sum(cost.parameters for name, cost in costs.items() if name.startswith("language.")) == 2_702_599_680
    assert costs["language.layers"].shape == (1, 729 + 64, 2560)
    assert not any(cost.unused for cost in costs.values())


def test_a_model_that_is_not_on_meta_is_rejected() -> None:
    with pytest.raises(ContractError, match=r"computed on meta, but the model is on cpu; build it with device='meta'"):
        describe(ssmvl.build_model("quickstart"))


def test_a_part_that_reads_values_is_named() -> None:
    class Reader(Features):
        def forward(self, pixels: Tensor) -> Tensor:
            return super().forward(pixels) * pixels.max().item()

    with pytest.raises(ContractError, match=r"encoders\.reader cannot run on meta \(\w+: "):
        describe(small(LANGUAGE["mamba2"], reader=Reader(8, Grid(1, 2, 3))))


def test_a_part_may_disable_autocast() -> None:
    class InFullPrecision(Features):
        def forward(self, pixels: Tensor) -> Tensor:
            with torch.autocast(pixels.device.type, enabled=False), torch.autocast("cpu", dtype=torch.bfloat16):
                assert torch.is_autocast_enabled("cpu")
                return super().forward(pixels)

    costs = by_name(small(LANGUAGE["mamba2"], full=InFullPrecision(8, Grid(1, 2, 3))))
    assert costs["encoders.full"].shape == (1, 6, 8)
    assert isinstance(torch.autocast, type)


def test_nothing_runs_position_by_position_on_meta() -> None:
    """Otherwise published sizes would take minutes."""

    class Calls(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += 1
            return func(*args, **(kwargs or {}))

    with torch.device("meta"):
        model = LANGUAGE["mamba1"]()
    counts = []
    for length in (2000, 4000):
        with Calls() as calls:
            model.backbone(torch.empty(1, length, 32, device="meta"))
        counts.append(calls.count)
    assert counts[0] == counts[1]


def test_operations_skipped_on_meta_return_what_torch_returns() -> None:
    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return run_on_meta(func, args, kwargs or {})

    x, column, full, empty = (torch.ones(shape, device="meta") for shape in ((2, 3), (2, 1), (2, 3), (0,)))
    with Mode():
        assert x.mul_(column) is x
        assert torch.mul(column, x, out=full) is full
        assert torch.mul(column, x, out=torch.empty_like(empty)).shape == (2, 3)
        assert torch.ops.aten.silu_backward.grad_input(x, x, grad_input=torch.empty_like(empty)).shape == (2, 3)
        assert (column + x).shape == (2, 3)
        assert x.t_().shape == (3, 2)
        with pytest.raises(RuntimeError, match="broadcast"):
            x.add_(full)
    values = torch.ones(2)
    assert run_on_meta(torch.ops.aten.exp_.default, (values,), {}) is values
    assert values.tolist() == [1, 1]  # the operation did not run
