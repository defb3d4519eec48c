"""The `stages:` of a recipe: what each trains, on what, how. Checked here; imports no Composer until asked."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from torch import nn

from ssmvl.data.mix import Loader, Reading, Share, mix, weights
from ssmvl.data.remote import is_remote
from ssmvl.errors import CheckpointError, ContractError, Problem, RecipeError, nearest
from ssmvl.evaluation.runner import Evaluation
from ssmvl.interfaces import Check, Count, DatasetPart, Prompt, Seed
from ssmvl.model.build import ModelParts, build_model, build_processor, lacks_nothing
from ssmvl.model.vlm import VisionLanguageModel
from ssmvl.processing.processor import Processor
from ssmvl.processing.tokenizers import tokenizer_here
from ssmvl.recipes.binding import bind
from ssmvl.recipes.merge import Recipe
from ssmvl.training.composer_classes import check_composer
from ssmvl.training.freezing import is_under
from ssmvl.training.optimizer import Optimizer
from ssmvl.training.stage_prompts import prompts_of_stages


def _is_place(place: str) -> bool:
    return bool(re.match("s3://[^/]", place) if is_remote(place) else place)


TIME = re.compile(r"\d+(\.\d+)?dur|\d+(ba|ep|sp|tok)")
INTERVAL = re.compile(r"0*[1-9]\d*(ba|ep|sp|tok|sec)")
NAME = re.compile(r"\w[\w-]*")
RESERVED = ("model", "tensorboard")  # what a run folder holds beside its stages
DURATION = re.compile(r"0*[1-9]\d*(ba|ep|sp|tok)")
Duration = Annotated[str, Check("a whole number and a unit (ba, ep, sp, tok), e.g. 1ep", DURATION.fullmatch)]
Interval = Annotated[str, Check("a whole number and a unit (ba, ep, sp, tok, sec), e.g. 500ba", INTERVAL.fullmatch)]


@dataclass(frozen=True, kw_only=True)
class StageEvaluation(Evaluation):
    """A set that is scored and asked while a stage trains.

    Args:
        data: asked for its `test` split.
        batch: questions asked at once, on each rank.
        max_new_tokens: length of an answer at the most.
        interval: between evaluations, Composer time; one more follows the last step.
    """

    interval: Interval = "1ep"


@dataclass(frozen=True, kw_only=True)
class Stage(Reading):
    """One stage of training: its fields, and those of `Reading`, are the schema.

    Args:
        data: asked for its `train` split.
        init_from: what the stage starts from, in place of what the one before left: a saved folder, an id in the hub, a
            checkpoint of a whole model in a registered layout, or `recipe`, the weights that the recipe's parts name,
            which is what a first stage does if None.
        train: prefixes of the parameters that are trained; everything else is frozen and in evaluation mode.
        optimizer: AdamW, with a cosine schedule to zero and gradients clipped at norm 1.
        warmup: Composer time, e.g. `0.03dur` or `100ba`.
        batch: samples of one step, over all ranks.
        microbatch: samples of one forward on one rank; all of the rank's if None.
        duration: Composer time, e.g. `1ep` or `500ba`; the learning rate is zero at its end.
        checkpoint: interval between checkpoints, Composer time.
        keep: how many of the newest checkpoints stay.
        loader: how the data are read.
        loss_jump: nats by which the loss of a step may exceed the largest of the 50 before it; more stops training, as
            does a loss that is not finite. Any if None.
        max_skipped_steps: steps in a row that are skipped, without changing weights, because a gradient is not finite;
            one more stops training.
        evaluation: a set that is scored and asked while the stage trains; none if None.
        packed: whether a recurrent language model reads a micro-batch in one row, without padding; else, and where
            samples are short and about equally long this is faster, one row per sample.
        sharding: over more than one rank.
        activation_checkpointing: whether the units that are sharded as one each, such as a block of the language model,
            keep only their inputs and compute their activations again in backward: less memory, a third more work.
        profile: whether a few steps of each epoch are profiled, into `traces/`.
        callbacks: Composer callbacks by class name, with their options.
        loggers: Composer loggers by class name, with their options; TensorBoard is always there.
    """

    data: DatasetPart
    init_from: str | None = None
    train: Annotated[list[str], Check("at least one prefix", bool)]
    optimizer: Optimizer
    warmup: Annotated[str, Check("a number and a unit (ba, ep, sp, tok, dur), e.g. 0.03dur", TIME.fullmatch)] = (
        "0.03dur"
    )
    batch: Count
    microbatch: Count | None = None
    duration: Duration
    checkpoint: Interval = "500ba"
    keep: Count = 2
    loader: Loader = field(default_factory=Loader)
    loss_jump: Annotated[float, Check("a number above 0", lambda jump: jump > 0)] | None = 2.0
    max_skipped_steps: Annotated[int, Check("a whole number, at least 0", lambda count: count >= 0)] = 0
    evaluation: StageEvaluation | None = None
    packed: bool = True
    sharding: Literal["fsdp2", "ddp"] = "fsdp2"
    activation_checkpointing: bool = False
    profile: bool = False
    callbacks: dict[str, Any] = field(default_factory=dict)
    loggers: dict[str, Any] = field(default_factory=dict)

    def processor(self, of_model: Processor) -> Processor:
        """The model's processor as this stage trains with it: the stage's own prompt, and its cut."""
        prompt = of_model.prompt if self.prompt is None else self.prompt()
        return replace(of_model, prompt=prompt, max_text_tokens=self.max_text_tokens)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A recipe, bound: everything a run needs.

    Args:
        run: name of the run folder in `runs/`.
        seed: of initial weights and of the order of samples.
        model: see `ModelParts`.
        stages: in their order; the key `order` of `stages:` may say another.
        stage: the only one that is trained now; all that are not finished if None.
        checkpoints: a folder, or one of a bucket, `s3://…`, where `<run>/<stage>` has them; in the run folder if None.
        evaluation: after the last stage; none if None.
    """

    run: Annotated[str, Check("a name of letters, digits, _ and -", NAME.fullmatch)]
    seed: Seed
    model: ModelParts
    stages: dict[str, Stage]
    stage: str | None = None
    checkpoints: (
        Annotated[str, Check("a folder, or the URL of one in a bucket, s3://BUCKET/FOLDER", _is_place)] | None
    ) = None
    evaluation: Evaluation | None = None


def stage_order(recipe: Recipe) -> list[str]:
    """Names of the stages in their order: the key `order` of `stages:` where there is one, else the recipe's own."""
    stages = recipe.data.get("stages")
    if not isinstance(stages, dict):
        return []
    named = [name for name in stages if name != "order"]
    order = stages.get("order", named)
    return list(order) if isinstance(order, list) and sorted(map(str, order)) == sorted(named) else named


def check(recipe: Recipe) -> tuple[Plan, list[str]]:
    """Find every mistake of a recipe without allocating a weight.

    Names and options are resolved first, over the whole recipe; then the model is built on `meta`, and the
    tokenizer is read if nothing must be fetched for it.

    Returns:
        The bound recipe, and notes: what could not be checked, and where stages train with other prompts.

    Raises:
        RecipeError: every problem found.
    """
    data = dict(recipe.data)
    problems: list[Problem] = []
    notes: list[str] = []
    if isinstance(data.get("stages"), dict):
        stages = {name: data["stages"][name] for name in stage_order(recipe)}
        if data["stages"].get("order", list(stages)) != list(stages):
            received = f"received {data['stages']['order']!r}, stages are {list(stages)}"
            problems.append(Problem("stages.order", f"must name each stage once: {received}"))
        for name, stage in stages.items():
            if isinstance(stage, dict):
                problems += check_composer(f"stages.{name}", stage, notes)
        data["stages"] = stages
    bound, found = bind(data, Plan, "")
    problems += found
    if problems:
        raise RecipeError(problems, recipe.source)
    plan: Plan = bound()
    if plan.stage not in (None, *plan.stages):
        near = nearest(str(plan.stage), plan.stages)
        problems.append(
            Problem("stage", f"{plan.stage!r} is no stage of this recipe, which has {list(plan.stages)}.{near}")
        )
    for name, stage_ in plan.stages.items():
        if not NAME.fullmatch(str(name)) or name in RESERVED:
            what = f"{name!r} cannot name a stage; write letters, digits, _ and -, but not {' or '.join(RESERVED)}"
            problems.append(Problem("stages", what))
        units = [re.sub(r"[\d.]", "", time) for time in (stage_.warmup, stage_.duration)]
        if units[0] not in ("dur", units[1]) and set(units) != {"ba", "ep"}:
            what = f"{stage_.warmup!r} must be in dur or in the unit of the duration, {stage_.duration!r}"
            problems.append(Problem(f"stages.{name}.warmup", what))
    model = build_model(recipe, device="meta")
    problems += _check_tokenizer(recipe, model, notes)
    asked = {"evaluation": plan.evaluation}
    asked |= {f"stages.{name}.evaluation": stage_.evaluation for name, stage_ in plan.stages.items()}
    for path, questions in asked.items():
        problems += _check_questions(f"{path}.data.streams", _streams(questions.data) if questions else {})
    for name, stage_ in plan.stages.items():
        problems += _check_prompt(f"stages.{name}.prompt", stage_.prompt)
        for stream, share in _streams(stage_.data).items():
            problems += _check_prompt(f"stages.{name}.data.streams.{stream}.prompt", share.prompt)
        problems += _check_prefixes(f"stages.{name}.train", stage_.train, model)
        problems += _check_prefixes(f"stages.{name}.optimizer.lr_of", stage_.optimizer.lr_of, model)
    if problems:
        raise RecipeError(problems, recipe.source)
    return plan, notes + prompts_of_stages(recipe)


def _check_tokenizer(recipe: Recipe, model: VisionLanguageModel, notes: list[str]) -> list[Problem]:
    """Whether it can be read and has the language model's number of ids, if it is on this machine."""
    name = str(recipe.data["model"]["tokenizer"])
    here = tokenizer_here(name)
    if here is None:
        notes.append(f"model.tokenizer: not checked, {name} is not in the hub's cache; training fetches it")
        return []
    try:
        build_processor(recipe, model, here)
    except (CheckpointError, ContractError) as error:
        return [Problem("model.tokenizer", str(error))]
    return []


def _streams(data: Any) -> dict[str, Share]:
    """Those of a mix; none of another data set."""
    return dict(data.options["streams"]) if data.factory is mix else {}


def _check_questions(path: str, streams: dict[str, Share]) -> list[Problem]:
    why = "an evaluation asks every record once, in the model's prompt; leave it out"
    return [
        Problem(f"{path}.{name}.{key}", why)
        for name, share in streams.items()
        for key in (*weights(share), *(["prompt"] if share.prompt else []))
    ]


def _check_prompt(path: str, prompt: Any) -> list[Problem]:
    if prompt is None:
        return []
    try:
        lacks_nothing(prompt(), prompt, Prompt)
    except Exception as error:  # a foreign component may raise anything
        return [Problem(path, f"{type(error).__name__}: {error}")]
    return []


def _check_prefixes(path: str, prefixes: Any, model: nn.Module) -> list[Problem]:
    names = [name for name, _ in model.named_parameters()]
    parts = {name.split(".")[0] for name in names} | {".".join(name.split(".")[:2]) for name in names}
    return [
        Problem(path, f"no parameter of the model is under {prefix!r}.{nearest(prefix, parts)}")
        for prefix in prefixes
        if not any(is_under(name, prefix) for name in names)
    ]


def stage_processor(recipe: Recipe, stage: str | None) -> tuple[Processor, str]:
    """The processor that a stage trains with, and what to call it.

    Raises:
        RecipeError: there is no such stage, or the recipe cannot be used.
        CheckpointError: the tokenizer is not there.
    """
    stages = dict(recipe.data.get("stages") or {})
    order = stages.pop("order", None) or list(stages)
    name = stage or (str(order[0]) if order else None)
    processor = build_processor(recipe, build_model(recipe, device="meta"))
    if name is None:
        return replace(processor, max_text_tokens=Reading.max_text_tokens), recipe.source
    if name not in stages:
        raise RecipeError([Problem("stages", f"there is no stage {name!r}.{nearest(name, stages)}")], recipe.source)
    node = {key: value for key, value in stages[name].items() if key in ("prompt", "max_text_tokens")}
    bound, problems = bind(node, Reading, f"stages.{name}")
    if problems:
        raise RecipeError(problems, recipe.source)
    reading: Reading = bound()
    prompt = processor.prompt if reading.prompt is None else reading.prompt()
    how = f"{recipe.data['run']}, stage {name},"
    return replace(processor, prompt=prompt, max_text_tokens=reading.max_text_tokens), how
