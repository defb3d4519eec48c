"""What every op over sequences asks of its arguments, and the one line it answers with when they do not fit."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ssmvl.errors import ShapeError

__all__ = ["check_rows"]


def check_axes(
    op: str, tensors: Mapping[str, tuple[Tensor | None, str]], sizes: Mapping[str, int] | None = None
) -> dict[str, int]:
    """Compare the shapes of named tensors, None left out, with their axes, one letter each.

    Args:
        op: for the message.
        tensors: name -> tensor and axes, as "BLH"; a letter means the size at which it is first met.
        sizes: letters that are known already.

    Returns:
        Every letter's size.

    Raises:
        ShapeError: the first that does not fit, with its name, its shape and the allowed one.
    """
    found = dict(sizes or {})
    for name, (tensor, axes) in tensors.items():
        if tensor is None:
            continue
        shape = tuple(tensor.shape)
        if len(shape) == len(axes):
            found = {**dict(zip(axes, shape, strict=True)), **found}
        if shape != tuple(found.get(a) for a in axes):
            allowed = ", ".join(str(found.get(a, a)) for a in axes) + ("," if len(axes) == 1 else "")
            raise ShapeError(f"{op}: {name} must have shape ({allowed}), received {shape}")
    return found


def check_rows(
    op: str, rows: int, length: int, lengths: Tensor | None, segments: Tensor | None, device: torch.device
) -> None:
    """Check a batch of rows, and its lengths or segments.

    Values are looked at only where that costs no synchronisation: not on a GPU, not while compiling.

    Raises:
        ShapeError: there are no rows; lengths are not (B,) in 0…L; segments are not (B, L), start above 0, decrease
            or skip a number before the padding (-1); either is no tensor of int32 or int64 on `device`; or both are
            given.
    """
    if rows == 0:
        raise ShapeError(f"{op}: a batch of no rows; give at least one (a row may have length 0)")
    if lengths is not None and segments is not None:
        raise ShapeError(f"{op}: lengths and segments exclude each other; mark padding in segments with -1")
    for name, given in (("lengths", lengths), ("segments", segments)):
        if given is None:
            continue
        kind = f"{given.dtype} on {given.device}" if isinstance(given, Tensor) else type(given).__name__
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
            raise ShapeError(f"{op}: lengths[{row}] is {int(lengths[row])}; rows have 0…{length} positions")
        return
    assert segments is not None
    first, before, after = segments[:, 0], segments[:, :-1], segments[:, 1:]
    wrong = ((first != 0) & (first != -1)).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise ShapeError(f"{op}: segments[{row}, 0] is {int(first[row])}; segments of a row count 0, 1, 2, …")
    step = after - before
    wrong = torch.where(after == -1, False, (step < 0) | (step > 1) | (before == -1)).nonzero()
    if len(wrong):
        row, place = wrong[0].tolist()
        pair = f"{int(before[row, place])} is followed by {int(after[row, place])}"
        raise ShapeError(f"{op}: segments[{row}, {place + 1}]: {pair}; segments count 0, 1, 2, …, then -1 for padding")


def check_floats(op: str, x: Tensor) -> None:
    """Check that the input is of a floating dtype.

    Raises:
        ShapeError: it is not.
    """
    if not x.is_floating_point():
        raise ShapeError(f"{op}: x must be of a floating dtype, received {x.dtype}")


def check_groups(op: str, heads: int, groups: int) -> None:
    """Check that heads, or channels, can share groups.

    Raises:
        ShapeError: they cannot.
    """
    if groups == 0 or heads % groups:
        raise ShapeError(
            f"{op}: {heads} heads cannot share {groups} groups; num_groups must divide the number of heads"
        )
