"""Schema of a recipe's `stages:` and of the run around them."""

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
from ssmvl.training.optimizer import Optimizer, Schedule


def _is_directory_or_url(text: str) -> bool:
    return bool(re.match("s3://[^/]", text) if is_remote(text) else text)


TIME = re.compile(r"\d(\.\d+)?dur|\d{1,12}(ba|ep|sp|tok)")
INTERVAL = re.compile(r"0*[1-9]\d{0,8}(ba|ep|sp|tok|sec)")
NAME = re.compile(r"\w[\w-]{0,99}")
RESERVED = ("model", "tensorboard")  # directories of a run folder that are not stages
DURATION = re.compile(r"0*[1-9]\d{0,2}ep|0*[1-9]\d{0,11}(ba|sp|tok)")
Samples = Annotated[int, Check("from 1 to 10^6", lambda number: 1 <= number <= 10**6)]
Duration = Annotated[str, Check("an integer and a unit (ba, ep, sp, tok), e.g. 1ep", DURATION.fullmatch)]
Interval = Annotated[str, Check("an integer and a unit (ba, ep, sp, tok, sec), e.g. 500ba", INTERVAL.fullmatch)]
Share = Annotated[str, Check("a number and a unit (ba, ep, sp, tok, dur), e.g. 0.03dur", TIME.fullmatch)]
Positive = Annotated[float, Check("a number above 0", lambda number: number > 0)]


@dataclass(frozen=True, kw_only=True)
class StageEvaluation(Evaluation):
    """An evaluation set that is scored and asked during training.

    Args:
        data: its `test` split is used.
        batch: questions per batch, on each rank.
        max_new_tokens: maximum length of an answer.
        interval: Composer time between evaluations; one more follows the last step.
    """

    interval: Interval = "1ep"


@dataclass(frozen=True, kw_only=True)
class Stage(Reading):
    """One stage of training. Its fields and those of `Reading` are the schema.

    Args:
        data: its `train` split is used.
        init_from: the model that the stage starts from: a saved directory, a Hub id, a checkpoint of a whole model in a
            registered layout, or `recipe` (the weights that the recipe's parts name). By default the previous stage's
            model, and `recipe` for the first stage.
        train: prefixes of the trained parameters; all others are frozen and in evaluation mode.
        optimizer: see `Optimizer`.
        schedule: `cosine` or `linear` to zero, `constant`, or `warmup-stable-decay`; see `rate_schedule`.
        warmup: Composer time of the linear warm-up, e.g. `0.03dur` or `100ba`.
        decay: Composer time of the final decay of `warmup-stable-decay`; by default a tenth of the stage.
        clip_norm: limit of the global gradient norm; no clipping if None.
        batch: samples per step, over all ranks.
        microbatch: samples per forward pass on one rank; all of the rank's if None.
        duration: Composer time, e.g. `1ep` or `500ba`. A finished stage resumes if it is raised.
        checkpoint: Composer time between checkpoints.
        keep: number of latest checkpoints to keep.
        loader: how the data are read.
        max_damaged: share of an epoch's samples that may be damaged; more stop training.
        loss_jump: nats by which a step's loss may exceed the largest of the previous 50; more stops training, as does a
            loss that is not finite. Unlimited if None.
        max_skipped_steps: consecutive steps that may be skipped, leaving the weights unchanged, because a gradient is
            not finite; one more stops training.
        evaluation: a set that is scored and asked during training; none if None.
        packed: whether a recurrent language model reads a micro-batch as one packed row without padding. One row per
            sample is faster where samples are short and of similar length.
        sharding: used with more than one rank.
        activation_checkpointing: whether each shard unit, such as a block of the language model, keeps only its inputs
            and recomputes its activations in backward: less memory, a third more computation.
        profile: whether a few steps of each epoch are profiled, into `traces/`.
        callbacks: Composer callbacks by class name, with their options.
        loggers: Composer loggers by class name, with their options, in addition to TensorBoard.
    """

    data: DatasetPart
    init_from: str | None = None
    train: Annotated[list[str], Check("at least one prefix", bool)]
    optimizer: Optimizer
    schedule: Schedule = "cosine"
    warmup: Share = "0.03dur"
    decay: Share | None = None
    clip_norm: Positive | None = 1.0
    batch: Samples
    microbatch: Samples | None = None
    duration: Duration
    checkpoint: Interval = "500ba"
    keep: Samples = 2
    loader: Loader = field(default_factory=Loader)
    max_damaged: Annotated[float, Check("from 0 to 1", lambda share: 0 <= share <= 1)] = 0.01
    loss_jump: Positive | None = 2.0
    max_skipped_steps: Annotated[int, Check("an integer, at least 0", lambda count: count >= 0)] = 0
    evaluation: StageEvaluation | None = None
    packed: bool = True
    sharding: Literal["fsdp2", "ddp"] = "fsdp2"
    activation_checkpointing: bool = False
    profile: bool = False
    callbacks: dict[str, Any] = field(default_factory=dict)
    loggers: dict[str, Any] = field(default_factory=dict)

    def processor(self, of_model: Processor) -> Processor:
        """The model's processor with this stage's prompt and `max_text_tokens`."""
        prompt = of_model.prompt if self.prompt is None else self.prompt()
        return replace(of_model, prompt=prompt, max_text_tokens=self.max_text_tokens)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A bound recipe: everything a run needs.

    Args:
        run: name of the run folder in `runs/`.
        seed: seed of initial weights and of the order of samples.
        model: see `ModelParts`.
        stages: in order of training, which the key `order` of `stages:` may override.
        stage: the only stage to train now; all unfinished ones if None.
        checkpoints: a directory or bucket URL (`s3://…`) under which `<run>/<stage>` holds checkpoints; the run folder
            if None.
        evaluation: follows the last stage; none if None.
    """

    run: Annotated[str, Check("a name of letters, digits, _ and -, 100 at most", NAME.fullmatch)]
    seed: Seed
    model: ModelParts
    stages: dict[str, Stage]
    stage: str | None = None
    checkpoints: Annotated[str, Check("a directory, or a bucket URL, s3://BUCKET/DIR", _is_directory_or_url)] | None = (
        None
    )
    evaluation: Evaluation | None = None
