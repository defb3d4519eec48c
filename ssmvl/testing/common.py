"""Shared helpers of the checks: building components as the library does, and requirements with error messages."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ssmvl.errors import ContractError
from ssmvl.model.blueprint import checked

TOLERANCE = 1e-4  # relative to the largest expected value; fp32 sums in another order differ by about 1e-6


@contextmanager
def seeded() -> Iterator[None]:
    """Fix the random seed and restore the caller's random state afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        yield


def name_of(factory: Callable[..., Any]) -> str:
    """The name of a class or function, with or without bound options."""
    while isinstance(factory, functools.partial):
        factory = factory.func
    return str(getattr(factory, "__name__", factory))


def build(factory: Callable[..., Any], contract: type[Any], **injected: Any) -> Any:
    """Build the module as the library would, in fp32 and in evaluation mode.

    Raises:
        ContractError: the result is not a module, lacks an attribute of its contract, or cannot be built on `meta`.
    """
    name = name_of(factory)
    built = checked(factory(**injected), name, contract)
    try:
        with torch.device("meta"):
            shapes = factory(**injected)
    except Exception as error:  # third-party code may raise anything
        why = f"{type(error).__name__}: {error}"
        raise ContractError(f"{name} cannot be built on `meta`, where every model is built first ({why})") from error
    for tensor_name, tensor in (*shapes.named_parameters(), *shapes.named_buffers()):
        require(tensor.is_meta, f"{name}: {tensor_name} is on {tensor.device} after a build on `meta`")
    return built.float().eval()


@torch.no_grad()
def perturbed(module: Any) -> Any:
    """Perturb every parameter of a module, as training does: zero-initialized ones would hide errors."""
    for parameter in module.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return module


def require(holds: object, message: str) -> None:
    """Raise a `ContractError` with this message unless `holds` is true."""
    if not holds:
        raise ContractError(message)


def require_tensor(what: str, received: object, *shape: int) -> None:
    """Require `received` to be a finite fp32 tensor of this shape."""
    got = f"{received.dtype} {tuple(received.shape)}" if isinstance(received, Tensor) else type(received).__name__
    require(got == f"torch.float32 {shape}", f"{what} must return torch.float32 {shape}, returned {got}")
    assert isinstance(received, Tensor)
    require(received.isfinite().all(), f"{what} returns values that are not finite")


def require_equal(what: str, received: Tensor, expected: Tensor) -> None:
    """Require equal shapes and, up to rounding, equal values."""
    shapes = tuple(received.shape), tuple(expected.shape)
    require(shapes[0] == shapes[1], f"{what}: received {shapes[0]}, expected {shapes[1]}")
    wrong = ~((received - expected).abs() <= TOLERANCE * expected.abs().max())
    if wrong.any():
        index = tuple(wrong.nonzero()[0].tolist())
        values = f"received {float(received[index]):.5g}, expected {float(expected[index]):.5g}"
        raise ContractError(f"{what}; first difference at {list(index)}: {values}")


def require_independent_rows(what: str, run: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Require each row of x to give the same result alone and among the others."""
    for row, together in enumerate(run(x)):
        message = f"{what} must process each row independently, but row {row} depends on the others"
        require_equal(message, together, run(x[[row]])[0])


def require_gradients(name: str, module: nn.Module, output: Tensor, inputs: Mapping[str, Tensor] | None = None) -> None:
    """Require a finite gradient of `output` for the inputs and for every parameter that is not frozen."""
    tensors = {**{n: p for n, p in module.named_parameters() if p.requires_grad}, **(inputs or {})}
    gradients = gradients_of(output * torch.randn_like(output), *tensors.values())
    for tensor_name, gradient in zip(tensors, gradients, strict=True):
        finite = gradient is not None and gradient.isfinite().all()
        require(finite, f"{name}: {tensor_name} receives no finite gradient; inputs and trained parameters must")


def gradients_of(output: Tensor, *tensors: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient of the sum of `output` for each tensor, or None if there is none."""
    if not (output.requires_grad and tensors):
        return (None,) * len(tensors)
    return torch.autograd.grad(output.sum(), tensors, allow_unused=True)


def require_units(name: str, module: Any) -> None:
    """Require that `shard_units` returns only modules contained in the module."""
    modules = set(module.modules())
    for unit in module.shard_units():
        require(unit in modules, f"{name}.shard_units returns a {type(unit).__name__} that is not one of its modules")
