"""Decoder-only language models built from recurrent mixers."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssmvl.errors import ContractError
from ssmvl.interfaces import Count, Depth, Mixer, MixerPart
from ssmvl.language.mamba_layouts import HF_LAYOUT, HF_MODELS
from ssmvl.language.state import RecurrentState
from ssmvl.layers.block import Block, scale_residual
from ssmvl.layers.linear import cast_for
from ssmvl.layers.mamba1 import Mamba1Mixer
from ssmvl.layers.mamba2 import Mamba2Mixer
from ssmvl.layers.norm import RMSNorm
from ssmvl.ops.checks import check_rows

__all__ = ["MambaLM", "Mamba1LM"]

PREFILL_CHUNK = 1024  # positions of a prefill that pass through the layers at once


class MambaLM(nn.Module):
    """Embedding, pre-norm residual blocks with the residual in fp32, final RMSNorm, head.

    Args:
        width: D.
        num_layers: number of blocks.
        num_tokens: number of token ids; compared with the tokenizer when that is loaded.
        mixer: the causal mixer of each block.
        vocab_multiple: the embedding has V rows, `num_tokens` rounded up to a multiple of this.
        tied: whether the head uses the embedding's weight.
        weights: `none`, a checkpoint's file or directory, or its Hub id; see `build_model`.

    Source: arXiv 2405.21060 and arXiv 2312.00752, the language models of both papers.
    """

    recurrent = True

    def __init__(
        self,
        *,
        width: Count,
        num_layers: Depth,
        num_tokens: Count,
        mixer: MixerPart = Mamba2Mixer,
        vocab_multiple: Count = 16,
        tied: bool = True,
        weights: str = "none",
    ) -> None:
        super().__init__()
        self.width, self.num_tokens, self.weights = width, num_tokens, weights
        self.vocab_rows = -(-num_tokens // vocab_multiple) * vocab_multiple
        self.embedding = nn.Embedding(self.vocab_rows, width)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)  # if tied, logits start near unit scale
        blocks = [
            Block(_require_decoding(mixer(width=width, num_paths=1)), norm=RMSNorm(width)) for _ in range(num_layers)
        ]
        scale_residual(blocks, num_layers)
        self.layers = nn.ModuleList(blocks)
        self.norm_f = RMSNorm(width)
        self.lm_head = None if tied else nn.Linear(width, self.vocab_rows, bias=False)

    def embed(self, ids: Tensor) -> Tensor:
        """Ids (B, T) -> (B, T, D)."""
        return self.embedding(ids)

    def backbone(self, embeds: Tensor, segments: Tensor | None = None) -> Tensor:
        """Embeds (B, T, D), segments (B, T) -> hidden (B, T, D), after the final norm."""
        x = _residual(embeds)
        for block in self.layers:
            x = block(x, None, segments)
        return self.norm_f(x)

    @torch.no_grad()
    def prefill(self, embeds: Tensor, lengths: Tensor, state: RecurrentState) -> Tensor:
        """Embeds (B, T, D) right-padded, lengths (B,) -> hidden (B, T, D), after the final norm.

        Advances `state` in place; no gradients.

        Raises:
            ShapeError: the state has another model, number of rows, dtype or device, or lengths do not fit.
        """
        state.check(self._name, len(embeds), self.embedding.weight)
        check_rows("prefill", embeds.shape[0], embeds.shape[1], lengths, None, embeds.device)
        hidden = embeds.new_empty(embeds.shape, dtype=self.norm_f.weight.dtype)
        # In chunks, each from the state of the previous one: apart from the result, memory does not grow with T.
        for start in range(0, max(embeds.shape[1], 1), PREFILL_CHUNK):
            x = _residual(embeds[:, start : start + PREFILL_CHUNK])
            rest = (lengths - start).clamp(0, x.shape[1])
            for block, layer in zip(self.layers, state.layers, strict=True):
                x = block.prefill(x, rest, layer)
            hidden[:, start : start + PREFILL_CHUNK] = self.norm_f(x)
        return hidden

    @torch.no_grad()
    def step(self, embeds: Tensor, state: RecurrentState) -> Tensor:
        """Embeds (B, D) -> hidden (B, D), after the final norm; advances `state` in place; no gradients.

        Raises:
            ShapeError: the state has another model, number of rows, dtype or device.
        """
        state.check(self._name, len(embeds), self.embedding.weight)
        x = _residual(embeds)
        for block, layer in zip(self.layers, state.layers, strict=True):
            x = block.step(x, layer)
        return self.norm_f(x)

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden (*, D) -> logits (*, V)."""
        if self.lm_head is not None:
            return self.lm_head(cast_for(hidden, self.lm_head))
        weight: Tensor = self.embedding.weight
        if type(self.embedding) is not nn.Embedding:  # an adapter of the embedding also changes the tied head
            weight = self.embedding(torch.arange(self.vocab_rows, device=hidden.device))
        return F.linear(hidden, weight)

    def new_state(
        self, rows: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> RecurrentState:
        """The initial state of `rows` rows; device and dtype default to those of the weights."""
        return RecurrentState(self._name, [b.mixer.new_state(rows, device, dtype) for b in self.layers])

    def to_transformers(self, end_id: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Convert to the format of transformers: the tensors by name, and the contents of `config.json`.

        Args:
            end_id: id of the end token.

        Raises:
            ContractError: transformers has no equivalent model; states the reason.
        """
        mixer = self.layers[0].mixer
        if not isinstance(mixer, Mamba1Mixer | Mamba2Mixer):
            raise ContractError(f"transformers has no language model with {type(mixer).__name__} mixers")
        config: dict[str, Any] = {
            "hidden_size": self.width,
            "num_hidden_layers": len(self.layers),
            "vocab_size": self.vocab_rows,
            "state_size": mixer.d_state,
            "expand": mixer.inner // self.width,
            "conv_kernel": mixer.conv1d.kernel_size[0],
            "layer_norm_epsilon": self.norm_f.eps,
            "tie_word_embeddings": self.lm_head is None,
            **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end_id),
        }
        if isinstance(mixer, Mamba2Mixer):
            if mixer.norm.groups != mixer.num_groups:
                raise ContractError(
                    "transformers' Mamba-2 normalizes each group separately from version 5 on: norm_groups must equal "
                    f"num_groups, which is {mixer.num_groups}, but is {mixer.norm.groups}"
                )
            if mixer.num_groups > 1:
                message = (
                    "transformers before version 5 normalizes the whole width, so its logits for this model differ"
                )
                warnings.warn(message, UserWarning, stacklevel=3)
            config |= {"model_type": "mamba2", "head_dim": mixer.head_dim, "num_heads": mixer.heads}
            config |= {"n_groups": mixer.num_groups, "time_step_limit": list(mixer.dt_limit)}
        else:
            config |= {"model_type": "mamba", "intermediate_size": mixer.inner, "time_step_rank": mixer.dt_rank}
        config["architectures"] = [HF_MODELS[config["model_type"]][1]]
        return {HF_LAYOUT.table([name])[name][0]: tensor for name, tensor in self.state_dict().items()}, config

    @functools.cached_property
    def _name(self) -> str:
        mixer = cast(Mixer, self.layers[0].mixer)
        sizes = [
            f"{name} {'x'.join(map(str, t.shape[1:]))}" for name, t in mixer.new_state(1, "meta")._asdict().items()
        ]
        return f"{type(mixer).__name__} LM, width {self.width}, {len(self.layers)} layers, {', '.join(sizes)}"

    def shard_units(self) -> Sequence[nn.Module]:
        """The blocks, without the embedding and the head, which may share one weight."""
        return list(self.layers)


class Mamba1LM(MambaLM):
    """A `MambaLM` with Mamba-1 mixers.

    Args:
        width: D.
        num_layers: number of blocks.
        num_tokens: number of token ids; compared with the tokenizer when that is loaded.
        mixer: the causal mixer of each block.
        vocab_multiple: the embedding has V rows, `num_tokens` rounded up to a multiple of this.
        tied: whether the head uses the embedding's weight.
        weights: `none`, a checkpoint's file or directory, or its Hub id; see `build_model`.
    """

    def __init__(
        self,
        *,
        width: Count,
        num_layers: Depth,
        num_tokens: Count,
        mixer: MixerPart = Mamba1Mixer,
        vocab_multiple: Count = 8,
        tied: bool = True,
        weights: str = "none",
    ) -> None:
        super().__init__(
            width=width,
            num_layers=num_layers,
            num_tokens=num_tokens,
            mixer=mixer,
            vocab_multiple=vocab_multiple,
            tied=tied,
            weights=weights,
        )


def _require_decoding(mixer: nn.Module) -> nn.Module:
    """Return the mixer if a language model can decode with it.

    Raises:
        ContractError: it lacks a method; without it the model would train but could not generate.
    """
    missing = [name for name in ("prefill", "step", "new_state") if not callable(getattr(mixer, name, None))]
    if missing:
        what = f"the mixer {type(mixer).__name__} lacks {', '.join(missing)}"
        raise ContractError(f"{what}, which a language model needs to generate; see ssmvl.interfaces.Mixer")
    return mixer


def _residual(embeds: Tensor) -> Tensor:
    return embeds.to(torch.promote_types(embeds.dtype, torch.float32))
