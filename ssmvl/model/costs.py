"""Parameters, FLOPs and shapes of each part of a model, computed on `meta`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Mapping, Set
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, cast
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ssmvl.errors import ContractError, SsmvlError
from ssmvl.interfaces import LanguageModel
from ssmvl.model.vlm import VisionLanguageModel
from ssmvl.ops.splice import splice

TEXT_POSITIONS = 64
STRETCH = 128  # difference of the two compared lengths, in positions: whole SSD chunks
AUTOCAST = torch.autocast
# Torch's formulas by operation. It has none for in-place products, which the SSD uses to add to its states.
FORMULAS: Mapping[Any, Callable[..., int]] = {
    **flop_registry,
    torch.ops.aten.baddbmm_: flop_registry[torch.ops.aten.baddbmm],
}


class PartCost(NamedTuple):
    """Costs of one part in a forward pass of one image and some text.

    Attributes:
        name: such as `encoders.siglip`, `fusion`, `connector`, `language.layers`.
        letters: axes of the output; see `ssmvl.interfaces`.
        shape: of the output.
        parameters: number of parameters that no earlier part has; all parts together have those of the model.
        tied: number of parameters shared with earlier parts.
        unused: number of those in `parameters` that no operation of this forward pass uses.
        flops: of matrix products, convolutions and attention; a multiply-add counts as 2.
    """

    name: str
    letters: str
    shape: tuple[int, ...]
    parameters: int
    tied: int
    unused: int
    flops: int


def describe(model: VisionLanguageModel, text_positions: int = TEXT_POSITIONS) -> list[PartCost]:
    """Compute the costs of each part in a forward pass of one image, followed by supervised text positions.

    Operations are counted as the torch backend runs them on a GPU. Element-wise operations are not counted: norms,
    gates, the causal convolution, the update of a Mamba-1 state.

    Args:
        model: built on `meta`.
        text_positions: n; T is M + n.

    Returns:
        Encoders, fusion, connector, and the embedding, layers and head of the language model, in this order. Embedding
        and head are the parameters that `embed` and `head` use; layers are all others.

    Raises:
        ContractError: the model is not on `meta`, or a part cannot run there.
    """
    steps = _walk(model, text_positions)
    ends = {name: steps[name].used for name in ("language.embedding", "language.head")}
    held = {f"encoders.{name}": {*encoder.parameters()} for name, encoder in model.encoders.items()}
    held |= {"fusion": {*model.fusion.parameters()}, "connector": {*model.connector.parameters()}}
    held |= {"language.layers": {*model.language.parameters()}.difference(*ends.values()), **ends}
    return _costs(steps, held)


class StepFlops:
    """FLOPs that a model needs for a training step, forward and backward: the numerator of MFU.

    Recomputation in backward, by activation checkpointing or in an op, does not count. The gradient of the weights
    costs as much as forward, and the gradient of the inputs as much again. A part whose parameters are all trained
    costs three times its forward; a frozen part costs twice its forward behind a trained part, and once otherwise.

    Args:
        model: built on `meta`.
        trained: names of the trained parameters.

    Raises:
        ContractError: the model is not on `meta`, or a part cannot run there.
    """

    def __init__(self, model: VisionLanguageModel, trained: Collection[str]) -> None:
        self._recurrent = cast(LanguageModel, model.language).recurrent
        self._image_places = model.tokens_per_image
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        self._totals = [(self._image_places // STRETCH + more) * STRETCH for more in (1, 2)]  # T of each walk
        self._walks = [_walk(model, total - self._image_places) for total in self._totals]
        self._count(trained)

    def with_trained(self, trained: Collection[str]) -> StepFlops:
        """Return the FLOPs of the same model with other trained parameters. Runs nothing again."""
        other = copy.copy(self)
        other._count(trained)
        return other

    def _count(self, trained: Collection[str]) -> None:
        parameters = {parameter for parameter, name in self._names.items() if name in trained}
        forward = self._walks[0]
        factors = _backward_factors(forward, parameters)
        costs = {name: step.flops * factors[name].products for name, step in forward.items()}
        self._image = sum(flops for name, flops in costs.items() if not name.startswith("language."))
        (first, second), (short, long) = self._totals, (walk["language.layers"].flops for walk in self._walks)
        self._label = costs["language.head"] / (first - self._image_places)
        if self._recurrent:
            pair, position = 0.0, (long - short) / STRETCH
        else:  # f = position * T + pair * T²
            pair = (long / second - short / first) / STRETCH
            position = short / first - pair * first
        layers = factors["language.layers"]
        self._position, self._pair = position * layers.products, pair * layers.attention

    def of(self, images: int, positions: int, labels: int) -> int:
        """Compute the FLOPs of one step. A multiply-add counts as 2.

        With attention, the positions are assumed to form I rows of equal length (at least one row), in which each
        position attends to the whole row, as is usual for MFU.

        Args:
            images: I.
            positions: number of positions that the language model reads, including image places, excluding padding.
            labels: number of supervised positions, the only ones with logits.
        """
        pairs = positions**2 / max(images, 1)
        return round(images * self._image + positions * self._position + pairs * self._pair + labels * self._label)


class _Factors(NamedTuple):
    """Cost of forward and backward of a part, relative to forward: products with weights, and attention."""

    products: float
    attention: int


def _backward_factors(steps: Mapping[str, _Step], trained: Set[nn.Parameter]) -> dict[str, _Factors]:
    factors, reached = {}, False
    for name, step in steps.items():
        own = step.used & trained
        behind = reached and not name.startswith("encoders.")  # encoders do not follow each other
        has_backward = bool(own) or behind
        share = _numel(own) / max(_numel(step.used), 1)
        factors[name] = _Factors(1 + has_backward + share, 1 + 2 * has_backward)  # attention multiplies two inputs
        reached = reached or bool(own)
    return factors


@torch.no_grad()
def _walk(model: VisionLanguageModel, text_positions: int) -> dict[str, _Step]:
    """Run one image and then `text_positions` supervised positions forward, part by part."""
    devices = {p.device.type for p in model.parameters()} - {"meta"}
    if devices:
        device = devices.pop()
        raise ContractError(f"costs are computed on meta, but the model is on {device}; build it with device='meta'")
    language = cast(LanguageModel, model.language)
    images = {s: torch.empty(1, 3, s.size, s.size, dtype=torch.uint8, device="meta") for s in model.image_specs}
    image_positions = torch.arange(model.tokens_per_image, device="meta")
    ids = torch.zeros(1, len(image_positions) + text_positions, dtype=torch.int64, device="meta")

    walk = _Walk()
    features = {
        name: walk(f"encoders.{name}", "(I, N, D)", encoder, images[encoder.image_spec])
        for name, encoder in model.encoders.items()
    }
    fused = walk("fusion", "(I, L, D)", model.fusion, features)
    visual = walk("connector", "(I, M, D)", model.connector, fused, model.grid)
    embeds = walk("language.embedding", "(B, T, D)", language.embed, ids)
    hidden = walk("language.layers", "(B, T, D)", language.backbone, splice(embeds, visual, image_positions))
    walk("language.head", "(n, V)", language.head, hidden[0, len(image_positions) - 1 : -1])  # t - 1 predicts t
    return walk.steps


class _Step(NamedTuple):
    letters: str
    shape: tuple[int, ...]
    flops: int
    used: set[nn.Parameter]


class _Walk:
    """Runs parts one by one, and records output shape, FLOPs and used parameters of each."""

    def __init__(self) -> None:
        self.steps: dict[str, _Step] = {}

    def __call__(self, name: str, letters: str, part: Callable[..., Tensor], *inputs: Any) -> Tensor:
        meter = _Meter()
        try:
            with meter, patch.object(torch, "autocast", autocast_on_meta):
                output = part(*inputs)
        except SsmvlError:
            raise
        except Exception as error:  # a third-party part may read values, which meta tensors lack
            raise ContractError(f"{name} cannot run on meta ({type(error).__name__}: {error})") from error
        self.steps[name] = _Step(letters, tuple(output.shape), meter.flops, meter.used)
        return output


def autocast_on_meta(device_type: str, *args: Any, **kwargs: Any) -> AbstractContextManager[object]:
    """Stand in for torch.autocast, which rejects `meta`; models of transformers, which disable it, would fail."""
    return nullcontext() if device_type == "meta" else AUTOCAST(device_type, *args, **kwargs)


def run_on_meta(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Run an operation that a mode receives, unless it only fills a tensor, which takes time and has no effect."""
    if torch.Tag.pointwise in func.tags and func._schema.is_mutable:
        filled = kwargs.get("out", args[0] if func._schema.name.endswith("_") else None)
        shapes = (value.shape for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        if filled is not None and all(_fits(shape, filled.shape) for shape in shapes):
            return filled
    return func(*args, **kwargs)


def _fits(shape: torch.Size, filled: torch.Size) -> bool:
    """Return True if `shape` broadcasts to `filled`; otherwise torch resizes the tensor or raises an error."""
    sizes = zip(reversed(shape), reversed(filled), strict=False)
    return len(shape) <= len(filled) and all(size in (1, target) for size, target in sizes)


class _Meter(TorchDispatchMode):
    """Sums up the FLOPs of operations and collects the parameters that they use."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self.used: set[nn.Parameter] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = run_on_meta(func, args, kwargs)
        if func.overloadpacket in FORMULAS:
            self.flops += FORMULAS[func.overloadpacket](*args, **kwargs, out_val=output)
        for value in (*args, *kwargs.values()):
            tensors = value if isinstance(value, list | tuple) else (value,)
            self.used.update(t for t in tensors if isinstance(t, nn.Parameter))
        return output


def _costs(steps: Mapping[str, _Step], held: Mapping[str, set[nn.Parameter]]) -> list[PartCost]:
    costs: list[PartCost] = []
    before: set[nn.Parameter] = set()
    used = {parameter for step in steps.values() for parameter in step.used}
    for name, step in steps.items():
        own = held[name] - before
        sizes = _numel(own), _numel(held[name] & before), _numel(own - used)
        costs.append(PartCost(name, step.letters, step.shape, *sizes, step.flops))
        before |= own
    return costs


def _numel(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)
