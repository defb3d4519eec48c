"""What each part of a model costs: parameters, operations, and the shapes along the way, found on `meta`."""

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
STRETCH = 128  # positions between two lengths that are compared: whole chunks of an SSD
AUTOCAST = torch.autocast
# torch's own formulas, by operation; it has none for products in place, as the SSD adds to its states.
FORMULAS: Mapping[Any, Callable[..., int]] = {
    **flop_registry,
    torch.ops.aten.baddbmm_: flop_registry[torch.ops.aten.baddbmm],
}


class PartCost(NamedTuple):
    """One part in a forward of one image and some text.

    Attributes:
        name: as in `encoders.siglip`, `fusion`, `connector`, `language.layers`.
        letters: of the axes of what it returns; see `ssmvl.interfaces`.
        shape: of what it returns.
        parameters: that no part before it has, so that all parts together have those of the model.
        tied: parameters that it shares with a part before it.
        unused: those of `parameters` that no operation of this forward took.
        flops: of its matrix products, convolutions and attention, where a multiply-add counts 2.
    """

    name: str
    letters: str
    shape: tuple[int, ...]
    parameters: int
    tied: int
    unused: int
    flops: int


def describe(model: VisionLanguageModel, text_positions: int = TEXT_POSITIONS) -> list[PartCost]:
    """Costs of each part in a forward of one image and then `text_positions` supervised text positions.

    Operations are counted as the torch backend runs them on a GPU. Element-wise work is not: norms, gates, the causal
    convolution, the update of a Mamba-1 state.

    Args:
        model: built on `meta`.
        text_positions: n; T is M + n.

    Returns:
        Encoders, fusion, connector, and the language model's embedding, layers and head, in this order. Its embedding
        and head are the parameters that `embed` and `head` take; its layers are all others.

    Raises:
        ContractError: the model is not on `meta`, or a part cannot run there.
    """
    steps = _walk(model, text_positions)
    taken = {name: step.taken for name, step in steps.items()}
    ends = {name: taken[name] for name in ("language.embedding", "language.head")}
    held = {f"encoders.{name}": {*encoder.parameters()} for name, encoder in model.encoders.items()}
    held |= {"fusion": {*model.fusion.parameters()}, "connector": {*model.connector.parameters()}}
    held |= {"language.layers": {*model.language.parameters()}.difference(*ends.values()), **ends}
    return _costs(steps, held)


class StepFlops:
    """FLOPs that the model itself needs for a step of training, forward and backward: the numerator of MFU.

    What is computed again in backward does not count, be it by activation checkpointing or in an op. A gradient of the
    weights costs as much as forward, that of the inputs as much again: a part whose parameters are all trained costs
    three times its forward; a frozen one twice behind a trained one, else once.

    Args:
        model: built on `meta`.
        trained: names of the trained parameters.

    Raises:
        ContractError: the model is not on `meta`, or a part cannot run there.
    """

    def __init__(self, model: VisionLanguageModel, trained: Collection[str]) -> None:
        self._recurrent = cast(LanguageModel, model.language).recurrent
        self._places = model.tokens_per_image
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        self._totals = [(self._places // STRETCH + more) * STRETCH for more in (1, 2)]  # T of each walk
        self._walks = [_walk(model, total - self._places) for total in self._totals]
        self._count(trained)

    def where(self, trained: Collection[str]) -> StepFlops:
        """Those of the same model with other trained parameters; nothing is run again."""
        other = copy.copy(self)
        other._count(trained)
        return other

    def _count(self, trained: Collection[str]) -> None:
        learning = {parameter for parameter, name in self._names.items() if name in trained}
        forward = self._walks[0]
        factors = _backward_factors(forward, learning)
        costs = {name: step.flops * factors[name].products for name, step in forward.items()}
        self._image = sum(flops for name, flops in costs.items() if not name.startswith("language."))
        (first, second), (short, long) = self._totals, (walk["language.layers"].flops for walk in self._walks)
        self._label = costs["language.head"] / (first - self._places)
        if self._recurrent:
            pair, position = 0.0, (long - short) / STRETCH
        else:  # f = position * T + pair * T²
            pair = (long / second - short / first) / STRETCH
            position = short / first - pair * first
        layers = factors["language.layers"]
        self._position, self._pair = position * layers.products, pair * layers.attention

    def of(self, images: int, positions: int, labels: int) -> int:
        """FLOPs of a step.

        Args:
            images: I.
            positions: read by the language model, image places included and padding left out.
            labels: supervised ones, which alone have logits.

        Returns:
            A multiply-add counts 2. With attention the positions are taken as I rows of equal length (at least one),
            of which each position attends to its whole row, as is usual in MFU.
        """
        pairs = positions**2 / max(images, 1)
        return round(images * self._image + positions * self._position + pairs * self._pair + labels * self._label)


class _Factors(NamedTuple):
    """What forward and backward of a part cost together, its forward being 1: products with weights, and attention."""

    products: float
    attention: int


def _backward_factors(steps: Mapping[str, _Step], learning: Set[nn.Parameter]) -> dict[str, _Factors]:
    factors, reached = {}, False
    for name, step in steps.items():
        learns = step.taken & learning
        behind = reached and not name.startswith("encoders.")  # which stand side by side
        passes = bool(learns) or behind
        share = _numel(learns) / max(_numel(step.taken), 1)
        factors[name] = _Factors(1 + passes + share, 1 + 2 * passes)  # attention multiplies two inputs
        reached = reached or bool(learns)
    return factors


@torch.no_grad()
def _walk(model: VisionLanguageModel, text_positions: int) -> dict[str, _Step]:
    """A forward of one image and then `text_positions` supervised ones, part by part."""
    elsewhere = {p.device.type for p in model.parameters()} - {"meta"}
    if elsewhere:
        raise ContractError(f"costs are found on meta, the model is on {elsewhere.pop()}; build it with device='meta'")
    language = cast(LanguageModel, model.language)
    images = {s: torch.empty(1, 3, s.size, s.size, dtype=torch.uint8, device="meta") for s in model.image_specs}
    places = torch.arange(model.tokens_per_image, device="meta")
    ids = torch.zeros(1, len(places) + text_positions, dtype=torch.int64, device="meta")

    walk = _Walk()
    features = {
        name: walk(f"encoders.{name}", "(I, N, D)", encoder, images[encoder.image_spec])
        for name, encoder in model.encoders.items()
    }
    fused = walk("fusion", "(I, L, D)", model.fusion, features)
    visual = walk("connector", "(I, M, D)", model.connector, fused, model.grid)
    embeds = walk("language.embedding", "(B, T, D)", language.embed, ids)
    hidden = walk("language.layers", "(B, T, D)", language.backbone, splice(embeds, visual, places))
    walk("language.head", "(n, V)", language.head, hidden[0, len(places) - 1 : -1])  # what t - 1 says of t
    return walk.steps


class _Step(NamedTuple):
    letters: str
    shape: tuple[int, ...]
    flops: int
    taken: set[nn.Parameter]


class _Walk:
    """Runs one part after the other and keeps what each gave and took."""

    def __init__(self) -> None:
        self.steps: dict[str, _Step] = {}

    def __call__(self, name: str, letters: str, part: Callable[..., Tensor], *inputs: Any) -> Tensor:
        meter = _Meter()
        try:
            with meter, patch.object(torch, "autocast", autocast_on_meta):
                output = part(*inputs)
        except SsmvlError:
            raise
        except Exception as error:  # a foreign part may read values, which are not there
            raise ContractError(f"{name} cannot run on meta ({type(error).__name__}: {error})") from error
        self.steps[name] = _Step(letters, tuple(output.shape), meter.flops, meter.taken)
        return output


def autocast_on_meta(device_type: str, *args: Any, **kwargs: Any) -> AbstractContextManager[object]:
    """torch.autocast, which torch lacks for `meta`: models that switch it off, as those of transformers, would fail."""
    return nullcontext() if device_type == "meta" else AUTOCAST(device_type, *args, **kwargs)


def run_on_meta(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """An operation as a mode is given it; one that only fills a tensor is left out: it takes time and does nothing."""
    if torch.Tag.pointwise in func.tags and func._schema.is_mutable:
        filled = kwargs.get("out", args[0] if func._schema.name.endswith("_") else None)
        given = (one.shape for one in (*args, *kwargs.values()) if isinstance(one, Tensor))
        if filled is not None and all(_fits(shape, filled.shape) for shape in given):
            return filled
    return func(*args, **kwargs)


def _fits(shape: torch.Size, filled: torch.Size) -> bool:
    """Whether one is broadcast to the other; where not, torch makes that larger, or says what is wrong."""
    sizes = zip(reversed(shape), reversed(filled), strict=False)
    return len(shape) <= len(filled) and all(mine in (1, its) for mine, its in sizes)


class _Meter(TorchDispatchMode):
    """Adds up FLOPs and collects the parameters that operations take."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self.taken: set[nn.Parameter] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = run_on_meta(func, args, kwargs)
        if func.overloadpacket in FORMULAS:
            self.flops += FORMULAS[func.overloadpacket](*args, **kwargs, out_val=output)
        for given in (*args, *kwargs.values()):
            tensors = given if isinstance(given, list | tuple) else (given,)
            self.taken.update(t for t in tensors if isinstance(t, nn.Parameter))
        return output


def _costs(steps: Mapping[str, _Step], held: Mapping[str, set[nn.Parameter]]) -> list[PartCost]:
    costs: list[PartCost] = []
    before: set[nn.Parameter] = set()
    used = {parameter for step in steps.values() for parameter in step.taken}
    for name, step in steps.items():
        own = held[name] - before
        sizes = _numel(own), _numel(held[name] & before), _numel(own - used)
        costs.append(PartCost(name, step.letters, step.shape, *sizes, step.flops))
        before |= own
    return costs


def _numel(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)
