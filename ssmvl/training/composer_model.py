"""The model as Composer trains it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from composer import Algorithm, Event, Logger, State
from composer.models import ComposerModel
from torch import Tensor
from torch.nn import functional as F

from ssmvl.interfaces import LanguageModel
from ssmvl.model.costs import StepFlops
from ssmvl.model.vlm import VisionLanguageModel
from ssmvl.processing.batch import Batch, pack, pad
from ssmvl.training.activation_checkpointing import checkpoint_activations
from ssmvl.training.freezing import freeze_others


class ComposerVLM(ComposerModel):
    """A VisionLanguageModel under Composer: ragged batches in, mean loss over supervised tokens out.

    Args:
        model: the model.
        train: prefixes of the parameters that are trained; everything else is frozen and in evaluation mode.
        packed: whether a recurrent language model reads a batch in one row.
        summed: number of ranks whose gradients are summed where Composer expects their mean. FSDP2 asks for the mean,
            but gloo gives the sum (pytorch#162338).
        checkpointing: whether each shard unit keeps only its inputs and computes its activations again in backward.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        train: list[str],
        packed: bool = True,
        summed: int = 1,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.summed = summed
        self.packed = packed and cast(LanguageModel, model.language).recurrent
        units = list(model.shard_units())
        # Composer asks the child of a ComposerModel which of its modules are sharded as one each.
        cast(Any, model).fsdp_wrap_fn = lambda module: any(module is unit for unit in units)
        freeze_others(model, train)
        if checkpointing:
            checkpoint_activations(model)

    def train(self, mode: bool = True) -> ComposerVLM:
        """Training mode for what is trained; a module whose parameters are all frozen stays in evaluation mode."""
        super().train(mode)
        for module in self.model.modules():
            parameters = list(module.parameters())
            if parameters and not any(p.requires_grad for p in parameters):
                module.eval()
        return self

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """A ragged batch -> {"logits": (n, V), "labels": (n,)}."""
        inputs = pack(batch) if self.packed else pad(batch)
        return {"logits": self.model(**inputs), "labels": batch["labels"]}

    def log_flops(self, flops: StepFlops) -> None:
        """Let Composer's SpeedMonitor, which looks for this attribute, log FLOP/s, and MFU where it knows the card."""
        self.flops_per_batch = lambda batch: flops.of(sum(batch["num_images"]), len(batch["ids"]), len(batch["labels"]))

    def loss(self, outputs: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """Mean over this micro-batch's supervised tokens; Composer weights micro-batches by their tokens."""
        total = F.cross_entropy(outputs["logits"].float(), outputs["labels"], reduction="sum")
        if self.summed > 1 and total.requires_grad:
            total.register_hook(lambda gradient: gradient / self.summed)
        return total / max(len(outputs["labels"]), 1)


class UnusedParameters(Algorithm):
    """Does nothing but tell DDP that trained parameters may lack a gradient: of a ViT, the layers behind its features.

    Composer asks algorithms alone.
    """

    find_unused_parameters = True

    def match(self, event: Event, state: State) -> bool:
        """Never."""
        return False

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Nothing."""
