"""`ssmvl plan RECIPE [a.b=c …] --gpus 8 --memory 80`: GPU memory and step time of each stage."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING

from ssmvl.cli.common import merged_recipe, positive_integer, recipe_arguments

if TYPE_CHECKING:
    from rich.table import Table

    from ssmvl.training.planning.plan import Setting, StagePlan

GB, MINUTE, HOUR = 1e9, 60, 3600


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments: a recipe, its overrides, and the hardware."""
    recipe_arguments(parser)
    parser.add_argument(
        "--gpus", type=positive_integer, required=True, metavar="N", help="number of GPUs, one rank each"
    )
    parser.add_argument("--memory", type=_amount, required=True, metavar="GB", help="memory of one GPU, in 10^9 bytes")
    parser.add_argument(
        "--text-tokens",
        type=positive_integer,
        default=256,
        metavar="N",
        help="text tokens per sample, for the time (default: 256)",
    )
    parser.add_argument("--mfu", type=_share, default=0.4, help="model FLOPs utilization, for the time (default: 0.4)")
    parser.add_argument("--tflops", type=_amount, default=312.0, help="peak of one GPU in bf16 (default: 312, an A100)")


def run(options: argparse.Namespace) -> int:
    """Print the plan of each stage. Returns 1 if a stage does not fit."""
    from rich.console import Console

    recipe = merged_recipe(options)
    from ssmvl.progress import progress
    from ssmvl.training.planning.plan import MARGIN, stage_plans

    plans = stage_plans(recipe, options.gpus)
    console = Console(highlight=False, soft_wrap=True)
    limit = options.memory * GB * (1 - MARGIN)
    verdicts = {
        name: _verdict(name, plan, plan.memory().total(), limit)
        for name, plan in progress(plans.items(), desc="planning", unit=" stages", leave=False)
    }
    for name, plan in plans.items():
        console.print(_heading(name, plan))
        console.print(_table(plan.memory(), options.memory, limit), "")
        console.print(verdicts[name])
        console.print(_time(plan, options) + "\n")
    console.print(
        "Memory: fp32 weights under bf16 autocast and the torch backend (the mamba_ssm kernels need less), in the worst"
        " case, where each sample has one image and max_text_tokens tokens, all supervised."
        f" {MARGIN:.0%} of a GPU is reserved for the CUDA context and fragmentation.\n"
        "Time: at the stated MFU, which does not count the recomputation of activation checkpointing."
    )
    return 0 if all(plan.memory().total() <= limit for plan in plans.values()) else 1


def _heading(name: str, plan: StagePlan) -> str:
    setting = plan.setting
    gpus = f"{setting.gpus} GPUs, {setting.sharding}" if setting.gpus > 1 else "1 GPU"
    with_or_without = "with" if setting.activation_checkpointing else "without"
    return (
        f"{name}: trains {', '.join(plan.stage.train)}; {plan.stage.batch} samples per step on {gpus},"
        f" in micro-batches of {setting.microbatch}, {with_or_without} activation checkpointing\n"
    )


def _table(memory: dict[str, int], gpu: float, limit: float) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("one GPU at the peak of a step")
    table.add_column("GB", justify="right")
    for kind, size in memory.items():
        table.add_row(kind, f"{size / GB:.2f}")
    table.add_row("total", f"{sum(memory.values()) / GB:.2f}")
    table.add_row(f"usable of {gpu:g}", f"{limit / GB:.2f}")
    return table


def _verdict(name: str, plan: StagePlan, total: int, limit: float) -> str:
    if total <= limit:
        best = plan.largest(limit)
        return f"fits; so does stages.{name}.microbatch={best}" if best > plan.setting.microbatch else "fits"
    lines = [f"does not fit: {(total - limit) / GB:.2f} GB too much. Settings that fit:"]
    for setting in plan.remedies(limit):
        lines.append("  " + _overrides(name, plan.setting, setting))
    if len(lines) == 1:
        least, gpus = plan.least()
        return (
            f"does not fit with any setting, nor on more GPUs that can share {plan.stage.batch} samples: one sample"
            f" with activation checkpointing and sharding needs {least / GB:.2f} GB per GPU on"
            f" {gpus} GPU{'s' * (gpus > 1)}"
        )
    return "\n".join(lines)


def _overrides(name: str, old: Setting, new: Setting) -> str:
    """Return the options and overrides that change one setting into another."""
    changes = [f"--gpus {new.gpus}"] if new.gpus != old.gpus else []
    for key in ("sharding", "activation_checkpointing", "microbatch"):
        value = getattr(new, key)
        if value != getattr(old, key):
            changes.append(f"stages.{name}.{key}={str(value).lower()}")
    return " ".join(changes)


def _time(plan: StagePlan, options: argparse.Namespace) -> str:
    text = min(options.text_tokens, plan.stage.max_text_tokens)
    flops, positions, steps = plan.flops(text), plan.positions(text), plan.steps()
    seconds = flops / (options.gpus * options.tflops * 1e12 * options.mfu)
    work = f"{positions:,} tokens and {flops / 1e15:.3g} PFLOP per step (one image and {text} text tokens per sample)"
    if steps is None:
        total = f"{_duration(1000 / plan.stage.batch * seconds)} for 1,000 samples (duration {plan.stage.duration})"
    else:
        total = f"{_duration(steps * seconds)} for {steps:,} steps"
    rate = f"{options.mfu:.0%} of {options.gpus} × {options.tflops:g} TFLOP/s"
    return f"{work}; at {rate}: {_duration(seconds)} per step, {total}"


def _duration(seconds: float) -> str:
    if seconds < 2 * MINUTE:
        return f"{seconds:.3g} s"
    return f"{seconds / MINUTE:.1f} min" if seconds < 2 * HOUR else f"{seconds / HOUR:.1f} h"


def _amount(text: str) -> float:
    return _number(text, "a number above 0", math.inf)


def _share(text: str) -> float:
    return _number(text, "a number above 0 and at most 1", 1.0)


def _number(text: str, allowed: str, maximum: float) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (0 < number <= maximum and math.isfinite(number)):
        raise argparse.ArgumentTypeError(f"must be {allowed}, received {text!r}")
    return number
