"""Arguments that do not fit raise a ShapeError with one line that names the numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import SEQUENCES, Values, inputs
from torch import Tensor

from ssmvl.errors import ShapeError
from ssmvl.ops.causal_conv import causal_conv, causal_conv_step
from ssmvl.ops.selective_scan import selective_scan, selective_scan_step
from ssmvl.ops.ssd import ssd, ssd_step

ROWS, LENGTH = 2, 6


def convolution() -> Values:
    """Arguments of `causal_conv`."""
    shapes = {"x": (ROWS, LENGTH, 3), "weight": (3, 4), "bias": (3,), "window": (ROWS, 3, 3)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


OPS: dict[str, Callable[..., Any]] = {"ssd": ssd, "selective_scan": selective_scan, "causal_conv": causal_conv}
STEPS: dict[str, Callable[..., Any]] = {"ssd": ssd_step, "selective_scan": selective_scan_step}
every_op = pytest.mark.parametrize("op", OPS)
both = pytest.mark.parametrize("op", STEPS)


def valid(op: str) -> Values:
    return convolution() if op == "causal_conv" else inputs(op, ROWS, LENGTH)


def without_a_state(op: str) -> Values:
    return {name: value for name, value in valid(op).items() if name not in ("state", "window")}


def one_position(op: str) -> Values:
    return {name: value[:, 0] if name in SEQUENCES else value for name, value in inputs(op, ROWS, LENGTH).items()}


def assert_rejected(run: Callable[..., Any], values: Values, *parts: str) -> None:
    with pytest.raises(ShapeError) as error:
        run(**values)
    message = str(error.value)
    assert "\n" not in message
    for part in (f"{run.__name__}: ", *parts):
        assert part in message


def test_valid_arguments_are_accepted() -> None:
    for op, run in OPS.items():
        assert all(result.isfinite().all() for result in run(**valid(op)))
    for op, step in STEPS.items():
        assert step(**one_position(op)).isfinite().all()


def longer(tensor: Tensor, axis: int) -> Tensor:
    return torch.cat([tensor, tensor.narrow(axis, 0, 1)], axis)


SHAPES = {
    "ssd": {
        "dt": (2, 6, 4),
        "A": (4,),
        "B": (2, 6, 2, 5),
        "C": (2, 6, 2, 5),
        "D": (4,),
        "dt_bias": (4,),
        "state": (2, 4, 3, 5),
    },
    "selective_scan": {
        "dt": (2, 6, 4),
        "A": (4, 5),
        "B": (2, 6, 2, 5),
        "C": (2, 6, 2, 5),
        "D": (4,),
        "dt_bias": (4,),
        "state": (2, 4, 5),
    },
    "causal_conv": {"weight": (3, 4), "bias": (3,), "window": (2, 3, 3)},
}
LEADS = {"B": (2, 3), "weight": (1,)}  # axes that set the sizes expected of other arguments


@pytest.mark.parametrize(
    ("op", "name", "axis"),
    [
        (op, name, axis)
        for op, shapes in SHAPES.items()
        for name, shape in shapes.items()
        for axis in range(len(shape))
        if axis not in LEADS.get(name, ())
    ],
)
def test_an_axis_that_is_too_long(op: str, name: str, axis: int) -> None:
    shape = SHAPES[op][name]
    wrong = longer(torch.rand(shape), axis)
    assert_rejected(
        OPS[op], valid(op) | {name: wrong}, f"{name} must have shape {shape}, received {tuple(wrong.shape)}"
    )


@pytest.mark.parametrize(
    ("op", "name"), [(op, name) for op, shapes in SHAPES.items() for name in shapes if name != "B"]
)
def test_a_missing_axis(op: str, name: str) -> None:
    shape = SHAPES[op][name]
    wrong = torch.rand(shape[1:])
    expected = "(3, W)" if name == "weight" else shape  # no other argument sets the number of taps
    assert_rejected(
        OPS[op], valid(op) | {name: wrong}, f"{name} must have shape {expected}, received {tuple(wrong.shape)}"
    )


@pytest.mark.parametrize(
    ("op", "name"), [("ssd", "x"), ("ssd", "B"), ("selective_scan", "x"), ("selective_scan", "B"), ("causal_conv", "x")]
)
def test_a_missing_axis_of_an_argument_that_sets_sizes(op: str, name: str) -> None:
    wrong = valid(op)[name][0]
    assert_rejected(OPS[op], valid(op) | {name: wrong}, f"{tuple(wrong.shape)}")


@both
@pytest.mark.parametrize(("heads", "groups"), [(3, 2), (2, 3), (4, 3), (4, 0)])
def test_heads_not_divisible_by_groups(op: str, heads: int, groups: int) -> None:
    message = f"{heads} heads cannot share {groups} groups; num_groups must divide the number of heads"
    values = inputs(op, ROWS, LENGTH, heads, groups)
    assert_rejected(OPS[op], values, message)
    now = {name: value[:, 0] if name in SEQUENCES else value for name, value in values.items()}
    assert_rejected(STEPS[op], now, message)


@every_op
@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([6, 7], "lengths[1] must be in 0…6, received 7"),
        ([-1, 9], "lengths[0] must be in 0…6, received -1"),
        ([3, 3, 3], "lengths must have shape (2,), received (3,)"),
        ([3], "lengths must have shape (2,), received (1,)"),
        ([[3, 3]], "lengths must have shape (2,), received (1, 2)"),
    ],
)
def test_lengths(op: str, lengths: list[int], message: str) -> None:
    assert_rejected(OPS[op], valid(op) | {"lengths": torch.tensor(lengths)}, message)


@every_op
@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([1, 1, 1, 1, 1, 1], "segments[1, 0] is 1"),
        ([-2, 0, 0, 0, 0, 0], "segments[1, 0] is -2"),
        ([0, 1, 0, 0, 0, 0], "segments[1, 2]: 1 is followed by 0"),
        ([0, 0, 2, 2, 2, 2], "segments[1, 2]: 0 is followed by 2"),
        ([0, 0, 0, 1, 1, 3], "segments[1, 5]: 1 is followed by 3"),
        ([0, 0, 0, 1, -2, -2], "segments[1, 4]: 1 is followed by -2"),
        ([0, 0, 0, -1, 0, 0], "segments[1, 4]: -1 is followed by 0"),
        ([0, 1, -1, -1, -1, 2], "segments[1, 5]: -1 is followed by 2"),
        ([-1, -1, 0, 0, 0, 0], "segments[1, 2]: -1 is followed by 0"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_segments(op: str, segments: list[int], message: str, dtype: torch.dtype) -> None:
    rows = torch.tensor([[0, 0, 1, 1, 2, -1], segments], dtype=dtype)
    assert_rejected(OPS[op], without_a_state(op) | {"segments": rows}, message)
    assert_rejected(
        OPS[op], without_a_state(op) | {"segments": rows}, "number segments 0, 1, 2, …, then -1 for padding"
    )


@every_op
@pytest.mark.parametrize("shape", [(2, 5), (2, 7), (1, 6), (6,), (2, 6, 1)])
def test_segments_of_the_wrong_shape(op: str, shape: tuple[int, ...]) -> None:
    segments = torch.zeros(shape, dtype=torch.int32)
    message = f"segments must have shape (2, 6), received {shape}"
    assert_rejected(OPS[op], without_a_state(op) | {"segments": segments}, message)


@every_op
def test_no_rows(op: str) -> None:
    by_row = (*SEQUENCES, "state", "window")
    values = {name: value[:0] if name in by_row else value for name, value in valid(op).items()}
    assert_rejected(OPS[op], values, "the batch has no rows; pass at least one (its length may be 0)")


@both
def test_a_step_of_no_rows(op: str) -> None:
    by_row = (*SEQUENCES, "state")
    values = {name: value[:0] if name in by_row else value for name, value in one_position(op).items()}
    assert_rejected(STEPS[op], values, "the batch has no rows")


def test_a_convolution_step_of_no_rows() -> None:
    values = convolution() | {"x": torch.zeros(0, 3), "window": torch.zeros(0, 3, 3)}
    assert_rejected(causal_conv_step, values, "the batch has no rows")


@every_op
def test_mutually_exclusive_arguments(op: str) -> None:
    segments = torch.zeros(ROWS, LENGTH, dtype=torch.int32)
    state = "window" if op == "causal_conv" else "state"
    assert_rejected(OPS[op], valid(op) | {"segments": segments}, f"{state} and segments are mutually exclusive")
    lengths = torch.tensor([1, 2])
    both_marks = without_a_state(op) | {"segments": segments, "lengths": lengths}
    assert_rejected(OPS[op], both_marks, "lengths and segments are mutually exclusive", "-1")


@pytest.mark.parametrize(
    ("op", "name", "axis"),
    [
        *((op, name, axis) for op in STEPS for name, axes in (("dt", 2), ("C", 3)) for axis in range(axes)),
        *(("ssd", "state", axis) for axis in range(4)),
        *(("selective_scan", "state", axis) for axis in range(3)),
    ],
)
def test_a_step_with_an_axis_that_is_too_long(op: str, name: str, axis: int) -> None:
    now = one_position(op)
    wrong = longer(now[name], axis)
    message = f"{name} must have shape {tuple(now[name].shape)}, received {tuple(wrong.shape)}"
    assert_rejected(STEPS[op], now | {name: wrong}, message)


@both
@pytest.mark.parametrize(("name", "wrong"), [("A", 1), ("A", 5), ("B", 3), ("D", 1), ("D", 5), ("dt_bias", 1)])
def test_a_step_with_weights_that_do_not_fit(op: str, name: str, wrong: int) -> None:
    now = one_position(op) | {"dt_bias": torch.rand(4)}
    state = now["state"].clone()
    tensor = now[name][[0] * wrong]
    assert_rejected(STEPS[op], now | {name: tensor}, f"{tuple(now[name].shape)}", f"{tuple(tensor.shape)}")
    assert torch.equal(now["state"], state)


@pytest.mark.parametrize("shape", [(2, 2, 3), (2, 4, 3), (1, 3, 3), (2, 3, 4), (3, 3)])
def test_a_convolution_step_with_a_wrong_window(shape: tuple[int, ...]) -> None:
    values = convolution() | {"x": torch.randn(2, 3), "window": torch.zeros(shape)}
    assert_rejected(causal_conv_step, values, f"window must have shape (2, 3, 3), received {shape}")


@pytest.mark.parametrize(("name", "shape"), [("weight", (1, 4)), ("bias", (1,))])
def test_a_convolution_step_with_weights_that_do_not_fit(name: str, shape: tuple[int, ...]) -> None:
    values = convolution() | {"x": torch.randn(2, 3), name: torch.randn(shape)}
    assert_rejected(causal_conv_step, values, f"{shape}")


@both
def test_a_chunk_of_0(op: str) -> None:
    assert_rejected(OPS[op], valid(op) | {"chunk": 0}, "chunk must be at least 1, received 0")


@both
@pytest.mark.parametrize("limit", [(2.0, 1.0), (-1.0, 1.0)])
def test_limits_that_are_not_an_interval(op: str, limit: tuple[float, float]) -> None:
    with pytest.raises(ShapeError, match="0 <= lowest <= highest, received") as caught:
        OPS[op](**valid(op) | {"dt_limit": limit})
    assert str(limit) in str(caught.value)


@pytest.mark.parametrize("op", list(OPS))
@pytest.mark.parametrize("lengths", [torch.tensor([1.0, 2.0]), torch.zeros(2, dtype=torch.long, device="meta")])
def test_lengths_of_the_wrong_dtype_or_device(op: str, lengths: torch.Tensor) -> None:
    message = f"lengths must be a tensor of int32 or int64 on cpu, received {lengths.dtype} on {lengths.device}"
    assert_rejected(OPS[op], valid(op) | {"lengths": lengths}, message)


@pytest.mark.parametrize("op", list(OPS))
def test_inputs_with_an_integer_dtype(op: str) -> None:
    assert_rejected(
        OPS[op], valid(op) | {"x": valid(op)["x"].int()}, "x must have a floating-point dtype, received torch.int32"
    )


@pytest.mark.parametrize("op", list(OPS))
def test_a_list_of_lengths(op: str) -> None:
    assert_rejected(
        OPS[op], valid(op) | {"lengths": [1, 2]}, "must be a tensor of int32 or int64 on cpu, received list"
    )
