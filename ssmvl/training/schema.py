"""The schema of a recipe: its `stages:`, what each trains, on what and how, and the run around them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from ssmvl.data.mix import Loader, Reading
from ssmvl.data.remote import is_remote
from ssmvl.evaluation.runner import Evaluation
from ssmvl.interfaces import Check, DatasetPart, Seed
from ssmvl.model.blueprint import ModelParts
from ssmvl.processing.processor import Processor
from ssmvl.training.optimizer import Optimizer


def _is_place(place: str) -> bool:
    return bool(re.match("s3://[^/]", place) if is_remote(place) else place)


TIME = re.compile(r"\d(\.\d+)?dur|\d{1,12}(ba|ep|sp|tok)")
INTERVAL = re.compile(r"0*[1-9]\d{0,8}(ba|ep|sp|tok|sec)")
NAME = re.compile(r"\w[\w-]{0,99}")
RESERVED = ("model", "tensorboard")  # what a run folder holds beside its stages
DURATION = re.compile(r"0*[1-9]\d{0,2}ep|0*[1-9]\d{0,11}(ba|sp|tok)")
Samples = Annotated[int, Check("from 1 to 10^6", lambda number: 1 <= number <= 10**6)]
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
    batch: Samples
    microbatch: Samples | None = None
    duration: Duration
    checkpoint: Interval = "500ba"
    keep: Samples = 2
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

    run: Annotated[str, Check("a name of letters, digits, _ and -, 100 at most", NAME.fullmatch)]
    seed: Seed
    model: ModelParts
    stages: dict[str, Stage]
    stage: str | None = None
    checkpoints: (
        Annotated[str, Check("a folder, or the URL of one in a bucket, s3://BUCKET/FOLDER", _is_place)] | None
    ) = None
    evaluation: Evaluation | None = None
