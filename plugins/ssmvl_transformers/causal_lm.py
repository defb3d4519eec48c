"""Causal language models of transformers behind the contract of `ssmvl.interfaces.LanguageModel`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ssmvl.errors import ContractError, ShapeError
from ssmvl.interfaces import Count
from ssmvl.ops.checks import check_rows
from ssmvl_transformers.configuration import body_of, build_causal_lm
from ssmvl_transformers.state import KeyValueState, no_cache


class CausalLM(nn.Module):
    """A causal language model of transformers. Its architecture is in the recipe, so building it needs no download.

    Args:
        config: the architecture's options as in its `config.json`: `{model_type: llama, hidden_size: 4096, …}`. Omit
            keys that transformers does not read; many published files contain some.
        num_tokens: number of tokenizer ids; checked when the tokenizer is loaded. V is the config's `vocab_size`.
        weights: `none`, the file or directory of a checkpoint, or its Hub id; see `build_model`.

    Raises:
        ContractError: transformers does not know the architecture or an option, a value has the wrong type, the
            architecture cannot satisfy the contract, or there are more tokens than vocabulary rows.
        MissingDependencyError: transformers is not installed.

    Source: Vicuna-7B in MambaVLM-7B.
    """

    recurrent = False

    def __init__(self, *, config: dict[str, Any], num_tokens: Count, weights: str = "none") -> None:
        super().__init__()
        self.model = build_causal_lm(config)
        self.num_tokens, self.weights = num_tokens, weights
        self.width: int = self.model.get_input_embeddings().weight.shape[1]
        self.vocab_rows: int = self.model.get_output_embeddings().weight.shape[0]
        if num_tokens > self.vocab_rows:
            raise ContractError(f"num_tokens is {num_tokens}, but config.vocab_size is {self.vocab_rows}")
        kind, layers = self.model.config.model_type, len(self.shard_units())
        self._name = f"causal LM {kind}, width {self.width}, {layers} layers"

    def embed(self, ids: Tensor) -> Tensor:
        """Ids (B, T) -> (B, T, D)."""
        return self.model.get_input_embeddings()(ids)

    def backbone(self, embeds: Tensor, segments: Tensor | None = None) -> Tensor:
        """Embeds (B, T, D) -> hidden (B, T, D), normed.

        Raises:
            ShapeError: segments are given; attention models read padded rows, not packed ones.
        """
        if segments is not None:
            raise ShapeError(f"{self._name} reads padded rows, not packed ones (recurrent is False); omit segments")
        body = body_of(self.model)
        return body(
            inputs_embeds=embeds, past_key_values=no_cache(), use_cache=False, return_dict=True
        ).last_hidden_state

    @torch.no_grad()
    def prefill(self, embeds: Tensor, lengths: Tensor, state: KeyValueState) -> Tensor:
        """Embeds (B, T, D) right-padded, lengths (B,) -> hidden (B, T, D), normed; advances `state`; no gradients.

        Raises:
            ShapeError: the state is of another model, number of rows or device, or lengths do not fit.
        """
        state.check(self._name, len(embeds), embeds.device)
        length = embeds.shape[1]
        check_rows("prefill", len(embeds), length, lengths, None, embeds.device)
        index = torch.arange(length, device=embeds.device)
        # Padding affects nothing: it follows its row, its slots are dropped, and zeros do not spread like NaN.
        embeds = embeds.masked_fill((index >= lengths[:, None])[..., None], 0)
        positions = state.lengths[:, None] + torch.minimum(index, lengths[:, None] - 1)
        hidden = self._read(embeds, positions.clamp(min=0), state)
        state.advance(lengths, length - lengths)
        return hidden

    @torch.no_grad()
    def step(self, embeds: Tensor, state: KeyValueState) -> Tensor:
        """Embeds (B, D) -> hidden (B, D), normed; advances `state` in place; no gradients.

        Raises:
            ShapeError: the state is of another model, number of rows or device.
        """
        state.check(self._name, len(embeds), embeds.device)
        positions = state.lengths[:, None].clone()  # a copy, because some models modify their position ids in place
        hidden = self._read(embeds[:, None], positions, state)
        state.lengths = state.lengths + 1
        return hidden[:, 0]

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden (*, D) -> logits (*, V)."""
        return self.model.get_output_embeddings()(hidden)

    def new_state(
        self, rows: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> KeyValueState:
        """Initial state of `rows` rows, on the weights' device by default; keys and values have the input's dtype."""
        from transformers import DynamicCache

        device = self.model.get_input_embeddings().weight.device if device is None else device
        return KeyValueState(self._name, DynamicCache(), torch.zeros(rows, dtype=torch.long, device=device))

    def to_transformers(self, end_id: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The model in transformers' format: tensors by name, and the `config.json` with `end_id` as its EOS token."""
        tensors = {name.removeprefix("model."): tensor for name, tensor in self.state_dict().items()}
        own = {"architectures": [type(self.model).__name__], "eos_token_id": end_id}
        return tensors, {**self.model.config.to_diff_dict(), **own}

    def shard_units(self) -> Sequence[nn.Module]:
        """The decoder layers, without embedding and head, which may be tied."""
        lists = [module for module in body_of(self.model).modules() if isinstance(module, nn.ModuleList)]
        return list(max(lists, key=lambda layers: sum(p.numel() for p in layers.parameters()), default=()))

    def _read(self, embeds: Tensor, positions: Tensor, state: KeyValueState) -> Tensor:
        slots, length = state.slots, embeds.shape[1]
        hidden: Tensor = body_of(self.model)(
            inputs_embeds=embeds,
            attention_mask=state.mask(length) if slots else None,  # causality excludes the padding after a row
            position_ids=positions,
            past_key_values=state.cache,
            use_cache=True,
            return_dict=True,
        ).last_hidden_state
        if state.slots != slots + length:
            raise ContractError(f"{self._name} does not store its keys and values in the cache that it is given")
        return hidden

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CausalLM:
        """Keep the dtype of rotary frequencies: in bf16, distant positions would be rotated by wrong angles."""
        kept = [
            (module, name, buffer)
            for module in self.modules()
            for name, buffer in module.named_buffers(recurse=False)
            if name.endswith("inv_freq")
        ]
        super()._apply(fn, recurse)
        for module, name, before in kept:
            after = getattr(module, name)
            if after.dtype != before.dtype:
                setattr(module, name, before.to(after.device))
        return self
