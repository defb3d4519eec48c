"""Tests of every mixer, independent of its recurrence."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ssmvl.errors import ShapeError
from ssmvl.interfaces import Grid, Mixer, Paths, ScanOrder
from ssmvl.layers.mamba1 import Mamba1Mixer
from ssmvl.layers.mamba2 import Mamba2Mixer
from ssmvl.scans import bsm, csm, raster

Build = Callable[..., nn.Module]
MIXERS = {
    "mamba2": functools.partial(Mamba2Mixer, d_state=5, head_dim=4, d_conv=3),
    "mamba2-groups": functools.partial(Mamba2Mixer, d_state=5, head_dim=4, num_groups=2, norm_groups=2),
    "mamba1": functools.partial(Mamba1Mixer, d_state=5, d_conv=3, dt_rank=2),
}
assert_close = functools.partial(torch.testing.assert_close, atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="module", params=MIXERS)
def build(request: pytest.FixtureRequest) -> Build:
    return MIXERS[request.param]


@torch.no_grad()
def trained(mixer: nn.Module) -> nn.Module:
    """The mixer with every parameter perturbed, so that paths differ."""
    for parameter in mixer.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.2)
    return mixer


def single_path(build: Build, mixer: nn.Module, k: int) -> nn.Module:
    """A mixer over one path, with the parameters of path k."""
    one = build(8)
    shapes = {name: tensor.shape for name, tensor in one.state_dict().items()}
    tensors = mixer.state_dict()
    one.load_state_dict(
        {name: t if t.shape == shapes[name] else t.split(shapes[name][0])[k] for name, t in tensors.items()}
    )
    return one


def test_satisfies_the_contract(build: Build) -> None:
    assert isinstance(build(8), Mixer)


@pytest.mark.parametrize("merge", ["mean", "sum"])
@pytest.mark.parametrize("parameters", ["own", "shared"])
@pytest.mark.parametrize("order", [raster, bsm, csm])
def test_paths_equal_single_path_mixers_forward_and_backward(
    build: Build, order: ScanOrder, parameters: str, merge: str
) -> None:
    paths = order(Grid(2, 2, 3))
    mixer = trained(build(8, len(paths), path_parameters=parameters, merge=merge))
    x = torch.randn(2, 12, 8, requires_grad=True)
    each = [single_path(build, mixer, k)(x[:, path])[:, path.argsort()] for k, path in enumerate(paths)]
    expected = sum(each) / (len(paths) if merge == "mean" else 1)
    y, weight = mixer(x, Paths.of(paths)), torch.randn(2, 12, 8)
    assert_close(y, expected)
    assert_close(*(torch.autograd.grad((t * weight).sum(), x)[0] for t in (y, expected)), atol=1e-4)


def test_shared_parameters_have_the_shapes_of_one_path(build: Build) -> None:
    one = {name: tuple(p.shape) for name, p in build(8).named_parameters()}
    shared = build(8, 4, path_parameters="shared")
    assert {name: tuple(p.shape) for name, p in shared.named_parameters()} == one


def test_causal(build: Build) -> None:
    mixer, x = trained(build(8)), torch.randn(1, 9, 8)
    y = mixer(x)
    x[:, 5] += 1
    changed = (mixer(x) - y).abs().amax((0, 2)) > 0
    assert changed.tolist() == [False] * 5 + [True] * 4


@pytest.mark.parametrize("cut", range(13))
@torch.no_grad()
def test_prefill_in_two_parts_and_steps_equal_forward(build: Build, cut: int) -> None:
    mixer, x = trained(build(8)), torch.randn(2, 12, 8)
    y, state = mixer(x), mixer.new_state(2)
    pointers = [t.data_ptr() for t in state]
    first = mixer.prefill(x[:, :cut], torch.full((2,), cut), state)
    stepped = type(state)(*(t.clone() for t in state))
    second = mixer.prefill(x[:, cut:], torch.full((2,), 12 - cut), state)
    assert_close(torch.cat([first, second], 1), y)
    for t in range(cut, 12):
        assert_close(mixer.step(x[:, t], stepped), y[:, t])
    for one, other in zip(stepped, state, strict=True):
        assert_close(one, other)
    assert [t.data_ptr() for t in state] == pointers


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=5))
@torch.no_grad()
def test_rows_of_any_lengths_equal_the_row_alone(build: Build, lengths: list[int]) -> None:
    mixer, rows = trained(build(8)), len(lengths)
    x, state = torch.randn(rows, 12, 8), mixer.new_state(rows)
    for tensor in state:
        tensor.normal_()
    singles = [type(state)(*(t[row : row + 1].clone() for t in state)) for row in range(rows)]
    y = mixer.prefill(x, torch.tensor(lengths), state)
    for row, (length, single) in enumerate(zip(lengths, singles, strict=True)):
        assert_close(
            y[row : row + 1, :length], mixer.prefill(x[row : row + 1, :length], torch.tensor([length]), single)
        )
        for mixed, expected in zip(state, single, strict=True):
            assert_close(mixed[row : row + 1], expected)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=5), st.integers(0, 3))
def test_packed_row_equals_separate_samples_forward_and_backward(
    build: Build, lengths: list[int], padding: int
) -> None:
    mixer, real = trained(build(8)), sum(lengths)
    x, weight = torch.randn(1, real + padding, 8, requires_grad=True), torch.randn(1, real, 8)
    numbers = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    packed = mixer(x, None, torch.cat([numbers, torch.full((padding,), -1)])[None].int())[:, :real]
    separate = torch.cat([mixer(part) for part in x[:, :real].split(lengths, dim=1)], 1)
    assert_close(packed, separate)
    gradients = (torch.autograd.grad((y * weight).sum(), [x, *mixer.parameters()]) for y in (packed, separate))
    for one, other in zip(*gradients, strict=True):
        assert_close(one, other, atol=1e-4 * max(1.0, float(other.abs().max())))


@pytest.mark.parametrize("parameters", ["own", "shared"])
@pytest.mark.parametrize("kind", [Mamba2Mixer, Mamba1Mixer])
def test_gradients_in_fp64(kind: type[nn.Module], parameters: str) -> None:
    options = {"head_dim": 2, "num_groups": 2, "norm_groups": 2} if kind is Mamba2Mixer else {"dt_rank": 2}
    mixer = trained(kind(2, 2, d_state=2, d_conv=2, path_parameters=parameters, **options).double())
    names, tensors = zip(*mixer.named_parameters(), strict=True)
    paths, segments = Paths.of(bsm(Grid(1, 2, 2))), torch.tensor([[0, 0, 1, 1]])
    x = torch.randn(1, 4, 2, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(mixer, dict(zip(names, values, strict=True)), (x, paths))

    assert torch.autograd.gradcheck(run, (x, *tensors))
    packed = trained(kind(2, d_state=2, d_conv=2, **options).double())
    assert torch.autograd.gradcheck(lambda x: packed(x, None, segments), (x,))


@pytest.mark.parametrize(
    ("weights", "requested", "conv", "ssm"),
    [
        (torch.float32, None, torch.float32, torch.float32),
        (torch.bfloat16, None, torch.bfloat16, torch.float32),
        (torch.float64, None, torch.float64, torch.float64),
        (torch.float32, torch.bfloat16, torch.bfloat16, torch.float32),
    ],
)
@torch.no_grad()
def test_state_is_at_least_fp32(
    build: Build, weights: torch.dtype, requested: torch.dtype | None, conv: torch.dtype, ssm: torch.dtype
) -> None:
    mixer = build(8).to(weights)
    state = mixer.new_state(2, dtype=requested)
    assert mixer.prefill(torch.randn(2, 5, 8), torch.tensor([5, 3]), state).dtype == weights
    assert mixer.step(torch.randn(2, 8), state).dtype == weights
    assert (state.conv.dtype, state.ssm.dtype) == (conv, ssm)


def assert_rejected(message: str, run: Callable[[], object]) -> None:
    with pytest.raises(ShapeError, match=message) as caught:
        run()
    assert "\n" not in str(caught.value)


def test_another_number_of_paths_is_rejected(build: Build) -> None:
    mixer, x = build(8, 4), torch.randn(1, 6, 8)
    assert_rejected("num_paths=4 received 2 paths", lambda: mixer(x, Paths.of(bsm(Grid(1, 2, 3)))))
    assert_rejected("num_paths=4 received no paths", lambda: mixer(x))
    assert_rejected("num_paths=1 received 2 paths", lambda: build(8)(x, Paths.of(bsm(Grid(1, 2, 3)))))


def test_paths_with_segments_are_rejected(build: Build) -> None:
    x, segments = torch.randn(1, 6, 8), torch.zeros(1, 6, dtype=torch.int32)
    for order in (raster, bsm):
        paths = Paths.of(order(Grid(1, 2, 3)))
        mixer = build(8, len(paths.order))
        assert_rejected("paths and segments are mutually exclusive", functools.partial(mixer, x, paths, segments))


@pytest.mark.parametrize("parameters", ["own", "shared"])
def test_several_paths_have_no_state(build: Build, parameters: str) -> None:
    assert_rejected(
        "over 3 paths has no state; build it with num_paths=1",
        lambda: build(8, 3, path_parameters=parameters).new_state(1),
    )


@pytest.mark.parametrize("side", [1, 2, 3])
def test_paths_of_another_length_are_rejected(build: Build, side: int) -> None:
    paths = Paths.of(bsm(Grid(1, side, side)))
    assert_rejected(rf"paths .*received \(2, {side * side}\)", lambda: build(8, 2)(torch.randn(1, 6, 8), paths))


@torch.no_grad()
def test_a_batch_of_no_rows_is_rejected(build: Build) -> None:
    mixer, x = build(8), torch.randn(0, 4, 8)
    assert_rejected("the batch has no rows", lambda: mixer(x))
    assert_rejected(
        "the batch has no rows", lambda: mixer.prefill(x, torch.zeros(0, dtype=torch.int64), mixer.new_state(0))
    )
    assert_rejected("the batch has no rows", lambda: mixer.step(x[:, 0], mixer.new_state(0)))


@pytest.mark.parametrize("option", [{"path_parameters": "foo"}, {"merge": "max"}])
def test_unknown_choices_are_rejected(build: Build, option: dict[str, str]) -> None:
    assert_rejected(" must be '.*' or '.*', received '(foo|max)'", lambda: build(8, 2, **option))
