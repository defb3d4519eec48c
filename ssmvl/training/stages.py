"""The `stages:` of a recipe: what each trains, on what, how. Checked here; imports no Composer until asked."""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Literal

from torch import nn

from ssmvl.build import ModelParts, build_model
from ssmvl.errors import Problem, RecipeError, nearest
from ssmvl.evaluation import Evaluation
from ssmvl.interfaces import DatasetPart
from ssmvl.recipe import Recipe, bind


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW.

    Args:
        lr: peak learning rate.
        lr_of: peak learning rate by prefix of parameter names, where it differs.
        weight_decay: of matrices; never of A_log, D, dt_bias, norms and biases.
        betas: AdamW's.
    """

    lr: float
    lr_of: dict[str, float] = field(default_factory=dict)
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of training: its fields are the schema.

    Args:
        data: asked for its `train` split.
        train: prefixes of the parameters that are trained; everything else is frozen and in evaluation mode.
        optimizer: AdamW, with a cosine schedule to zero and gradients clipped at norm 1.
        warmup: Composer time, e.g. `0.03dur` or `100ba`.
        batch: samples of one step, over all ranks.
        microbatch: samples of one forward on one rank; all of the rank's if None.
        duration: Composer time, e.g. `1ep` or `500ba`.
        checkpoint: interval between checkpoints, Composer time.
        sharding: over more than one rank.
        callbacks: Composer callbacks by class name, with their options.
        loggers: Composer loggers by class name, with their options; TensorBoard is always there.
    """

    data: DatasetPart
    train: list[str]
    optimizer: Optimizer
    warmup: str = "0.03dur"
    batch: int
    microbatch: int | None = None
    duration: str
    checkpoint: str = "500ba"
    sharding: Literal["fsdp2", "ddp"] = "fsdp2"
    callbacks: dict[str, Any] = field(default_factory=dict)
    loggers: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A recipe, bound: everything a run needs.

    Args:
        run: name of the run folder.
        seed: of initial weights and of the order of samples.
        model: see `ModelParts`.
        stages: in their order; the key `order` of `stages:` may say another.
        evaluation: after the last stage; none if None.
    """

    run: str
    seed: int
    model: ModelParts
    stages: dict[str, Stage]
    evaluation: Evaluation | None = None


def check(recipe: Recipe) -> tuple[Plan, list[str]]:
    """Find every mistake of a recipe without allocating a weight.

    Names and options are resolved first, over the whole recipe; then the model is built on `meta`.

    Returns:
        The bound recipe, and notes on what could not be checked.

    Raises:
        RecipeError: every problem found.
    """
    data = dict(recipe.data)
    stages = data.get("stages")
    order = stages.get("order") if isinstance(stages, dict) else None
    problems: list[Problem] = []
    if order is not None:
        named = {key: value for key, value in stages.items() if key != "order"}
        if not isinstance(order, list) or sorted(map(str, order)) != sorted(named):
            problems.append(
                Problem("stages.order", f"must name each stage once: received {order!r}, stages are {list(named)}")
            )
            order = list(named)
        data["stages"] = {name: named[name] for name in order}
    bound, found = bind(data, Plan, "")
    problems += found
    notes: list[str] = []
    for name, stage in (data.get("stages") or {}).items() if isinstance(data.get("stages"), dict) else ():
        problems += _check_stage(f"stages.{name}", stage if isinstance(stage, dict) else {}, notes)
    if problems:
        raise RecipeError(problems, recipe.source)
    plan: Plan = bound()
    model = build_model(recipe, device="meta")
    for name, stage_ in plan.stages.items():
        problems += _check_prefixes(f"stages.{name}.train", stage_.train, model)
        problems += _check_prefixes(f"stages.{name}.optimizer.lr_of", stage_.optimizer.lr_of, model)
    if problems:
        raise RecipeError(problems, recipe.source)
    return plan, notes


def composer_class(kind: Literal["callbacks", "loggers"], name: str) -> Any:
    """The class of that name in `composer.callbacks` or `composer.loggers`, or None."""
    return getattr(importlib.import_module(f"composer.{kind}"), name, None)


def _check_stage(path: str, stage: dict[str, Any], notes: list[str]) -> list[Problem]:
    problems = []
    for key in ("batch", "microbatch"):
        if isinstance(stage.get(key), int) and stage[key] < 1:
            problems.append(Problem(f"{path}.{key}", f"must be at least 1, received {stage[key]}"))
    for key in ("callbacks", "loggers"):
        wanted = stage.get(key)
        if isinstance(wanted, dict) and wanted and find_spec("composer") is None:
            notes.append(f"{path}.{key}: not checked, Composer is not installed")
        elif isinstance(wanted, dict):
            for name, options in wanted.items():
                problems += _check_composer(f"{path}.{key}.{name}", key, name, options)
    if find_spec("composer") is None:
        notes.append(f"{path}: durations are not checked, Composer is not installed")
        return problems
    from composer.core import Time

    for key in ("warmup", "duration", "checkpoint"):
        if isinstance(stage.get(key), str):
            try:
                Time.from_timestring(stage[key])
            except ValueError:
                what = f"{stage[key]!r} is no Composer time; write e.g. 500ba, 1ep or 0.03dur"
                problems.append(Problem(f"{path}.{key}", what))
    return problems


def _check_composer(path: str, kind: Any, name: str, options: Any) -> list[Problem]:
    found = composer_class(kind, name)
    if not inspect.isclass(found):
        names = [n for n, c in vars(importlib.import_module(f"composer.{kind}")).items() if inspect.isclass(c)]
        return [Problem(path, f"composer.{kind} has no class {name!r}.{nearest(name, names)}")]
    allowed = list(inspect.signature(found).parameters)
    if not isinstance(options or {}, dict):
        return [Problem(path, f"expected a mapping of options, received {options!r}")]
    return [
        Problem(f"{path}.{key}", f"{name} has no option {key!r}.{nearest(key, allowed)}")
        for key in options or {}
        if key not in allowed
    ]


def _check_prefixes(path: str, prefixes: Any, model: nn.Module) -> list[Problem]:
    names = [name for name, _ in model.named_parameters()]
    parts = {name.split(".")[0] for name in names} | {".".join(name.split(".")[:2]) for name in names}
    return [
        Problem(path, f"no parameter of the model is under {prefix!r}.{nearest(prefix, parts)}")
        for prefix in prefixes
        if not any(is_under(name, prefix) for name in names)
    ]


def is_under(name: str, prefix: str) -> bool:
    """Whether a parameter's name lies under a prefix of whole parts."""
    return name == prefix or name.startswith(prefix + ".")
