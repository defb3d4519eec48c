"""Logits and states equal those of transformers' Mamba and Mamba-2 with the same weights."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial
from math import inf
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

from ssmvl.language.mamba_lm import Mamba1LM, MambaLM
from ssmvl.language.state import RecurrentState
from ssmvl.layers.mamba1 import Mamba1Mixer
from ssmvl.layers.mamba2 import Mamba2Mixer


@pytest.fixture(autouse=True)
def silent_transformers() -> Iterator[None]:
    """Silence the hint that a faster path could be installed."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(before)


@torch.no_grad()
def randomize(theirs: nn.Module) -> None:
    """Set values as after training; at initialization, channels are equal, biases are 0 and norms are 1."""
    for name, parameter in theirs.named_parameters():
        if name.endswith("A_log"):
            parameter.copy_(torch.empty_like(parameter).uniform_(0.5, 16).log())
        elif name.endswith(("dt_bias", "dt_proj.bias")):
            parameter.uniform_(-4, 1)
        elif name.endswith((".D", "norm.weight", "norm_f.weight")):
            parameter.normal_(1, 0.3)
        elif name.endswith("conv1d.bias"):
            parameter.normal_(0, 0.3)
        elif not name.endswith("conv1d.weight"):
            parameter.normal_(0, parameter.shape[-1] ** -0.5)


def copy_weights(theirs: nn.Module, ours: MambaLM) -> None:
    tensors = theirs.state_dict()
    del tensors["lm_head.weight"]  # tied
    names = {name: name.removeprefix("backbone.").replace("embeddings.", "embedding.") for name in tensors}
    ours.load_state_dict({names[name]: tensor for name, tensor in tensors.items()})


@torch.no_grad()
def assert_agree(theirs: nn.Module, ours: MambaLM, ids: Tensor) -> None:
    randomize(theirs)
    assert theirs.lm_head.weight is theirs.get_input_embeddings().weight
    copy_weights(theirs, ours)
    expected = theirs.eval()(ids, use_cache=True)
    state = ours.new_state(len(ids))
    hidden = ours.prefill(ours.embed(ids), torch.full((len(ids),), ids.shape[1]), state)
    assert expected.logits.std() > 0.1
    torch.testing.assert_close(ours.head(hidden), expected.logits, atol=1e-4, rtol=0)
    compare_states(state, expected.cache_params)


def compare_states(ours: RecurrentState, theirs: Any) -> None:
    for layer, conv, ssm in zip(ours.layers, theirs.conv_states, theirs.ssm_states, strict=True):
        torch.testing.assert_close(layer.conv, conv[:, :, 1:].transpose(1, 2), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(layer.ssm, ssm, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("num_groups", [1, 2])
@pytest.mark.parametrize("seed", range(8))
def test_mamba2(seed: int, num_groups: int) -> None:
    choose = random.Random(seed)
    head_dim, expand, size, taps = (choose.choice(c) for c in ((4, 8), (1, 2, 3), (5, 16), (2, 3, 4)))
    width, layers, chunk, tokens = 16 * choose.randint(1, 4), choose.randint(1, 3), choose.choice((8, 16)), 23
    limit = choose.choice([(0.0, inf), (0.05, 0.4), (0.0, 0.1)])
    config = Mamba2Config(
        hidden_size=width,
        num_hidden_layers=layers,
        vocab_size=tokens,
        head_dim=head_dim,
        num_heads=expand * width // head_dim,
        expand=expand,
        state_size=size,
        conv_kernel=taps,
        n_groups=num_groups,
        time_step_limit=limit,
        chunk_size=chunk,
        tie_word_embeddings=True,
    )
    mixer = partial(
        Mamba2Mixer,
        d_state=size,
        head_dim=head_dim,
        expand=expand,
        d_conv=taps,
        num_groups=num_groups,
        norm_groups=1,
        dt_limit=limit,
    )
    ours = MambaLM(width=width, num_layers=layers, num_tokens=tokens, mixer=mixer, vocab_multiple=1)
    length = chunk * choose.randint(1, 4) + choose.randint(1, chunk - 1)
    assert_agree(Mamba2ForCausalLM(config), ours, torch.randint(tokens, (2, length)))


@pytest.mark.parametrize("seed", range(8))
def test_mamba1(seed: int) -> None:
    choose = random.Random(seed)
    width, layers, tokens = choose.randint(2, 50), choose.randint(1, 3), 23
    expand, size, taps, rank = (choose.choice(c) for c in ((1, 2, 3), (5, 16), (2, 3, 4), (None, 3)))
    config = MambaConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        vocab_size=tokens,
        expand=expand,
        state_size=size,
        conv_kernel=taps,
        time_step_rank=rank or "auto",
    )
    mixer = partial(Mamba1Mixer, d_state=size, expand=expand, d_conv=taps, dt_rank=rank)
    ours = Mamba1LM(width=width, num_layers=layers, num_tokens=tokens, mixer=mixer, vocab_multiple=1)
    assert_agree(MambaForCausalLM(config), ours, torch.randint(tokens, (2, choose.randint(5, 60))))
