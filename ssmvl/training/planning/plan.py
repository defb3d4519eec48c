"""What a stage needs before it is run: memory of a GPU at the peak of a step, and the time of a step."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import cast

from torch import Tensor

from ssmvl.errors import ContractError, SsmvlError
from ssmvl.interfaces import LanguageModel
from ssmvl.model.costs import StepFlops
from ssmvl.model.vlm import VisionLanguageModel
from ssmvl.recipes.merge import Recipe
from ssmvl.training.activation_checkpointing import checkpoint_activations
from ssmvl.training.checked import Checked, check
from ssmvl.training.freezing import freeze_others, is_under
from ssmvl.training.planning.dry_run import WorstBatch, peaks
from ssmvl.training.planning.memory_ledger import GRADIENTS, LOGITS
from ssmvl.training.schema import Stage

MARGIN = 0.08  # of a GPU's memory: the CUDA context, cuBLAS' workspace, and holes between the allocator's blocks
CERTAIN = 1024  # positions from which memory grows evenly: fewer are one chunk of an SSD, or too few for tiles
PARAMETERS, OPTIMIZER, GATHERED, BUCKETS, STEP = (
    "parameters",
    "AdamW's two states",
    "gathered of shards",
    "DDP's buckets",
    "AdamW's step",
)


@dataclass(frozen=True)
class Setting:
    """What of a stage decides about memory.

    Attributes:
        gpus: ranks, each with a GPU.
        microbatch: samples of one forward on one rank.
        activation_checkpointing: whether units keep only their inputs.
        sharding: over several ranks.
    """

    gpus: int
    microbatch: int
    activation_checkpointing: bool
    sharding: str

    @property
    def shards(self) -> int:
        """Ranks that share what is needed once."""
        return self.gpus if self.sharding == "fsdp2" else 1


class StagePlan:
    """What one stage needs.

    Memory is that of the torch backend, in the worst case: each sample has one image and as much text as the stage
    allows, all of it supervised. The fused kernels of `mamba_ssm` keep less.

    Args:
        model: on `meta`; which of its parameters are trained is set whenever it is run.
        stage: the stage; its batch is a multiple of `gpus`.
        gpus: ranks, each with a GPU.
        on_gpu: fp32 weights under bf16 autocast; else fp32 on a CPU.
    """

    def __init__(self, model: VisionLanguageModel, stage: Stage, gpus: int, *, on_gpu: bool = True) -> None:
        self.stage, self.model, self._on_gpu = stage, model, on_gpu
        share = stage.batch // gpus
        microbatch = min(stage.microbatch or share, share)
        self.setting = Setting(gpus, microbatch, stage.activation_checkpointing, stage.sharding)
        self._packed = stage.packed and cast(LanguageModel, model.language).recurrent
        self._trained = {
            n: p for n, p in model.named_parameters() if any(is_under(n, prefix) for prefix in stage.train)
        }
        self._seen: dict[tuple[Setting, bool], list[Counter[str]]] = {}

    def memory(self, setting: Setting | None = None) -> Counter[str]:
        """Bytes of one GPU at the peak of a step, by kind; of the stage as it is if None."""
        setting = setting or self.setting
        shards, trained = setting.shards, list(self._trained.values())
        own = _bytes(trained, shards)
        held = Counter({PARAMETERS: _bytes(self.model.parameters(), shards) + _bytes(self.model.buffers())})
        held[OPTIMIZER] = 2 * own
        if setting.gpus > 1 and setting.sharding == "ddp":
            held[BUCKETS] = own
        # AdamW takes all parameters at once on a GPU, one after the other on a CPU.
        work = own if self._on_gpu else 2 * max(_bytes([p], shards) for p in trained)
        moments = self._passes(setting)
        # Composer keeps a micro-batch's logits until the next one's are there.
        rows = cast(LanguageModel, self.model.language).vocab_rows
        logits = setting.microbatch * self.stage.max_text_tokens * rows * (2 if self._on_gpu else 4)
        for moment in moments[:2] if setting.microbatch < self.stage.batch // setting.gpus else ():
            moment[LOGITS] += logits
        if shards > 1:
            forward, backward, frozen = self._gathered()
            for place, moment in enumerate(moments):
                moment[GATHERED] = forward if place < 2 else backward
            moments.append(Counter({GRADIENTS: own, GATHERED: frozen, LOGITS: logits}))
        moments.append(Counter({GRADIENTS: own, STEP: work, LOGITS: logits}))
        # What is negative lies between two moments, one of one sample and another of two.
        return held + max((m for m in moments if min(m.values(), default=0) >= 0), key=Counter.total)

    def largest(self, limit: float, setting: Setting | None = None) -> int:
        """All of a rank's samples, or the largest power of two, whose micro-batch needs no more bytes; 0 if none."""
        setting = setting or self.setting
        share = self.stage.batch // setting.gpus
        if self.memory(replace(setting, microbatch=share)).total() <= limit:
            return share
        best, size = 0, 1
        while size < share:
            if self.memory(replace(setting, microbatch=size)).total() > limit:
                break
            best, size = size, 2 * size
        return best

    def remedies(self, limit: float) -> Iterator[Setting]:
        """Settings that fit where the stage's does not, each with its largest micro-batch; fewer changes first."""
        here = self.setting
        tried = [here, replace(here, activation_checkpointing=True)]
        if here.gpus > 1:
            tried += [replace(setting, sharding="fsdp2") for setting in tried]
        found = False
        for setting in dict.fromkeys(tried):
            size = self.largest(limit, setting)
            if size:
                found = True
                yield replace(setting, microbatch=size)
        for setting in self._on_more() if not found else ():
            size = self.largest(limit, setting)
            if size:
                yield replace(setting, microbatch=size)
                return

    def least(self) -> tuple[int, int]:
        """The fewest bytes of a GPU that a sharded step can be made with, and on how many GPUs."""
        settings = [Setting(self.setting.gpus, 1, True, "fsdp2"), *self._on_more()]
        return min((self.memory(setting).total(), setting.gpus) for setting in settings)

    def _on_more(self) -> Iterator[Setting]:
        """Every larger number of GPUs that can share the batch."""
        for gpus in range(self.setting.gpus + 1, self.stage.batch + 1):
            if self.stage.batch % gpus == 0:
                yield Setting(gpus, 1, True, "fsdp2")

    def positions(self, text: int) -> int:
        """Of a step over all ranks, where each sample has one image and `text` tokens."""
        return self.stage.batch * (self.model.tokens_per_image + text)

    def flops(self, text: int) -> int:
        """Of a step over all ranks, where each sample has one image and `text` tokens, all of them supervised."""
        batch = self.stage.batch
        return _costs(self.model).where(self._trained).of(batch, self.positions(text), batch * text)

    def steps(self) -> int | None:
        """Of the whole stage, where its duration says so without the data."""
        count = int(re.sub(r"\D", "", self.stage.duration))
        return {"ba": count, "sp": -(-count // self.stage.batch)}.get(re.sub(r"\d", "", self.stage.duration))

    def _passes(self, setting: Setting) -> list[Counter[str]]:
        """The moments that `peaks` finds; of many samples by what the second half of fewer adds to the first."""
        few = -(-CERTAIN // (self.model.tokens_per_image + self.stage.max_text_tokens))
        again = setting.microbatch < self.stage.batch // setting.gpus
        if setting.microbatch <= few:
            return [moment.copy() for moment in self._run(setting, again)]
        halves = [self._run(replace(setting, microbatch=samples), again) for samples in (few, 2 * few)]
        more = setting.microbatch - few
        return [
            Counter({kind: one[kind] + more * (two[kind] - one[kind]) // few for kind in one | two})
            for one, two in zip(*halves, strict=True)
        ]

    def _run(self, setting: Setting, again: bool) -> list[Counter[str]]:
        if (setting, again) not in self._seen:
            batch = WorstBatch(setting.microbatch, self.stage.max_text_tokens, self._packed)
            with self.as_trained(setting.activation_checkpointing), _on_meta():
                found = peaks(self.model, batch, gpu=self._on_gpu, shards=setting.shards, again=again)
            self._seen[setting, again] = found
        return self._seen[setting, again]

    @contextmanager
    def as_trained(self, checkpointing: bool) -> Iterator[None]:
        """Freeze the model, and checkpoint its activations, as the stage does."""
        before = {parameter: parameter.requires_grad for parameter in self.model.parameters()}
        freeze_others(self.model, self.stage.train)
        if checkpointing:
            checkpoint_activations(self.model)
        try:
            yield
        finally:
            for parameter, requires_grad in before.items():  # the model belongs to everyone who asks for its shapes
                parameter.requires_grad_(requires_grad)
            for unit in self.model.shard_units() if checkpointing else ():
                del unit.forward

    def _gathered(self) -> tuple[int, int, int]:
        """Bytes of other ranks' shards: at the peaks of forward and backward, and while frozen encoders run.

        The root's parameters, those of no unit, stay throughout. Of the largest unit: its parameters and the buffer
        that the next one's arrive in; in backward also its gradients, and those on their way to other ranks.
        """
        trained = {*self._trained.values()}
        units = [{*unit.parameters()} for unit in self.model.shard_units()]
        frozen = [{*encoder.parameters()} for encoder in self.model.encoders.values()]
        passed = [unit for unit in units if unit & trained or unit not in frozen]
        root = {*self.model.parameters()}.difference(*units)
        largest = max(map(_bytes, passed))
        forward = _bytes(root) + 2 * largest
        backward = forward + _bytes(root & trained) + 2 * max(_bytes(unit & trained) for unit in passed)
        return forward, backward, _bytes(root) + 2 * max(map(_bytes, units))


@contextmanager
def _on_meta() -> Iterator[None]:
    try:
        yield
    except SsmvlError:
        raise
    except Exception as error:  # a foreign part may read values, which are not there
        raise ContractError(f"this model cannot be planned, it does not run on meta ({error})") from error


def stage_plans(recipe: str | Path | Recipe | Checked, gpus: int) -> dict[str, StagePlan]:
    """The plan of each stage, by name.

    Raises:
        RecipeError: the recipe has mistakes or no stage, or a batch cannot be shared by so many GPUs.
    """
    checked = check(recipe, weights=False)
    checked.require_shared_by(gpus, "GPUs")
    return {name: StagePlan(checked.model, stage, gpus) for name, stage in checked.plan.stages.items()}


@lru_cache(maxsize=1)
def _costs(model: VisionLanguageModel) -> StepFlops:
    """All stages of a recipe have the same model."""
    return StepFlops(model, ())


def _bytes(tensors: Iterable[Tensor], shards: int = 1) -> int:
    """Of one rank's part of each, cut along the first axis, the last rank's filled up."""
    return sum(-(-len(t) // shards) * t[:1].nbytes if t.ndim else t.nbytes for t in tensors)
