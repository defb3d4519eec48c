"""Plan of a stage: memory of one GPU at the peak of a step, and time of a step."""

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
from ssmvl.training.optimizer import state_of
from ssmvl.training.planning.dry_run import WorstBatch, peaks
from ssmvl.training.planning.memory_ledger import GRADIENTS, LOGITS
from ssmvl.training.schema import Stage

MARGIN = 0.08  # share of a GPU's memory for the CUDA context, cuBLAS workspace and allocator fragmentation
LINEAR_FROM = 1024  # positions from which memory grows linearly: fewer fit in one SSD chunk, or do not fill tiles
PARAMETERS, OPTIMIZER, GATHERED, BUCKETS, STEP = (
    "parameters",
    "optimizer states",
    "gathered shards",
    "DDP buckets",
    "optimizer step",
)


@dataclass(frozen=True)
class Setting:
    """The settings of a stage that determine its memory.

    Attributes:
        gpus: number of ranks, each with one GPU.
        microbatch: samples of one forward pass on one rank.
        activation_checkpointing: whether shard units keep only their inputs.
        sharding: `fsdp2` or `ddp`; applies with several ranks.
    """

    gpus: int
    microbatch: int
    activation_checkpointing: bool
    sharding: str

    @property
    def shards(self) -> int:
        """Number of ranks across which parameters, gradients and optimizer states are sharded."""
        return self.gpus if self.sharding == "fsdp2" else 1


class StagePlan:
    """Memory and time of one stage.

    Memory is that of the torch backend in the worst case: each sample has one image and as much text as the stage
    allows, all of it supervised. The fused kernels of `mamba_ssm` keep less.

    Args:
        model: the model on `meta`; its trained parameters are set each time it is run.
        stage: the stage; its batch is a multiple of `gpus`.
        gpus: number of ranks, each with one GPU.
        on_gpu: True for fp32 weights under bf16 autocast on a GPU, False for fp32 on a CPU.
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
        self._state = [tensor for p in self._trained.values() for tensor in state_of(stage.optimizer, p)]
        self._moments: dict[tuple[Setting, bool], list[Counter[str]]] = {}

    def memory(self, setting: Setting | None = None) -> Counter[str]:
        """Return the bytes on one GPU at the peak of a step, by kind; for the stage's own setting if None."""
        setting = setting or self.setting
        shards, trained = setting.shards, list(self._trained.values())
        own = _bytes(trained, shards)
        held = Counter({PARAMETERS: _bytes(self.model.parameters(), shards) + _bytes(self.model.buffers())})
        held[OPTIMIZER] = _bytes(self._state, shards)
        if setting.gpus > 1 and setting.sharding == "ddp":
            held[BUCKETS] = own
        # AdamW updates all parameters at once on a GPU, one by one on a CPU.
        work = own if self._on_gpu else 2 * max(_bytes([p], shards) for p in trained)
        moments = self._passes(setting)
        # Composer keeps a micro-batch's logits until those of the next exist.
        rows = cast(LanguageModel, self.model.language).vocab_rows
        logits = setting.microbatch * self.stage.max_text_tokens * rows * (2 if self._on_gpu else 4)
        for moment in moments[:2] if setting.microbatch < self.stage.batch // setting.gpus else ():
            moment[LOGITS] += logits
        if shards > 1:
            forward, backward, frozen = self._gathered()
            for index, moment in enumerate(moments):
                moment[GATHERED] = forward if index < 2 else backward
            moments.append(Counter({GRADIENTS: own, GATHERED: frozen, LOGITS: logits}))
        moments.append(Counter({GRADIENTS: own, STEP: work, LOGITS: logits}))
        # A negative count comes from extrapolating between two runs whose peaks are at different moments: skip it.
        return held + max((m for m in moments if min(m.values(), default=0) >= 0), key=Counter.total)

    def largest(self, limit: float, setting: Setting | None = None) -> int:
        """Return the largest micro-batch within `limit` bytes: all of a rank's samples or a power of two; 0 if none."""
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
        """Yield settings that fit if the stage's own does not, with their largest micro-batch; fewest changes first."""
        current = self.setting
        candidates = [current, replace(current, activation_checkpointing=True)]
        if current.gpus > 1:
            candidates += [replace(setting, sharding="fsdp2") for setting in candidates]
        any_fits = False
        for setting in dict.fromkeys(candidates):
            size = self.largest(limit, setting)
            if size:
                any_fits = True
                yield replace(setting, microbatch=size)
        for setting in self._with_more_gpus() if not any_fits else ():
            size = self.largest(limit, setting)
            if size:
                yield replace(setting, microbatch=size)
                return

    def least(self) -> tuple[int, int]:
        """Return the fewest bytes per GPU with which a sharded step is possible, and the number of GPUs it takes."""
        settings = [Setting(self.setting.gpus, 1, True, "fsdp2"), *self._with_more_gpus()]
        return min((self.memory(setting).total(), setting.gpus) for setting in settings)

    def _with_more_gpus(self) -> Iterator[Setting]:
        """Yield a setting for every larger number of GPUs that splits the batch evenly."""
        for gpus in range(self.setting.gpus + 1, self.stage.batch + 1):
            if self.stage.batch % gpus == 0:
                yield Setting(gpus, 1, True, "fsdp2")

    def positions(self, text: int) -> int:
        """Return the positions of a step over all ranks, if each sample has one image and `text` text tokens."""
        return self.stage.batch * (self.model.tokens_per_image + text)

    def flops(self, text: int) -> int:
        """Return the FLOPs of a step over all ranks, if each sample has one image and `text` supervised text tokens."""
        batch = self.stage.batch
        return _costs(self.model).with_trained(self._trained).of(batch, self.positions(text), batch * text)

    def steps(self) -> int | None:
        """Return the steps of the whole stage; None if they depend on the data."""
        count = int(re.sub(r"\D", "", self.stage.duration))
        return {"ba": count, "sp": -(-count // self.stage.batch)}.get(re.sub(r"\d", "", self.stage.duration))

    def _passes(self, setting: Setting) -> list[Counter[str]]:
        """Return the moments of `peaks`; for many samples, extrapolated from two runs with fewer."""
        few = -(-LINEAR_FROM // (self.model.tokens_per_image + self.stage.max_text_tokens))
        again = setting.microbatch < self.stage.batch // setting.gpus
        if setting.microbatch <= few:
            return [moment.copy() for moment in self._run(setting, again)]
        runs = [self._run(replace(setting, microbatch=samples), again) for samples in (few, 2 * few)]
        extra = setting.microbatch - few
        return [
            Counter({kind: one[kind] + extra * (two[kind] - one[kind]) // few for kind in one | two})
            for one, two in zip(*runs, strict=True)
        ]

    def _run(self, setting: Setting, again: bool) -> list[Counter[str]]:
        if (setting, again) not in self._moments:
            batch = WorstBatch(setting.microbatch, self.stage.max_text_tokens, self._packed)
            with self.as_trained(setting.activation_checkpointing), _on_meta():
                moments = peaks(self.model, batch, gpu=self._on_gpu, shards=setting.shards, again=again)
            self._moments[setting, again] = moments
        return self._moments[setting, again]

    @contextmanager
    def as_trained(self, checkpointing: bool) -> Iterator[None]:
        """Freeze the model and checkpoint its activations as in the stage, and undo both on exit."""
        before = {parameter: parameter.requires_grad for parameter in self.model.parameters()}
        freeze_others(self.model, self.stage.train)
        if checkpointing:
            checkpoint_activations(self.model)
        try:
            yield
        finally:
            for parameter, requires_grad in before.items():  # other code reads the same model
                parameter.requires_grad_(requires_grad)
            for unit in self.model.shard_units() if checkpointing else ():
                del unit.forward

    def _gathered(self) -> tuple[int, int, int]:
        """Return bytes gathered from other ranks: at the peaks of forward and backward, and while frozen encoders run.

        The root's parameters, which belong to no unit, stay gathered throughout. The largest unit adds its parameters
        and the buffer for the next unit's; in backward also its gradients and those being sent to other ranks.
        """
        trained = {*self._trained.values()}
        units = [{*unit.parameters()} for unit in self.model.shard_units()]
        frozen = [{*encoder.parameters()} for encoder in self.model.encoders.values()]
        active = [unit for unit in units if unit & trained or unit not in frozen]
        root = {*self.model.parameters()}.difference(*units)
        largest = max(map(_bytes, active))
        forward = _bytes(root) + 2 * largest
        backward = forward + _bytes(root & trained) + 2 * max(_bytes(unit & trained) for unit in active)
        return forward, backward, _bytes(root) + 2 * max(map(_bytes, units))


@contextmanager
def _on_meta() -> Iterator[None]:
    try:
        yield
    except SsmvlError:
        raise
    except Exception as error:  # third-party code may read values, which meta tensors do not have
        raise ContractError(f"this model cannot be planned because it does not run on meta ({error})") from error


def stage_plans(recipe: str | Path | Recipe | Checked, gpus: int) -> dict[str, StagePlan]:
    """Return the plan of each stage, by name.

    Raises:
        RecipeError: the recipe has mistakes or no stage, or a batch cannot be split evenly across the GPUs.
    """
    checked = check(recipe, weights=False)
    checked.require_shared_by(gpus, "GPUs")
    return {name: StagePlan(checked.model, stage, gpus) for name, stage in checked.plan.stages.items()}


@lru_cache(maxsize=1)
def _costs(model: VisionLanguageModel) -> StepFlops:
    """Return the costs of a model, cached because all stages of a recipe share it."""
    return StepFlops(model, ())


def _bytes(tensors: Iterable[Tensor], shards: int = 1) -> int:
    """Return the bytes of one rank's shard of each tensor: split along the first axis, the last shard padded."""
    return sum(-(-len(t) // shards) * t[:1].nbytes if t.ndim else t.nbytes for t in tensors)
