from __future__ import annotations

import pytest
import torch

import ssmvl
from ssmvl.model.build import build_processor
from ssmvl.processing.batch import collate
from ssmvl.training.composer_model import ComposerVLM
from ssmvl.training.optimizer import Optimizer, make_optimizer

pytestmark = pytest.mark.filterwarnings("default")  # Composer warns at import


@pytest.fixture(scope="module")
def vlm() -> ComposerVLM:
    return ComposerVLM(ssmvl.build_model("quickstart"), ["connector"])


def test_untrained_parts_are_frozen_and_in_evaluation_mode(vlm: ComposerVLM) -> None:
    vlm.train()
    trained = {name.split(".")[1] for name, p in vlm.named_parameters() if p.requires_grad}
    assert trained == {"connector"}
    model = vlm.model
    assert (model.connector.training, model.language.training) == (True, False)
    assert not any(encoder.training for encoder in model.encoders.values())


def test_a_batch_without_supervised_tokens_contributes_zero(vlm: ComposerVLM) -> None:
    processor = build_processor(ssmvl.load_recipe("quickstart"), vlm.model)
    batch = collate([processor.encode([{"role": "user", "content": "hi"}])])
    outputs = vlm(batch)
    loss = vlm.loss(outputs, batch)
    assert loss.item() == 0
    loss.backward()
    gradients = [p.grad for p in vlm.model.connector.parameters()]
    assert all(g is not None and not g.any() for g in gradients)


@pytest.mark.parametrize(
    "overrides",
    [[], ["model.language.name=mamba1_lm", "model.language.width=128", "model.language.num_layers=2"]],
)
def test_vectors_have_no_weight_decay_and_prefixes_have_their_own_rate(overrides: list[str]) -> None:
    """A_log has no weight decay either, although it is a matrix in Mamba-1."""
    overrides += ["model.language.num_tokens=257"] if overrides else []
    vlm = ComposerVLM(ssmvl.build_model("quickstart", *overrides), ["connector", "language"])
    options = Optimizer(lr=1.0, lr_of={"language": 2.0}, weight_decay=0.1)
    names = {parameter: name for name, parameter in vlm.named_parameters()}
    seen = set()
    for group in make_optimizer(vlm, options).param_groups:
        for parameter in group["params"]:
            name = names[parameter]
            seen.add(name)
            assert group["lr"] == (2.0 if ".language." in name else 1.0)
            vector = name.endswith(
                ("A_log", ".D", "dt_bias", "bias", "norm.weight", "norm_f.weight", "projector.0.weight")
            )
            assert group["weight_decay"] == (0.0 if vector else 0.1), name
    assert seen == {name for name, p in vlm.named_parameters() if p.requires_grad}
    assert all(isinstance(p, torch.nn.Parameter) for p in names)
