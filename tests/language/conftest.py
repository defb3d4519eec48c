from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

from ssmvl.language.mamba_lm import Mamba1LM, MambaLM
from ssmvl.layers.mamba1 import Mamba1Mixer
from ssmvl.layers.mamba2 import Mamba2Mixer

MAMBA2 = partial(Mamba2Mixer, d_state=4, head_dim=4)
MODELS: dict[str, Callable[..., MambaLM]] = {
    "mamba2": partial(MambaLM, mixer=MAMBA2),
    "mamba2-groups": partial(MambaLM, mixer=partial(MAMBA2, num_groups=2, norm_groups=2, d_conv=3)),
    "mamba1": partial(Mamba1LM, mixer=partial(Mamba1Mixer, d_state=4)),
}


@pytest.fixture(scope="session", params=MODELS)
def lm(request: pytest.FixtureRequest) -> MambaLM:
    """Each language model, with width 8 and 2 layers; every parameter is perturbed so that each affects the result."""
    torch.manual_seed(0)
    model = MODELS[request.param](width=8, num_layers=2, num_tokens=20).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model
