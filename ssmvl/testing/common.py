"""What the checks share: components built as the library builds them, and claims that say what breaks them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ssmvl.errors import ContractError
from ssmvl.model.blueprint import checked

TOLERANCE = 1e-4  # share of the largest value expected; sums of fp32 in another order differ by some 1e-6


@contextmanager
def seeded() -> Iterator[None]:
    """The same random numbers each time; the caller's own are left as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        yield


def name_of(factory: Callable[..., Any]) -> str:
    """The name of a class or function, options bound or not."""
    while isinstance(factory, functools.partial):
        factory = factory.func
    return str(getattr(factory, "__name__", factory))


def build(factory: Callable[..., Any], contract: type[Any], **injected: Any) -> Any:
    """The module that the library would build, in fp32 and in evaluation mode.

    Raises:
        ContractError: it is no module, lacks something of its contract, or cannot be built on `meta`.
    """
    name = name_of(factory)
    built = checked(factory(**injected), name, contract)
    try:
        with torch.device("meta"):
            shapes = factory(**injected)
    except Exception as error:  # foreign code may raise anything
        why = f"{type(error).__name__}: {error}"
        raise ContractError(f"{name} cannot be built on `meta`, where every model is built first ({why})") from error
    for tensor_name, tensor in (*shapes.named_parameters(), *shapes.named_buffers()):
        require(tensor.is_meta, f"{name}: {tensor_name} lies on {tensor.device} after a build on `meta`")
    return built.float().eval()


@torch.no_grad()
def moved(module: Any) -> Any:
    """The module with every parameter moved, as training moves them: initial zeros would hide faults."""
    for parameter in module.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return module


def require(holds: object, message: str) -> None:
    """Raise a `ContractError` of this message unless it holds."""
    if not holds:
        raise ContractError(message)


def require_tensor(what: str, received: object, *shape: int) -> None:
    """`received` is a finite fp32 tensor of this shape."""
    got = f"{received.dtype} {tuple(received.shape)}" if isinstance(received, Tensor) else type(received).__name__
    require(got == f"torch.float32 {shape}", f"{what} must give torch.float32 {shape}, gave {got}")
    assert isinstance(received, Tensor)
    require(received.isfinite().all(), f"{what} gives values that are not finite")


def require_equal(what: str, received: Tensor, expected: Tensor) -> None:
    """Both have one shape and, up to rounding, the same values."""
    shapes = tuple(received.shape), tuple(expected.shape)
    require(shapes[0] == shapes[1], f"{what}: received {shapes[0]}, expected {shapes[1]}")
    wrong = ~((received - expected).abs() <= TOLERANCE * expected.abs().max())
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        found = f"received {float(received[at]):.5g}, expected {float(expected[at]):.5g}"
        raise ContractError(f"{what}; first at {list(at)}: {found}")


def require_apart(what: str, run: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Each row of x gives alone what it gives among the others."""
    for row, together in enumerate(run(x)):
        require_equal(f"{what} must treat each row alone, row {row} depends on the others", together, run(x[[row]])[0])


def require_gradients(name: str, module: nn.Module, output: Tensor, inputs: Mapping[str, Tensor] | None = None) -> None:
    """A finite gradient goes from `output` to the inputs and to every parameter that is not frozen."""
    wanted = {**{n: p for n, p in module.named_parameters() if p.requires_grad}, **(inputs or {})}
    gradients = gradients_of(output * torch.randn_like(output), *wanted.values())
    for tensor_name, gradient in zip(wanted, gradients, strict=True):
        reached = gradient is not None and gradient.isfinite().all()
        require(reached, f"{name}: {tensor_name} receives no finite gradient; what is trained must")


def gradients_of(output: Tensor, *tensors: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient of the sum of `output` for each tensor; None where there is none."""
    if not (output.requires_grad and tensors):
        return (None,) * len(tensors)
    return torch.autograd.grad(output.sum(), tensors, allow_unused=True)


def require_units(name: str, module: Any) -> None:
    """What `shard_units` names lies in the module."""
    inside = set(module.modules())
    for unit in module.shard_units():
        require(unit in inside, f"{name}.shard_units names a {type(unit).__name__} that is no module of it")
