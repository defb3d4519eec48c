"""Any causal language model of transformers behind the contract of `ssmvl.interfaces.LanguageModel`."""

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
    """A causal language model of transformers. The recipe carries its architecture: nothing is fetched to build it.

    Args:
        config: the architecture's options as in its `config.json`: `{model_type: llama, hidden_size: 4096, …}`. What
            transformers does not read, as many such files hold, must be left out.
        num_tokens: ids of the tokenizer; checked against it when it is loaded. V is the config's `vocab_size`.
        weights: `none`, a checkpoint's file or folder, or its id in the hub; see `build_model`.

    Raises:
        ContractError: transformers has no such architecture or option, a value is of the wrong type, the architecture
            cannot keep the contract, or there are more tokens than rows of the vocabulary.
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
            ShapeError: segments are given: attention reads rows that are padded, not packed.
        """
        if segments is not None:
            raise ShapeError(f"{self._name} reads rows padded, not packed (recurrent is False); give no segments")
        read = body_of(self.model)(inputs_embeds=embeds, past_key_values=no_cache(), use_cache=False, return_dict=True)
        return read.last_hidden_state

    @torch.no_grad()
    def prefill(self, embeds: Tensor, lengths: Tensor, state: KeyValueState) -> Tensor:
        """Embeds (B, T, D) right-padded, lengths (B,) -> hidden (B, T, D), normed; advances `state`; no gradients.

        Raises:
            ShapeError: the state belongs to another model, or to other rows or another device, or lengths do not fit.
        """
        state.check(self._name, len(embeds), embeds.device)
        length = embeds.shape[1]
        check_rows("prefill", len(embeds), length, lengths, None, embeds.device)
        index = torch.arange(length, device=embeds.device)
        # Padding takes part nowhere: it comes after its row, its slots are dropped, and 0 cannot spread as NaN does.
        embeds = embeds.masked_fill((index >= lengths[:, None])[..., None], 0)
        positions = state.lengths[:, None] + torch.minimum(index, lengths[:, None] - 1)
        hidden = self._read(embeds, positions.clamp(min=0), state)
        state.advance(lengths, length - lengths)
        return hidden

    @torch.no_grad()
    def step(self, embeds: Tensor, state: KeyValueState) -> Tensor:
        """Embeds (B, D) -> hidden (B, D), normed; advances `state` in place; no gradients.

        Raises:
            ShapeError: the state belongs to another model, or to other rows or another device.
        """
        state.check(self._name, len(embeds), embeds.device)
        hidden = self._read(embeds[:, None], state.lengths[:, None].clone(), state)  # some models add to what they get
        state.lengths = state.lengths + 1
        return hidden[:, 0]

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden (*, D) -> logits (*, V)."""
        return self.model.get_output_embeddings()(hidden)

    def new_state(
        self, rows: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> KeyValueState:
        """A state of `rows` rows that has seen nothing, on the weights' device if None; its dtype is what is read."""
        from transformers import DynamicCache

        device = self.model.get_input_embeddings().weight.device if device is None else device
        return KeyValueState(self._name, DynamicCache(), torch.zeros(rows, dtype=torch.long, device=device))

    def to_transformers(self, end_id: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The model as transformers has it: its tensors by name, and its `config.json` with `end_id` as its end."""
        tensors = {name.removeprefix("model."): tensor for name, tensor in self.state_dict().items()}
        own = {"architectures": [type(self.model).__name__], "eos_token_id": end_id}
        return tensors, {**self.model.config.to_diff_dict(), **own}

    def shard_units(self) -> Sequence[nn.Module]:
        """Each decoder layer; never the embedding and the head, which may be one."""
        lists = [module for module in body_of(self.model).modules() if isinstance(module, nn.ModuleList)]
        return list(max(lists, key=lambda found: sum(p.numel() for p in found.parameters()), default=()))

    def _read(self, embeds: Tensor, positions: Tensor, state: KeyValueState) -> Tensor:
        slots, length = state.slots, embeds.shape[1]
        hidden: Tensor = body_of(self.model)(
            inputs_embeds=embeds,
            attention_mask=state.mask(length) if slots else None,  # causal: what is behind a row reaches none of it
            position_ids=positions,
            past_key_values=state.cache,
            use_cache=True,
            return_dict=True,
        ).last_hidden_state
        if state.slots != slots + length:
            raise ContractError(f"{self._name} keeps its keys and values elsewhere than in the cache it is given")
        return hidden

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CausalLM:
        """Rotary frequencies keep their dtype: `.to(torch.bfloat16)` would turn far positions by wrong angles."""
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
