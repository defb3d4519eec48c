"""The optimizer of a stage: schema, parameter groups, learning-rate schedule, and options after resuming.

Composer is imported only in the functions that use it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import torch
from torch import Tensor, nn

from ssmvl.errors import Problem, RunError, nearest
from ssmvl.interfaces import Check
from ssmvl.training.freezing import is_under

if TYPE_CHECKING:
    from composer import State, Time, Trainer


def _fractions(numbers: tuple[float, ...]) -> bool:
    return all(0 <= number < 1 for number in numbers)


Rate = Annotated[float, Check("from 0 to 10", lambda rate: 0 <= rate <= 10)]
Name = Literal["AdamW", "Adam", "NAdam", "RAdam", "RMSprop", "SGD", "Adafactor", "DecoupledAdamW", "DecoupledSGDW"]
Schedule = Literal["cosine", "linear", "constant", "warmup-stable-decay"]
OWN_KEYS = {"lr", "weight_decay", "betas"}  # fields of `Optimizer`
UNUSABLE = {"params", "maximize", "differentiable", "capturable"}  # set here, or not for a training loop like ours


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """An optimizer of torch or Composer.

    Args:
        name: class in `torch.optim` or, for Decoupled*, in `composer.optim`.
        lr: peak learning rate.
        lr_of: peak learning rates that override `lr`, by prefix of parameter names; the longest matching prefix wins.
        weight_decay: applies to parameters with at least two axes, but never to A_log, D, dt_bias, norms or biases.
        betas: of the Adam family; None means the class's default.
        options: further arguments of the class, e.g. `{momentum: 0.9}` for SGD.
    """

    name: Name = "AdamW"
    lr: Rate
    lr_of: dict[str, Rate] = field(default_factory=dict)
    weight_decay: Rate = 0.0
    betas: Annotated[tuple[float, float], Check("two numbers, each at least 0 and below 1", _fractions)] | None = None
    options: dict[str, Any] = field(default_factory=dict)


def optimizer_problems(path: str, options: Optimizer) -> list[Problem]:
    """Find options that the optimizer's class does not take, finally by constructing it for a tiny model."""
    known = set(inspect.signature(_class(options.name)).parameters)
    problems = []
    for key in options.options:
        if key in OWN_KEYS:
            problems.append(Problem(f"{path}.options.{key}", f"write it as {path}.{key}"))
        elif key in UNUSABLE or key not in known:
            allowed = known - OWN_KEYS - UNUSABLE
            text = f"not an option of {options.name}.{nearest(key, allowed)}"
            problems.append(Problem(f"{path}.options.{key}", text))
    if options.betas is not None and "betas" not in known:
        problems.append(
            Problem(
                f"{path}.betas",
                f"{options.name} has no betas; leave them out, or set betas to null where a base recipe has them",
            )
        )
    if not problems:
        try:
            make_optimizer(nn.Linear(1, 1), options)
        except (TypeError, ValueError) as error:
            problems.append(Problem(path, f"{options.name} rejects its options: {error}"))
    return problems


def make_optimizer(model: nn.Module, options: Optimizer) -> torch.optim.Optimizer:
    """The optimizer of the trained parameters; A_log, D, dt_bias, norms and biases have no weight decay."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            prefixes = [prefix for prefix in options.lr_of if is_under(name.removeprefix("model."), prefix)]
            lr = options.lr_of[max(prefixes, key=len)] if prefixes else options.lr
            decay = options.weight_decay if parameter.ndim > 1 and not name.endswith(".A_log") else 0.0
            groups.setdefault((lr, decay), []).append(parameter)
    listed: list[dict[str, Any]] = [{"params": p, "lr": lr, "weight_decay": d} for (lr, d), p in groups.items()]
    betas = {} if options.betas is None else {"betas": options.betas}
    optimizer: torch.optim.Optimizer = _class(options.name)(listed, lr=options.lr, **betas, **options.options)
    _complete_state_after_first_step(optimizer)
    return optimizer


def state_of(options: Optimizer, parameter: Tensor) -> list[Tensor]:
    """Return the optimizer's state tensors for a parameter, on `meta`, without scalars.

    Some optimizers cannot step on `meta`, so the optimizer steps on a small tensor whose axes have distinct prime
    sizes. Each size in its state then identifies an axis of the parameter.
    """
    sizes = dict(zip((2, 3, 5, 7, 11), parameter.shape, strict=False))
    small = nn.Parameter(torch.zeros(tuple(sizes)))
    small.grad = torch.zeros_like(small)
    optimizer = _class(options.name)([small], lr=options.lr, **options.options)
    optimizer.step()
    state = [value for value in optimizer.state[small].values() if torch.is_tensor(value) and value.ndim]
    return [torch.empty([sizes.get(size, size) for size in t.shape], dtype=t.dtype, device="meta") for t in state]


def _class(name: str) -> Callable[..., torch.optim.Optimizer]:
    if name.startswith("Decoupled"):
        from composer import optim

        return cast(Any, getattr(optim, name))
    return cast(Any, getattr(torch.optim, name))


def _complete_state_after_first_step(optimizer: torch.optim.Optimizer) -> None:
    """Create optimizer state even for parameters without a gradient, such as ViT layers after the feature layer.

    torch requires the state of every parameter when it loads a checkpoint. Therefore, these parameters take a separate
    step after the first one, with a gradient and a learning rate of zero, which changes no weight.
    """

    def complete(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        gradients = {p: p.grad for group in optimizer.param_groups for p in group["params"]}
        if all(gradient is None for gradient in gradients.values()):  # the step was skipped
            return
        hook.remove()
        rates = [group["lr"] for group in optimizer.param_groups]
        for parameter, gradient in gradients.items():
            parameter.grad = torch.zeros_like(parameter) if gradient is None else None
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        optimizer.step()
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    hook = optimizer.register_step_post_hook(complete)


def rate_schedule(schedule: Schedule, warmup: str, decay: str | None, batch: int) -> Callable[[State], float]:
    """Return a function: state -> multiplier of the peak learning rate. A linear warm-up precedes the schedule.

    `cosine` and `linear` fall to zero at the end of the stage. `constant` stays at the peak. `warmup-stable-decay` also
    stays at the peak, then falls linearly to zero over `decay`.

    Progress is measured in the unit of the stage's duration. Progress within an epoch is counted in samples, so a run
    that resumes with a different batch size continues the same schedule.

    Args:
        schedule: its name.
        warmup: Composer time: a share of the duration (`dur`), or a time in the duration's unit. If that unit is epochs
            or batches, the time may be in either.
        decay: length of the final decay, as for `warmup`. Only for `warmup-stable-decay`; None means a tenth of the
            stage.
        batch: samples per step, across all ranks.
    """
    from composer import Time, TimeUnit

    def multiplier(state: State) -> float:
        """Return the multiplier of the peak learning rate at a state's timestamp."""
        now, duration = state.timestamp, cast(Any, state.max_duration)
        epoch = int(cast(Any, state.dataloader_len)) * batch
        mean = now.sample.value / now.batch.value if now.batch.value else batch  # samples per step so far
        epochs = duration.unit is TimeUnit.EPOCH
        at = now.epoch.value + now.sample_in_epoch.value / epoch if epochs else now.get(duration.unit).value

        def length(text: str) -> float:
            time: Time[Any] = Time.from_input(text)
            if time.unit is TimeUnit.DURATION:
                share = time.value * duration.value
                return float(share if epochs else int(share))
            if time.unit is duration.unit:
                return float(time.value)
            return time.value * mean / epoch if epochs else time.value * epoch / mean

        end = length(warmup)
        if at < end:
            return at / end
        if schedule == "constant":
            return 1.0
        if schedule == "warmup-stable-decay":
            end = max(end, duration.value - length(decay or "0.1dur"))
        rest = max(at - end, 0.0) / (duration.value - end) if duration.value > end else 0.0
        return (1 + math.cos(math.pi * min(rest, 1.0))) / 2 if schedule == "cosine" else 1 - min(rest, 1.0)

    return multiplier


def restore_options(trainer: Trainer, wanted: list[dict[str, Any]]) -> None:
    """Set the recipe's options again: loading a checkpoint restores those of the launch that wrote it."""
    (optimizer,), (scheduler,) = trainer.state.optimizers, trainer.state.schedulers
    if len(wanted) != len(scheduler.base_lrs) or any("lr" not in group for group in optimizer.param_groups):
        what = "the optimizer's parameter groups differ from those in the checkpoint"
        raise RunError(f"{what}; restore lr_of, and weight_decay if it was or is 0, or start a new run with run=NAME")
    for group, options, peak in zip(optimizer.param_groups, wanted, scheduler.base_lrs, strict=True):
        if peak != options["lr"]:  # otherwise lr stays bitwise identical
            group["lr"] *= options["lr"] / peak if peak else 0.0
        group |= {name: value for name, value in options.items() if name not in ("params", "lr", "initial_lr")}
    scheduler.base_lrs = [options["lr"] for options in wanted]
