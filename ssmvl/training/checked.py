"""Check a recipe: report every mistake before any weight is allocated."""

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
from ssmvl.processing.tokenizers import local_tokenizer
from ssmvl.recipes.binding import Bound, bind
from ssmvl.recipes.merge import Recipe, load_recipe
from ssmvl.training.composer_classes import check_composer
from ssmvl.training.freezing import is_under
from ssmvl.training.inputs import data_problems, weights_problems
from ssmvl.training.optimizer import optimizer_problems
from ssmvl.training.schema import NAME, RESERVED, Plan, Stage
from ssmvl.training.stage_prompts import prompts_of_stages, recipe_after

__all__ = ["Checked", "check"]


@dataclass(frozen=True, eq=False)
class Checked(Blueprint):
    """A valid recipe, bound once. `build_model` and `train` accept it in place of a recipe.

    Attributes:
        plan: the bound recipe.
        notes: parts that could not be checked, and stages that train with a prompt other than the model's.
        opened: whether weight files were opened.
    """

    plan: Plan
    notes: list[str]
    opened: bool

    def after(self, stage: str) -> Blueprint:
        """Return the blueprint saved with a stage's model: its prompt is the one that the stage trained with."""
        node = recipe_after(self.recipe, stage).data["model"]["prompt"]
        if node == self.recipe.data["model"]["prompt"]:
            return self
        options = self.plan.stages[stage]
        prompts = [options.prompt, *(share.prompt for share in _streams(options.data).values())]
        bound = [cast(Bound, prompt) for prompt in prompts if prompt is not None]
        return self.with_prompt(next(prompt for prompt in bound if prompt.node == node))

    def require_shared_by(self, ranks: int, noun: str = "ranks") -> None:
        """Check that each stage's batch can be split evenly across the ranks.

        Raises:
            RecipeError: a batch cannot be split, or a micro-batch is larger than a rank's share.
        """
        problems = []
        for name, stage in self.plan.stages.items():
            if stage.batch % ranks:
                what = (
                    f"{stage.batch} samples cannot be split evenly across {ranks} {noun}; choose a multiple of {ranks}"
                )
                problems.append(Problem(f"stages.{name}.batch", what))
            elif stage.microbatch is not None and stage.microbatch > stage.batch // ranks:
                share, each = stage.batch // ranks, f" on each of {ranks} {noun}" if ranks > 1 else ""
                what = f"{stage.microbatch} is larger than the batch of {share} samples{each}"
                problems.append(Problem(f"stages.{name}.microbatch", what))
        if problems:
            raise RecipeError(problems, self.recipe.source)

    def stage_processor(self, stage: str | None) -> tuple[Processor, str]:
        """Return the processor of a stage (of the first stage if None), and its name for messages.

        Raises:
            RecipeError: the stage is unknown.
            CheckpointError: the tokenizer cannot be found.
        """
        name = stage or next(iter(self.plan.stages))
        _require_stage(self.recipe, name)
        return self.plan.stages[name].processor(self.processor), f"{self.plan.run}, stage {name},"


def stage_processor(recipe: str | Path | Recipe | Checked, stage: str | None) -> tuple[Processor, str]:
    """Return the processor of a recipe's stage and its name for messages; the model's processor if it has no stages.

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
    """Report every mistake in a recipe without allocating a weight.

    The names and options of the whole recipe are resolved first. Then the model is built and run on `meta`, the
    tokenizer is read, and pretrained weights are compared with the model, as long as this needs no download.

    Args:
        recipe: a name, a YAML file, a recipe, or the result of an earlier check.
        overrides: `"stages.finetune.batch=128"`, applied in order.
        weights: whether to open weight files on this machine.
        data: whether to open every dataset too, and look up ids on the Hub.

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
    bound, mistakes = bind(merged.data, Plan, "")
    problems += mistakes
    if problems:
        raise RecipeError(problems, merged.source)
    plan: Plan = bound()
    problems = _plan_problems(plan)
    checked = Checked.assembled(merged, plan.model, plan=plan, notes=notes, opened=weights)
    failures, skipped = trial(checked)
    problems += failures
    notes += skipped
    if not failures:
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
    """Return mistakes in the names and options of Composer's classes, and in the order of stages."""
    stages = recipe.data.get("stages")
    if not isinstance(stages, dict):
        return []
    problems = []
    if "order" in stages:  # a valid order was applied, and removed, when the recipe was loaded
        names = [name for name in stages if name != "order"]
        received = f"received {stages.pop('order')!r}, but the stages are {names}"
        problems.append(Problem("stages.order", f"must name each stage once; {received}"))
    for name, stage in stages.items():
        if isinstance(stage, dict):
            problems += check_composer(f"stages.{name}", stage, notes)
    return problems


def _plan_problems(plan: Plan) -> list[Problem]:
    problems = []
    if plan.stage not in (None, *plan.stages):
        what = f"unknown stage {plan.stage!r}.{nearest(str(plan.stage), plan.stages)}"
        problems.append(Problem("stage", what))
    for name in plan.stages:
        if not NAME.fullmatch(str(name)) or name in RESERVED:
            what = f"invalid stage name {name!r}; use letters, digits, _ and -, but not {' or '.join(RESERVED)}"
            problems.append(Problem("stages", what))
    return problems


def _stage_problems(name: str, stage: Stage, model: nn.Module) -> list[Problem]:
    path = f"stages.{name}"
    problems = _schedule_problems(path, stage)
    problems += optimizer_problems(f"{path}.optimizer", stage.optimizer)
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


def _schedule_problems(path: str, stage: Stage) -> list[Problem]:
    """Warm-up and decay must fit into the stage; only one schedule has a decay."""
    stable = stage.schedule == "warmup-stable-decay"
    if stage.decay is not None and not stable:
        return [Problem(f"{path}.decay", f"only schedule warmup-stable-decay has a decay, not {stage.schedule}")]
    times = {"warmup": stage.warmup} | ({"decay": stage.decay or "0.1dur"} if stable else {})
    end, end_unit = _amount_and_unit(stage.duration)
    problems, shares = [], 0.0
    for key, time in times.items():
        amount, unit = _amount_and_unit(time)
        if unit not in ("dur", end_unit) and {unit, end_unit} != {"ba", "ep"}:
            must = f"must be in dur or in the unit of the stage's duration, {stage.duration!r}"
            problems.append(Problem(f"{path}.{key}", f"{time!r} {must}"))
        shares += amount if unit == "dur" else amount / end if unit == end_unit else 0.0
        if shares > 1:
            sums = "" if key == "warmup" else f"; with the warm-up, {stage.warmup!r}, it"
            problems.append(
                Problem(f"{path}.{key}", f"{time!r}{sums} is longer than the stage's duration, {stage.duration!r}")
            )
    return problems


def _amount_and_unit(time: str) -> tuple[float, str]:
    unit = time.lstrip(".0123456789")
    return float(time.removesuffix(unit)), unit


def _tokenizer_problems(checked: Checked) -> list[Problem]:
    """Read the tokenizer if it is on this machine; its number of ids must match the language model's."""
    name = checked.parts.tokenizer
    if local_tokenizer(name) is None:
        what = f"not checked, {name} is not in the hub's cache; it is downloaded when training starts"
        checked.notes.append(f"model.tokenizer: {what}")
        return []
    try:
        _ = checked.processor
    except (CheckpointError, ContractError) as error:
        return [Problem("model.tokenizer", str(error))]
    return []


def _data_problems(checked: Checked) -> list[Problem]:
    """Open the datasets, and read the first sample of each as its stage would."""
    try:
        processor = checked.processor
    except (CheckpointError, ContractError) as error:
        return [Problem("model.tokenizer", str(error))]
    return data_problems(
        checked.plan, {name: stage.processor(processor) for name, stage in checked.plan.stages.items()}
    )


def _streams(data: Any) -> dict[str, Share]:
    """Return the streams of a mix; empty for any other dataset."""
    return dict(data.options["streams"]) if data.factory is mix else {}


def _question_problems(path: str, streams: dict[str, Share]) -> list[Problem]:
    what = "an evaluation asks every record once, with the model's prompt; leave it out"
    return [
        Problem(f"{path}.{name}.{key}", what)
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
