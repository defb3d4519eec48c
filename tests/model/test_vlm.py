"""VisionLanguageModel: packing, images, prefill and steps, and the memory of a long prompt."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

import ssmvl
from ssmvl.errors import ShapeError
from ssmvl.model import vlm
from ssmvl.model.build import build_processor
from ssmvl.model.vlm import VisionLanguageModel
from ssmvl.processing.batch import Batch, collate, pack, pad
from ssmvl.processing.processor import Processor
from ssmvl.processing.transforms import Image


@pytest.fixture(scope="module")
def model() -> VisionLanguageModel:
    return ssmvl.build_model("quickstart", weights="recipe")


@pytest.fixture(scope="module")
def processor(model: VisionLanguageModel) -> Processor:
    return build_processor(ssmvl.load_recipe("quickstart"), model)


def samples(processor: Processor, images: list[int]) -> list[dict[str, Any]]:
    """Return one sample for each number of images, with texts of different lengths."""
    encoded = []
    for i, count in enumerate(images):
        own = [Image.new("RGB", (48, 48), (40 * i, 90 * k, 200)) for k in range(count)]
        talk = [{"role": "user", "content": "q" * (3 * i)}, {"role": "assistant", "content": "a" * (i + 1)}]
        encoded.append(processor.encode(talk, own, train=True))
    return encoded


def batch(processor: Processor, images: list[int]) -> Batch:
    return collate(samples(processor, images))


def test_logits_are_computed_at_supervised_positions_only(model: VisionLanguageModel, processor: Processor) -> None:
    given = batch(processor, [1, 0, 2])
    assert model(**pad(given)).shape == (len(given["labels"]), model.language.vocab_rows)


def test_packed_and_padded_give_the_same_loss_and_gradient(model: VisionLanguageModel, processor: Processor) -> None:
    outputs = []
    for layout in (pad, pack):
        model.zero_grad()
        given = batch(processor, [1, 0, 2, 1])
        logits = model(**layout(given))
        torch.nn.functional.cross_entropy(logits, given["labels"]).backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        outputs.append((logits.detach(), gradients))
    torch.testing.assert_close(outputs[0][0], outputs[1][0], atol=1e-5, rtol=1e-4)
    assert outputs[0][1].keys() == outputs[1][1].keys()
    for name, gradient in outputs[0][1].items():
        torch.testing.assert_close(outputs[1][1][name], gradient, atol=1e-5, rtol=1e-3, msg=name)


def test_each_sample_sees_its_own_images(model: VisionLanguageModel, processor: Processor) -> None:
    together = model(**pack(batch(processor, [1, 2, 1])))
    changed = batch(processor, [1, 2, 1])
    (spec,) = changed["images"]
    changed["images"][spec][1] = 255 - changed["images"][spec][1]  # the second sample's first image
    differs = (model(**pack(changed)) - together).abs().amax(1) > 1e-4
    assert differs.tolist() == [False] * 2 + [True] * 3 + [False] * 4


def test_a_batch_without_images_gives_every_part_a_zero_gradient(
    model: VisionLanguageModel, processor: Processor
) -> None:
    model.zero_grad()
    model(**pack(batch(processor, [0, 0]))).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.connector.parameters())


def test_there_must_be_an_image_for_all_image_places(model: VisionLanguageModel, processor: Processor) -> None:
    inputs = pack(batch(processor, [1, 1]))
    (spec,) = inputs["images"]
    with pytest.raises(ShapeError, match="1 images of 9 visual tokens do not fill 18 image places"):
        model(**{**inputs, "images": {spec: inputs["images"][spec][:1]}})
    with pytest.raises(ShapeError, match="do not fill 18 image places"):
        model(**{**inputs, "images": {spec: inputs["images"][spec][:0]}})


MEMORY = """
import resource, sys, torch, ssmvl
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
narrow = ("model.language.num_layers=1", "model.language.width=256", "model.connector.num_layers=1")
model = ssmvl.build_model("quickstart", *narrow).eval()
visual, positions = torch.zeros(2, 9, 256), torch.arange(18)
@torch.no_grad()
def read(length):
    ids = torch.zeros(1, length, dtype=torch.long)
    return model.prefill(ids, torch.tensor([length]), visual, positions, model.language.new_state(1))
read(2048)
before = peak()
read(65536)
print((peak() - before) / (65536 * 256 * 4))
"""


def test_a_long_prompt_takes_less_memory_than_its_hidden_states() -> None:
    share = float(subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True).stdout)
    assert share < 0.2


@pytest.mark.parametrize("chunk", [1, 4, 10, 1024])
def test_prefill_and_steps_equal_forward(
    model: VisionLanguageModel, processor: Processor, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vlm, "CHUNK", chunk)
    whole_samples = samples(processor, [1, 0, 2])
    inputs, lengths = pad(collate(whole_samples)), torch.tensor([len(s["ids"]) for s in whole_samples])
    with torch.no_grad():
        state = model.language.new_state(3)
        visual = model.encode(inputs["images"])
        logits = model.prefill(inputs["ids"], lengths, visual, inputs["image_positions"], state)
        length = inputs["ids"].shape[1]
        ends = torch.arange(3) * length + lengths - 1
        whole = model(**{**inputs, "label_positions": ends})
        torch.testing.assert_close(logits, whole, atol=1e-5, rtol=1e-4)
        stepped = model.step(torch.tensor([1, 2, 3]), state)
        longer = [
            {**s, **{key: torch.cat([s[key], torch.tensor([i])]) for key in ("ids", "labels")}}
            for i, s in enumerate(whole_samples, 1)
        ]
        again = pad(collate(longer))
        ends = torch.arange(3) * again["ids"].shape[1] + lengths
        torch.testing.assert_close(stepped, model(**{**again, "label_positions": ends}), atol=1e-5, rtol=1e-4)


def test_shard_units_are_encoders_connector_layers_and_language_blocks(model: VisionLanguageModel) -> None:
    own = list(model.shard_units())
    units = {name for name, module in model.named_modules() if any(module is unit for unit in own)}
    assert units == {
        *(f"encoders.{name}" for name in ("fine", "coarse")),
        *(f"connector.layers.{i}" for i in range(2)),
        *(f"language.layers.{i}" for i in range(4)),
    }
