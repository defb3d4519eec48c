"""The model as Composer trains it, and its optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from composer import Algorithm, Event, Logger, State
from composer.models import ComposerModel
from torch import Tensor, nn
from torch.nn import functional as F

from ssmvl.anatomy import StepFlops
from ssmvl.batch import Batch, pack, pad
from ssmvl.interfaces import LanguageModel
from ssmvl.training.preparing import checkpoint_activations, freeze_others
from ssmvl.training.stages import Optimizer, is_under
from ssmvl.vlm import VisionLanguageModel


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
        return {"logits": self.model(**inputs), "labels": inputs["labels"]}

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


def adamw(model: nn.Module, options: Optimizer) -> torch.optim.AdamW:
    """AdamW over the trained parameters; A_log, D, dt_bias, norms and biases without weight decay."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            prefixes = [prefix for prefix in options.lr_of if is_under(name.removeprefix("model."), prefix)]
            lr = options.lr_of[max(prefixes, key=len)] if prefixes else options.lr
            decay = options.weight_decay if parameter.ndim > 1 and not name.endswith(".A_log") else 0.0
            groups.setdefault((lr, decay), []).append(parameter)
    listed: list[dict[str, Any]] = [{"params": p, "lr": lr, "weight_decay": d} for (lr, d), p in groups.items()]
    return torch.optim.AdamW(listed, lr=options.lr, betas=options.betas)
