"""The optimizer of a stage: its schema, parameter groups, learning-rate schedule, and resuming.

Composer is imported only where it is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, cast

import torch
from torch import nn

from ssmvl.errors import RunError
from ssmvl.interfaces import Check
from ssmvl.training.freezing import is_under

if TYPE_CHECKING:
    from composer import State, Trainer


def _fractions(numbers: tuple[float, ...]) -> bool:
    return all(0 <= number < 1 for number in numbers)


Rate = Annotated[float, Check("from 0 to 10", lambda rate: 0 <= rate <= 10)]


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW.

    Args:
        lr: peak learning rate.
        lr_of: peak learning rate by prefix of parameter names, where it differs; the longest prefix counts.
        weight_decay: of matrices; never of A_log, D, dt_bias, norms and biases.
        betas: AdamW's.
    """

    lr: Rate
    lr_of: dict[str, Rate] = field(default_factory=dict)
    weight_decay: Rate = 0.0
    betas: Annotated[tuple[float, float], Check("two numbers from 0 to below 1", _fractions)] = (0.9, 0.999)


def adamw(model: nn.Module, options: Optimizer) -> torch.optim.AdamW:
    """AdamW over the trained parameters; A_log, D, dt_bias, norms and biases without weight decay."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            prefixes = [prefix for prefix in options.lr_of if is_under(name.removeprefix("model."), prefix)]
            lr = options.lr_of[max(prefixes, key=len)] if prefixes else options.lr
            decay = options.weight_decay if parameter.ndim > 1 and not name.endswith(".A_log") else 0.0
            groups.setdefault((lr, decay), []).append(parameter)
    listed: list[dict[str, Any]] = [{"params": p, "lr": lr, "weight_decay": d} for (lr, d), p in groups.items()]
    return torch.optim.AdamW(listed, lr=options.lr, betas=options.betas)


def start_moments(optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter AdamW's state, as its first step would.

    Parameters that never get a gradient, of layers behind the features of a ViT, would have none in a checkpoint, and
    torch demands the state of all parameters when it loads one. Called once parameters are sharded.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            moments = {name: torch.zeros_like(parameter, requires_grad=False) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": torch.tensor(0.0), **moments}


def cosine_schedule(warmup: str, batch: int) -> Callable[[State], float]:
    """Cosine decay to zero at the end of the stage, after a linear warmup if there is one.

    Progress is measured in the unit of the stage's duration; epochs are counted in samples, so that a run that resumes
    with another batch continues where it was.

    Args:
        warmup: Composer time: a share of the duration, a time in its unit; or batches of epochs, epochs of batches.
        batch: samples of one step, over all ranks.
    """
    from composer import Time, TimeUnit

    def multiplier(state: State) -> float:
        """The factor of the peak learning rate at a state's timestamp."""
        now, duration, start = state.timestamp, cast(Any, state.max_duration), Time.from_input(warmup)
        epoch = int(cast(Any, state.dataloader_len)) * batch
        mean = now.sample.value / now.batch.value if now.batch.value else batch  # samples of a step so far
        epochs = duration.unit is TimeUnit.EPOCH
        at = now.epoch.value + now.sample_in_epoch.value / epoch if epochs else now.get(duration.unit).value
        if start.unit is TimeUnit.DURATION:
            end = start.value * duration.value
            end = end if epochs else int(end)
        elif start.unit is duration.unit:
            end = start.value
        else:
            end = start.value * mean / epoch if epochs else start.value * epoch / mean
        if at < end:
            return at / end
        rest = (at - end) / (duration.value - end) if duration.value > end else 0.0
        return (1 + math.cos(math.pi * min(rest, 1.0))) / 2

    return multiplier


def restore_options(trainer: Trainer, asked: list[dict[str, Any]]) -> None:
    """Give the optimizer the recipe's options again: a checkpoint brings those of the launch that wrote it."""
    (optimizer,), (scheduler,) = trainer.state.optimizers, trainer.state.schedulers
    if len(asked) != len(scheduler.base_lrs) or any("lr" not in group for group in optimizer.param_groups):
        what = "the optimizer groups parameters otherwise than in the checkpoint, which has no state for these groups"
        raise RunError(f"{what}; leave lr_of as it was, and weight_decay 0 or not 0, or give the run a name of its own")
    for group, options, peak in zip(optimizer.param_groups, asked, scheduler.base_lrs, strict=True):
        if peak != options["lr"]:  # else it stays, bit by bit
            group["lr"] *= options["lr"] / peak if peak else 0.0
        group |= {name: options[name] for name in ("weight_decay", "betas")}
    scheduler.base_lrs = [options["lr"] for options in asked]
