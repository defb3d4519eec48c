"""ComposerVLM: the form of the model that Composer trains."""

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
        packed: whether a batch is packed into one row, if the language model is recurrent.
        summed: number of ranks whose gradients are summed although Composer expects their mean. FSDP2 requests the
            mean, but gloo returns the sum (pytorch#162338).
        checkpointing: whether each shard unit keeps only its inputs and recomputes its activations in backward.
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
        # Composer reads this from the child of a ComposerModel: the modules that are sharded as one unit each.
        cast(Any, model).fsdp_wrap_fn = lambda module: any(module is unit for unit in units)
        freeze_others(model, train)
        if checkpointing:
            checkpoint_activations(model)

    def train(self, mode: bool = True) -> ComposerVLM:
        """Set training mode; modules whose parameters are all frozen stay in evaluation mode."""
        super().train(mode)
        for module in self.model.modules():
            parameters = list(module.parameters())
            if parameters and not any(p.requires_grad for p in parameters):
                module.eval()
        return self

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Ragged batch -> {"logits": (n, V), "labels": (n,)}."""
        inputs = pack(batch) if self.packed else pad(batch)
        return {"logits": self.model(**inputs), "labels": batch["labels"]}

    def log_flops(self, flops: StepFlops) -> None:
        """Let Composer's SpeedMonitor, which reads `flops_per_batch`, log FLOP/s, and MFU if it knows the GPU."""
        self.flops_per_batch = lambda batch: flops.of(sum(batch["num_images"]), len(batch["ids"]), len(batch["labels"]))

    def loss(self, outputs: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """Return the mean over this micro-batch's supervised tokens; Composer weights micro-batches by token count."""
        total = F.cross_entropy(outputs["logits"].float(), outputs["labels"], reduction="sum")
        if self.summed > 1 and total.requires_grad:
            total.register_hook(lambda gradient: gradient / self.summed)
        return total / max(len(outputs["labels"]), 1)


class UnusedParameters(Algorithm):
    """Only tells DDP that trained parameters may have no gradient: in a ViT, the layers after the features.

    It is an algorithm because Composer reads `find_unused_parameters` from algorithms only.
    """

    find_unused_parameters = True

    def match(self, event: Event, state: State) -> bool:
        """Return False: it never runs."""
        return False

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Do nothing."""
