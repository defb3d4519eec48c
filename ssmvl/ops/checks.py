"""Argument checks shared by all ops over sequences; each failure raises a one-line ShapeError."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ssmvl.errors import ShapeError

__all__ = ["check_rows"]


def check_axes(
    op: str, tensors: Mapping[str, tuple[Tensor | None, str]], sizes: Mapping[str, int] | None = None
) -> dict[str, int]:
    """Check the shapes of named tensors against their axes, one letter each; None is skipped.

    Args:
        op: the op's name, for the message.
        tensors: name -> tensor and axes, such as "BLH"; the first tensor with a letter sets its size.
        sizes: letter -> size, for letters that are already known.

    Returns:
        The size of every letter.

    Raises:
        ShapeError: a shape does not fit; names the first such tensor, its shape and the allowed one.
    """
    known = dict(sizes or {})
    for name, (tensor, axes) in tensors.items():
        if tensor is None:
            continue
        shape = tuple(tensor.shape)
        if len(shape) == len(axes):
            known = {**dict(zip(axes, shape, strict=True)), **known}
        if shape != tuple(known.get(a) for a in axes):
            allowed = ", ".join(str(known.get(a, a)) for a in axes) + ("," if len(axes) == 1 else "")
            raise ShapeError(f"{op}: {name} must have shape ({allowed}), received {shape}")
    return known


def check_rows(
    op: str, rows: int, length: int, lengths: Tensor | None, segments: Tensor | None, device: torch.device
) -> None:
    """Check a batch of rows, and its lengths or segments.

    Values are checked only where this needs no synchronization: not on a GPU and not while compiling.

    Raises:
        ShapeError: there are no rows; lengths are not (B,) in 0…L; segments are not (B, L), start with neither 0 nor
            -1, decrease, skip a number, or continue after the padding (-1); either is not an int32 or int64 tensor on
            `device`; or both are given.
    """
    if rows == 0:
        raise ShapeError(f"{op}: the batch has no rows; pass at least one (its length may be 0)")
    if lengths is not None and segments is not None:
        raise ShapeError(f"{op}: lengths and segments are mutually exclusive; mark padding in segments with -1")
    for name, value in (("lengths", lengths), ("segments", segments)):
        if value is None:
            continue
        kind = f"{value.dtype} on {value.device}" if isinstance(value, Tensor) else type(value).__name__
        if kind not in (f"torch.int32 on {device}", f"torch.int64 on {device}"):
            raise ShapeError(f"{op}: {name} must be a tensor of int32 or int64 on {device}, received {kind}")
    check_axes(op, {"lengths": (lengths, "B"), "segments": (segments, "BL")}, {"B": rows, "L": length})
    values = lengths if lengths is not None else segments
    if values is None or values.device.type != "cpu" or values.numel() == 0 or torch.compiler.is_compiling():
        return
    if lengths is not None:
        wrong = ((lengths < 0) | (lengths > length)).nonzero()
        if len(wrong):
            row = int(wrong[0])
            raise ShapeError(f"{op}: lengths[{row}] must be in 0…{length}, received {int(lengths[row])}")
        return
    assert segments is not None
    first, before, after = segments[:, 0], segments[:, :-1], segments[:, 1:]
    wrong = ((first != 0) & (first != -1)).nonzero()
    if len(wrong):
        row = int(wrong[0])
        number = int(first[row])
        raise ShapeError(f"{op}: segments[{row}, 0] is {number}; number segments 0, 1, 2, …, then -1 for padding")
    step = after - before
    wrong = torch.where(after == -1, False, (step < 0) | (step > 1) | (before == -1)).nonzero()
    if len(wrong):
        row, at = wrong[0].tolist()
        pair = f"{int(before[row, at])} is followed by {int(after[row, at])}"
        raise ShapeError(f"{op}: segments[{row}, {at + 1}]: {pair}; number segments 0, 1, 2, …, then -1 for padding")


def check_floats(op: str, x: Tensor) -> None:
    """Check that the input has a floating-point dtype.

    Raises:
        ShapeError: it has another dtype.
    """
    if not x.is_floating_point():
        raise ShapeError(f"{op}: x must have a floating-point dtype, received {x.dtype}")


def check_groups(op: str, heads: int, groups: int) -> None:
    """Check that the number of groups divides the number of heads, or of channels.

    Raises:
        ShapeError: it does not.
    """
    if groups == 0 or heads % groups:
        raise ShapeError(
            f"{op}: {heads} heads cannot share {groups} groups; num_groups must divide the number of heads"
        )
