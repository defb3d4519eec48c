"""A recipe, checked: every mistake in it, found before a weight is allocated."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from torch import nn

from ssmvl.data.mix import Reading, Share, mix
from ssmvl.data.mix import weights as weights_of
from ssmvl.errors import CheckpointError, ContractError, Problem, RecipeError, nearest
from ssmvl.model.blueprint import Blueprint
from ssmvl.model.trial import prompt_problems, trial
from ssmvl.plugins import components
from ssmvl.processing.processor import Processor
from ssmvl.processing.tokenizers import tokenizer_here
from ssmvl.recipes.binding import Bound, bind
from ssmvl.recipes.merge import Recipe, load_recipe
from ssmvl.training.composer_classes import check_composer
from ssmvl.training.freezing import is_under
from ssmvl.training.inputs import data_problems, weights_problems
from ssmvl.training.schema import NAME, RESERVED, Plan, Stage
from ssmvl.training.stage_prompts import prompts_of_stages, recipe_after

__all__ = ["Checked", "check"]


@dataclass(frozen=True, eq=False)
class Checked(Blueprint):
    """A recipe without mistakes, bound once. `build_model` and `train` take it in place of a recipe.

    Attributes:
        plan: the bound recipe.
        notes: parts that could not be checked, and stages that train with another prompt.
        opened: whether files of weights were opened.
    """

    plan: Plan
    notes: list[str]
    opened: bool

    def after(self, stage: str) -> Blueprint:
        """The blueprint that a stage's model is saved with: its prompt is the one that the stage trained with."""
        node = recipe_after(self.recipe, stage).data["model"]["prompt"]
        if node == self.recipe.data["model"]["prompt"]:
            return self
        options = self.plan.stages[stage]
        prompts = [options.prompt, *(share.prompt for share in _streams(options.data).values())]
        bound = [cast(Bound, prompt) for prompt in prompts if prompt is not None]
        return self.with_prompt(next(prompt for prompt in bound if prompt.node == node))

    def require_shared_by(self, ranks: int, noun: str = "ranks") -> None:
        """Check that the samples of each stage's step can be shared equally.

        Raises:
            RecipeError: a batch cannot, or a micro-batch is larger than a rank's share.
        """
        problems = []
        for name, stage in self.plan.stages.items():
            if stage.batch % ranks:
                what = f"{stage.batch} samples cannot be shared by {ranks} {noun}; choose a multiple of {ranks}"
                problems.append(Problem(f"stages.{name}.batch", what))
            elif stage.microbatch is not None and stage.microbatch > stage.batch // ranks:
                share, each = stage.batch // ranks, f" on each of {ranks} {noun}" if ranks > 1 else ""
                what = f"{stage.microbatch} is larger than the batch of {share} samples{each}"
                problems.append(Problem(f"stages.{name}.microbatch", what))
        if problems:
            raise RecipeError(problems, self.recipe.source)

    def stage_processor(self, stage: str | None) -> tuple[Processor, str]:
        """The processor that a stage trains with, the first one's if None, and what to call it.

        Raises:
            RecipeError: the stage is unknown.
            CheckpointError: the tokenizer cannot be found.
        """
        name = stage or next(iter(self.plan.stages))
        _require_stage(self.recipe, name)
        return self.plan.stages[name].processor(self.processor), f"{self.plan.run}, stage {name},"


def stage_processor(recipe: str | Path | Recipe | Checked, stage: str | None) -> tuple[Processor, str]:
    """The processor that a stage of a recipe trains with, and what to call it; of a recipe without stages, the model's.

    Raises:
        RecipeError: the stage is unknown, or the recipe has mistakes.
        CheckpointError: the tokenizer cannot be found.
    """
    if not isinstance(recipe, Checked):
        recipe = load_recipe(recipe)
        if not recipe.data.get("stages"):
            if stage is not None:
                _require_stage(recipe, stage)
            return replace(Blueprint.of(recipe).processor, max_text_tokens=Reading.max_text_tokens), recipe.source
        recipe = check(recipe, weights=False)
    return recipe.stage_processor(stage)


def _require_stage(recipe: Recipe, name: str) -> None:
    stages = recipe.data.get("stages") or {}
    if name not in stages:
        raise RecipeError([Problem("stages", f"unknown stage {name!r}.{nearest(name, stages)}")], recipe.source)


def check(recipe: str | Path | Recipe | Checked, *overrides: str, weights: bool = True, data: bool = False) -> Checked:
    """Find every mistake of a recipe without allocating a weight.

    Names and options are resolved first, over the whole recipe. Then the model is built and run on `meta`, the
    tokenizer is read, and pretrained weights are compared with the model, where that fetches nothing.

    Args:
        recipe: a name, a YAML file, a recipe, or what this function returned.
        overrides: `"stages.finetune.batch=128"`, applied one by one.
        weights: whether files of weights on this machine are opened.
        data: whether every dataset is opened too, and ids are looked up in the hub.

    Returns:
        The bound recipe, its model on `meta`, and notes on what was not checked.

    Raises:
        RecipeError: every problem found.
    """
    if isinstance(recipe, Checked) and not overrides and not data and (recipe.opened or not weights):
        return recipe
    merged = load_recipe(recipe.recipe if isinstance(recipe, Blueprint) else recipe, *overrides)
    notes: list[str] = []
    problems = _composer_problems(merged, notes)
    bound, found = bind(merged.data, Plan, "")
    if problems + found:
        raise RecipeError(problems + found, merged.source)
    plan: Plan = bound()
    problems = _plan_problems(plan)
    checked = Checked.assembled(merged, plan.model, plan=plan, notes=notes, opened=weights)
    broken, untried = trial(checked)
    problems += broken
    notes += untried
    if not broken:
        problems += _tokenizer_problems(checked)
    for name, stage in plan.stages.items():
        problems += _stage_problems(name, stage, checked.model)
    if plan.evaluation:
        problems += _question_problems("evaluation.data.streams", _streams(plan.evaluation.data))
    if weights and not problems:
        problems += weights_problems(checked, plan, ask_hub=data, notes=notes)
    if data and not problems:
        problems += _data_problems(checked)
    if not problems:
        try:
            checked.require_shared_by(1)
        except RecipeError as error:
            problems += error.problems
    if problems:
        raise RecipeError(problems, merged.source)
    notes += [*prompts_of_stages(merged), *components().unknown]
    return checked


def _composer_problems(recipe: Recipe, notes: list[str]) -> list[Problem]:
    """Mistakes in the names and options of Composer's classes, and in the order of stages."""
    stages = recipe.data.get("stages")
    if not isinstance(stages, dict):
        return []
    problems = []
    if "order" in stages:  # a valid one was applied when the recipe was read
        named = [name for name in stages if name != "order"]
        received = f"received {stages.pop('order')!r}, stages are {named}"
        problems.append(Problem("stages.order", f"must name each stage once: {received}"))
    for name, stage in stages.items():
        if isinstance(stage, dict):
            problems += check_composer(f"stages.{name}", stage, notes)
    return problems


def _plan_problems(plan: Plan) -> list[Problem]:
    problems = []
    if plan.stage not in (None, *plan.stages):
        near = nearest(str(plan.stage), plan.stages)
        what = f"{plan.stage!r} is not a stage of this recipe, which has {list(plan.stages)}.{near}"
        problems.append(Problem("stage", what))
    for name in plan.stages:
        if not NAME.fullmatch(str(name)) or name in RESERVED:
            what = f"{name!r} cannot name a stage; write letters, digits, _ and -, but not {' or '.join(RESERVED)}"
            problems.append(Problem("stages", what))
    return problems


def _stage_problems(name: str, stage: Stage, model: nn.Module) -> list[Problem]:
    path = f"stages.{name}"
    problems = _warmup_problems(f"{path}.warmup", stage.warmup, stage.duration)
    if stage.evaluation:
        problems += _question_problems(f"{path}.evaluation.data.streams", _streams(stage.evaluation.data))
    if stage.prompt is not None:
        problems += prompt_problems(f"{path}.prompt", cast(Bound, stage.prompt))
    for stream, share in _streams(stage.data).items():
        if share.prompt is not None:
            problems += prompt_problems(f"{path}.data.streams.{stream}.prompt", cast(Bound, share.prompt))
    problems += _prefix_problems(f"{path}.train", stage.train, model)
    problems += _prefix_problems(f"{path}.optimizer.lr_of", stage.optimizer.lr_of, model)
    return problems


def _warmup_problems(path: str, warmup: str, duration: str) -> list[Problem]:
    (start, unit), (end, own) = map(_amount_and_unit, (warmup, duration))
    if unit not in ("dur", own) and {unit, own} != {"ba", "ep"}:
        return [Problem(path, f"{warmup!r} must be in dur or in the unit of the duration, {duration!r}")]
    if (unit == own and start > end) or (unit == "dur" and start > 1):
        return [Problem(path, f"{warmup!r} is longer than the stage, which lasts {duration!r}")]
    return []


def _amount_and_unit(time: str) -> tuple[float, str]:
    unit = time.lstrip(".0123456789")
    return float(time.removesuffix(unit)), unit


def _tokenizer_problems(checked: Checked) -> list[Problem]:
    """Read the tokenizer, if it is on this machine; it must have the language model's number of ids."""
    name = checked.parts.tokenizer
    if tokenizer_here(name) is None:
        what = f"not checked, {name} is not in the hub's cache; it is downloaded when training starts"
        checked.notes.append(f"model.tokenizer: {what}")
        return []
    try:
        _ = checked.processor
    except (CheckpointError, ContractError) as error:
        return [Problem("model.tokenizer", str(error))]
    return []


def _data_problems(checked: Checked) -> list[Problem]:
    """Open the datasets, and read the first sample of each as its stage does."""
    try:
        processor = checked.processor
    except (CheckpointError, ContractError) as error:
        return [Problem("model.tokenizer", str(error))]
    return data_problems(
        checked.plan, {name: stage.processor(processor) for name, stage in checked.plan.stages.items()}
    )


def _streams(data: Any) -> dict[str, Share]:
    """The streams of a mix; empty for another dataset."""
    return dict(data.options["streams"]) if data.factory is mix else {}


def _question_problems(path: str, streams: dict[str, Share]) -> list[Problem]:
    why = "an evaluation asks every record once, in the model's prompt; leave it out"
    return [
        Problem(f"{path}.{name}.{key}", why)
        for name, share in streams.items()
        for key in (*weights_of(share), *(["prompt"] if share.prompt else []))
    ]


def _prefix_problems(path: str, prefixes: Iterable[str], model: nn.Module) -> list[Problem]:
    names = [name for name, _ in model.named_parameters()]
    parts = {name.split(".")[0] for name in names} | {".".join(name.split(".")[:2]) for name in names}
    return [
        Problem(path, f"no parameter of the model is under {prefix!r}.{nearest(prefix, parts)}")
        for prefix in prefixes
        if not any(is_under(name, prefix) for name in names)
    ]
