"""Optimizers by name, learning-rate schedules in every unit, and clipping."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast, get_args

import pytest
import torch
from composer import Event, State, Time
from composer.core import Timestamp
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

import ssmvl
from ssmvl.errors import RecipeError
from ssmvl.training.checked import check
from ssmvl.training.gradients import GradientClipping
from ssmvl.training.optimizer import Name, Optimizer, Schedule, make_optimizer, rate_schedule, state_of

pytestmark = pytest.mark.filterwarnings("default")  # Composer and streaming emit warnings
EPOCH = 960  # samples


def rates(
    duration: str, warmup: str, batches: list[int], schedule: Schedule = "cosine", decay: str | None = None
) -> list[float]:
    """Return the factor at each step of a run with these batch sizes, until its duration ends."""
    time, factors = Timestamp(), []
    limit: Time[Any] = Time.from_timestring(duration)
    for batch in batches:
        state = SimpleNamespace(timestamp=time, max_duration=limit, dataloader_len=EPOCH // batch)
        if time.get(limit.unit) >= limit:
            break
        factors.append(rate_schedule(schedule, warmup, decay, batch)(cast(State, state)))
        time = time.to_next_batch(samples=batch, tokens=10 * batch)
        if time.sample_in_epoch.value == EPOCH:
            time = time.to_next_epoch()
    return factors


def cosine(share: float) -> float:
    return (1 + math.cos(math.pi * share)) / 2


@pytest.mark.parametrize(
    ("duration", "warmup", "share"),
    [
        ("40ba", "0ba", 0.0), ("40ba", "0.25dur", 0.25), ("40ba", "10ba", 0.25), ("40ba", "1ep", 0.375),
        ("960sp", "0.25dur", 0.25), ("960sp", "240sp", 0.25),
        ("9600tok", "0.25dur", 0.25), ("9600tok", "2400tok", 0.25),
        ("2ep", "0ba", 0.0), ("2ep", "0.25dur", 0.25), ("2ep", "1ep", 0.5), ("2ep", "6ba", 0.2),
    ],
)  # fmt: skip
def test_a_linear_warmup_and_a_cosine_to_zero(duration: str, warmup: str, share: float) -> None:
    batch = 64
    actual = rates(duration, warmup, [batch] * 100)
    steps = {"ba": 40, "sp": 15, "tok": 15, "ep": 30}[duration.strip("0123456789")]
    first = int(share * steps) if duration.endswith("ba") and "dur" in warmup else share * steps
    expected = [at / first if at < first else cosine((at - first) / (steps - first)) for at in range(steps)]
    assert actual == pytest.approx(expected, abs=1e-9)


@given(split=st.integers(0, 9), warmup=st.sampled_from(["0ba", "0.25dur", "1ep"]), other=st.sampled_from([16, 96, 192]))
def test_epochs_are_counted_in_samples_for_any_batch(split: int, warmup: str, other: int) -> None:
    changed = [32] * (6 * split) + [other] * 200
    actual, sample = rates("2ep", warmup, changed), 0
    share = {"0ba": 0.0, "0.25dur": 0.25, "1ep": 0.5}[warmup]
    for rate, batch in zip(actual, changed, strict=False):
        at = sample / (2 * EPOCH)
        assert rate == pytest.approx(at / share if at < share else cosine((at - share) / (1 - share)), abs=1e-9)
        sample += batch
    assert actual[-1] < 0.1


@given(split=st.integers(4, 50), duration=st.sampled_from(["2ep", "60ba"]), warmup=st.sampled_from(["4ba", "1ep"]))
def test_the_rate_does_not_jump_when_the_batch_changes(split: int, duration: str, warmup: str) -> None:
    before = rates(duration, warmup, [32] * 100)
    after = rates(duration, warmup, [32] * split + [96] * 100)
    assert after[:split] == before[:split]
    if len(after) > split:
        assert after[split] == pytest.approx(before[split], abs=1e-9)


@pytest.mark.long
def test_a_run_resumed_with_another_batch_continues_its_schedule(tiny: Path) -> None:
    options = ("stages.align=null", "stages.order=null", "evaluation=null", "stages.finetune.duration=2ep")
    options += ("stages.finetune.warmup=0.25dur", "stages.finetune.keep=20", "stages.finetune.checkpoint=4ba")
    ssmvl.train(tiny, *options)  # 16 steps of 8 samples
    shutil.rmtree("runs/tiny/model")
    checkpoints = Path("runs/tiny/finetune/checkpoints")
    for path in checkpoints.iterdir():
        if int(path.name.split("ba")[1].split("-")[0]) > 8:
            path.unlink()
    shutil.rmtree("runs/tiny/tensorboard")
    ssmvl.train(tiny, *options, "stages.finetune.batch=16")
    events = EventAccumulator("runs/tiny/tensorboard/tiny-finetune")
    events.Reload()
    (name,) = [name for name in events.Tags()["scalars"] if name.startswith("lr-")]
    actual = [event.value / 2e-3 for event in events.Scalars(name)]
    shares = [(samples / 128 - 0.25) / 0.75 for samples in range(64, 129, 16)]
    assert actual == pytest.approx([cosine(share) for share in shares][: len(actual)], abs=1e-3)
    assert len(actual) >= 4


def test_a_duration_in_seconds_has_no_schedule(tiny: Path) -> None:
    with pytest.raises(RecipeError, match=r"stages\.finetune\.duration.*'60sec'"):
        ssmvl.train(tiny, "stages.finetune.duration=60sec")


@pytest.mark.parametrize(
    ("schedule", "decay", "expected"),
    [
        ("linear", None, lambda at: 1 - (at - 10) / 30),
        ("constant", None, lambda at: 1.0),
        ("warmup-stable-decay", None, lambda at: min(1.0, (40 - at) / 4)),
        ("warmup-stable-decay", "10ba", lambda at: min(1.0, (40 - at) / 10)),
        ("warmup-stable-decay", "0.5dur", lambda at: min(1.0, (40 - at) / 20)),
    ],
)
def test_other_schedules(schedule: Schedule, decay: str | None, expected: Callable[[int], float]) -> None:
    found = rates("40ba", "10ba", [64] * 100, schedule, decay)
    assert found == pytest.approx([at / 10 if at < 10 else expected(at) for at in range(40)], abs=1e-9)


OPTIONS = {"SGD": {"momentum": 0.9}, "RMSprop": {"momentum": 0.5}}


@pytest.mark.parametrize("name", get_args(Name))
def test_every_optimizer_resumes_exactly_and_parameters_without_gradient_have_state(name: Name) -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleDict({"used": nn.Linear(4, 3), "unused": nn.Linear(4, 3)})

    def step(model: Any, optimizer: torch.optim.Optimizer, seed: int) -> None:
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        model["used"](x).square().sum().backward()
        optimizer.step()

    options = Optimizer(name=name, lr=1e-2, weight_decay=0.1, options=OPTIONS.get(name, {}))
    plain, resumed = model(), model()
    straight, first = make_optimizer(plain, options), make_optimizer(resumed, options)
    unused = plain["unused"].weight.clone()
    for seed in range(4):
        step(plain, straight, seed)
    for seed in range(2):
        step(resumed, first, seed)
    saved = copy.deepcopy(get_optimizer_state_dict(resumed, first))
    assert set(saved["state"]) == {n for n, _ in resumed.named_parameters()}
    second = make_optimizer(resumed, options)
    set_optimizer_state_dict(resumed, second, saved)
    for seed in range(2, 4):
        step(resumed, second, seed)
    assert all(map(torch.equal, plain.parameters(), resumed.parameters()))
    assert torch.equal(plain["unused"].weight, unused)


def test_the_first_steps_are_those_of_torch_alone() -> None:
    """The extra step for parameters without a gradient changes no moment of the others."""
    ours, theirs = nn.Linear(3, 2, bias=False), nn.Linear(3, 2, bias=False)
    theirs.load_state_dict(ours.state_dict())
    other = nn.ModuleList([ours, nn.Linear(3, 2)])
    pairs = [
        (ours, make_optimizer(other, Optimizer(lr=0.1))),
        (theirs, torch.optim.AdamW(theirs.parameters(), lr=0.1, weight_decay=0)),
    ]
    for seed in range(3):
        for layer, optimizer in pairs:
            optimizer.zero_grad()
            layer(torch.full((1, 3), seed + 1.0)).sin().sum().backward()
            optimizer.step()
    assert torch.equal(ours.weight, theirs.weight)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ("{name: Lion}", "stages.align.optimizer.name: expected one of 'AdamW'"),
        ("{name: SGD, betas: [0.9, 0.99]}", "stages.align.optimizer.betas: SGD has no betas"),
        ("{name: SGD, options: {nesterov: true}}", "SGD rejects its options: Nesterov momentum requires"),
        ("{options: {momentun: 0.9}}", "stages.align.optimizer.options.momentun: not an option of AdamW"),
        ("{options: {lr: 1.0}}", "write it as stages.align.optimizer.lr"),
        ("{options: {maximize: true}}", "options.maximize: not an option of AdamW"),
    ],
)
def test_options_that_an_optimizer_does_not_take_are_rejected(optimizer: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        check("quickstart", f"stages.align.optimizer={optimizer}", weights=False)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["decay=10ba"], r"stages\.align\.decay: only schedule warmup-stable-decay has a decay, not cosine"),
        (["schedule=warmup-stable-decay", "decay=0.99dur"], r"stages\.align\.decay: '0\.99dur'; with the warm-up"),
        (["schedule=warmup-stable-decay", "decay=5tok"], r"stages\.align\.decay: '5tok' must be in dur or in the unit"),
        (["schedule=cosin"], r"stages\.align\.schedule: expected one of 'cosine'"),
        (["clip_norm=0"], r"stages\.align\.clip_norm: must be a number above 0"),
        (["max_damaged=2"], r"stages\.align\.max_damaged: must be from 0 to 1"),
    ],
)
def test_schedules_and_limits_that_cannot_be_right_are_rejected(overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        check("quickstart", *(f"stages.align.{text}" for text in overrides), weights=False)


@pytest.mark.parametrize("limit", [0.5, None])
def test_gradients_are_clipped_at_the_stages_limit(limit: float | None) -> None:
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.grad = torch.tensor([[3.0, 4.0]])
    clipping = GradientClipping(limit)
    clipping.apply(Event.AFTER_TRAIN_BATCH, cast(State, SimpleNamespace(model=layer)), cast(Any, None))
    assert float(clipping.norm) == 5.0
    assert float(layer.weight.grad.norm()) == pytest.approx(5.0 if limit is None else limit, abs=1e-5)


@pytest.mark.parametrize("name", get_args(Name))
def test_the_planned_state_is_that_of_a_step(name: Name) -> None:
    options = Optimizer(name=name, lr=1e-2, options=OPTIONS.get(name, {}))
    layer = nn.Conv1d(6, 8, 4)
    optimizer = make_optimizer(layer, options)
    layer(torch.ones(1, 6, 5)).sum().backward()
    optimizer.step()
    for parameter in layer.parameters():
        state = [tuple(t.shape) for t in optimizer.state[parameter].values() if torch.is_tensor(t) and t.ndim]
        assert [tuple(t.shape) for t in state_of(options, parameter)] == state
