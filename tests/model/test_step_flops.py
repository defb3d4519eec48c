"""FLOPs of a training step, compared with counts by hand and with a real forward and backward."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import ssmvl
from ssmvl.interfaces import LanguageModel
from ssmvl.model.costs import StepFlops, autocast_on_meta, describe
from ssmvl.model.vlm import VisionLanguageModel
from ssmvl.training.freezing import is_under

LLAMA = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 352,
}
LANGUAGE = {
    "mamba1": ("model.language={name: mamba1_lm, width: 256, num_layers: 3, num_tokens: 339}",),
    "attention": (f"model.language={{name: causal_lm, num_tokens: 339, config: {LLAMA}}}".replace("'", ""),),
}
EVERYTHING = ["encoders", "connector", "language"]


def model(language: str) -> VisionLanguageModel:
    """Build a model on meta. Its MLP connector recomputes nothing in backward."""
    return ssmvl.build_model("quickstart", "model.connector=mlp", *LANGUAGE[language], device="meta")


def names(vlm: VisionLanguageModel, *prefixes: str) -> list[str]:
    return [name for name, _ in vlm.named_parameters() if any(is_under(name, prefix) for prefix in prefixes)]


def run(vlm: VisionLanguageModel, trained: list[str], samples: int, text: int) -> int:
    """Return the FLOPs that torch counts while running a step of `samples` rows."""
    for name, parameter in vlm.named_parameters():
        parameter.requires_grad_(name in trained)
    image_places = vlm.tokens_per_image
    counter = FlopCounterMode(display=False)
    with counter, torch.device("meta"), patch.object(torch, "autocast", autocast_on_meta):
        logits = vlm(
            ids=torch.zeros(samples, image_places + text, dtype=torch.int64),
            image_positions=torch.zeros(samples * image_places, dtype=torch.int64),
            label_positions=torch.zeros(samples * text, dtype=torch.int64),
            images={s: torch.zeros(samples, 3, s.size, s.size, dtype=torch.uint8) for s in vlm.image_specs},
        )
        F.cross_entropy(logits, torch.zeros(samples * text, dtype=torch.int64)).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("language", LANGUAGE)
@pytest.mark.parametrize(
    "train", [["connector"], ["connector", "language"], ["language"], EVERYTHING, ["encoders.fine"]], ids="+".join
)
@pytest.mark.parametrize(("samples", "text"), [(1, 300), (4, 50)])
def test_a_step_costs_what_torch_counts(language: str, train: list[str], samples: int, text: int) -> None:
    vlm = model(language)
    trained = names(vlm, *train)
    flops = StepFlops(vlm, trained).of(samples, samples * (vlm.tokens_per_image + text), samples * text)
    # The first trained layer has no gradient of its inputs; a Mamba-1 layer has products without weights.
    assert flops == pytest.approx(run(vlm, trained, samples, text), rel=0.05)


@pytest.mark.parametrize("language", LANGUAGE)
def test_a_step_that_trains_everything_costs_three_forwards(language: str) -> None:
    vlm, text = model(language), 247
    flops = StepFlops(vlm, names(vlm, *EVERYTHING))
    forward = sum(cost.flops for cost in describe(vlm, text))
    assert flops.of(1, vlm.tokens_per_image + text, text) == pytest.approx(3 * forward, rel=1e-3)


def test_the_cost_of_a_frozen_part_depends_on_its_position() -> None:
    """Before or in parallel to a trained part, one forward; behind it, two."""
    vlm, text = model("mamba1"), 247
    parts = {cost.name: cost.flops for cost in describe(vlm, text)}
    positions = vlm.tokens_per_image + text
    language = parts["language.layers"] + parts["language.head"]
    encoders = parts["encoders.fine"] + parts["encoders.coarse"]
    connector = StepFlops(vlm, names(vlm, "connector"))
    assert connector.of(1, positions, text) == pytest.approx(encoders + 3 * parts["connector"] + 2 * language, rel=1e-3)
    fine = connector.with_trained(names(vlm, "encoders.fine"))
    expected = 3 * parts["encoders.fine"] + parts["encoders.coarse"] + 2 * parts["connector"] + 2 * language
    assert fine.of(1, positions, text) == pytest.approx(expected, rel=0.02)  # some of its parameters have no products
    nothing = connector.with_trained([])
    assert nothing.of(1, positions, text) == pytest.approx(sum(parts.values()), rel=1e-3)
    assert connector.of(1, positions, text) > nothing.of(1, positions, text)


def test_only_supervised_positions_have_logits() -> None:
    vlm = model("mamba1")
    flops = StepFlops(vlm, names(vlm, *EVERYTHING))
    head = flops.of(2, 100, 30) - flops.of(2, 100, 20)
    assert head == 3 * 10 * 2 * vlm.language.width * vlm.language.vocab_rows
    assert flops.of(3, 100, 20) - flops.of(2, 100, 20) == pytest.approx(
        3 * sum(cost.flops for cost in describe(vlm) if not cost.name.startswith("language.")), rel=1e-9
    )


def test_attention_assumes_rows_of_equal_length_one_per_image() -> None:
    flops = {language: StepFlops(model(language), ()) for language in LANGUAGE}
    pairs = {language: [f.of(i, 4096, 0) - f.of(i, 0, 0) for i in (1, 2)] for language, f in flops.items()}
    assert pairs["mamba1"][0] == pairs["mamba1"][1]
    assert (
        pairs["attention"][0] - pairs["attention"][1]
        == 4096**2 // 2 * 4 * LLAMA["hidden_size"] * LLAMA["num_hidden_layers"]
    )
    assert flops["attention"].of(0, 4096, 0) == pairs["attention"][0]


def test_a_recurrent_model_costs_the_same_packed_or_in_rows() -> None:
    assert isinstance(model("mamba1").language, LanguageModel)
    flops = StepFlops(ssmvl.build_model("quickstart", device="meta"), ())
    assert flops.of(0, 2000, 0) == 2 * flops.of(0, 1000, 0)
