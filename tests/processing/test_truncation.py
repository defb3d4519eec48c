"""Truncation of training samples: the end of the text is cut, image places stay."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ssmvl.errors import DataError
from ssmvl.interfaces import ImageSpec
from ssmvl.processing.processor import Processor
from ssmvl.processing.prompts import MambaPrompt, PlainPrompt, VicunaPrompt
from ssmvl.processing.tokenizers import byte_tokenizer

PLACES, NONE = 3, -100
RED = Image.new("RGB", (4, 4), (255, 0, 0))


class InPlacePrompt(MambaPrompt):
    image_placement = "in_place"


PROMPTS = {"first": MambaPrompt(), "in place": InPlacePrompt(), "plain": PlainPrompt(), "vicuna": VicunaPrompt()}


def processor(prompt: str = "first") -> Processor:
    return Processor(byte_tokenizer(), PROMPTS[prompt], (ImageSpec(4),), tokens_per_image=PLACES)


def talk(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


@st.composite
def conversations(draw: st.DrawFn) -> tuple[list[dict[str, str]], int]:
    """Conversations with image marks anywhere in the questions, and the number of images; some without marks."""
    words, marks, texts = st.text("ab é\n", max_size=8), 0, []
    for _ in range(draw(st.integers(1, 4))):
        count = draw(st.integers(0, 2))
        marks += count
        texts += ["<image>".join(draw(words) for _ in range(count + 1)), draw(words)]
    return talk(*texts), marks or draw(st.integers(0, 2))


@given(given_=conversations(), limit=st.integers(1, 120), prompt=st.sampled_from(sorted(PROMPTS)))
def test_truncation_removes_only_the_end_of_the_text(
    given_: tuple[list[dict[str, str]], int], limit: int, prompt: str
) -> None:
    conversation, images = given_
    unlimited = processor(prompt)
    full = unlimited.encode(conversation, [RED] * images)
    text = [position for position, id_ in enumerate(full["ids"].tolist()) if id_ != -1]
    removed = set(text[limit:])
    kept = [position for position in range(len(full["ids"])) if position not in removed]
    limited = replace(unlimited, max_text_tokens=limit)
    if (full["labels"][kept][1:] == NONE).all():
        with pytest.raises(DataError, match="no supervised token in this sample"):
            limited.encode(conversation, [RED] * images, train=True)
        return
    sample = limited.encode(conversation, [RED] * images, train=True)
    assert torch.equal(sample["ids"], full["ids"][kept])
    assert torch.equal(sample["labels"], full["labels"][kept])
    assert (sample["ids"] == -1).sum() == PLACES * images
    assert (sample["ids"] != -1).sum() == min(limit, len(text))
    supervised = sample["labels"] != NONE
    assert supervised[1:].any()
    assert torch.equal(sample["labels"][supervised], sample["ids"][supervised])
    assert len(sample["images"][ImageSpec(4)]) == images
    if not removed:
        assert torch.equal(sample["ids"], full["ids"])
    evaluated = limited.encode(conversation, [RED] * images)  # only training samples are truncated
    assert torch.equal(evaluated["ids"], full["ids"])


@given(given_=conversations(), prompt=st.sampled_from(sorted(PROMPTS)))
def test_a_limit_that_is_too_small_is_named(given_: tuple[list[dict[str, str]], int], prompt: str) -> None:
    conversation, images = given_
    unlimited = processor(prompt)
    full = unlimited.encode(conversation, [RED] * images)
    labels = full["labels"].tolist()
    first = next((position for position in range(1, len(labels)) if labels[position] != NONE), None)
    if first is None:
        with pytest.raises(DataError, match="no supervised token"):
            replace(unlimited, max_text_tokens=1).encode(conversation, [RED] * images, train=True)
        return
    before = list(accumulate(int(id_ != -1) for id_ in full["ids"].tolist()))[first] - 1
    if before:
        with pytest.raises(DataError) as caught:
            replace(unlimited, max_text_tokens=before).encode(conversation, [RED] * images, train=True)
        assert f"begins after {before} text tokens, but only {before} are read" in str(caught.value)
        assert "max_text_tokens" in str(caught.value)
    assert replace(unlimited, max_text_tokens=before + 1).encode(conversation, [RED] * images, train=True)


def cut(prompt: str, limit: int, *texts: str, images: int = 0) -> tuple[str, int]:
    """The truncated text, with a ■ for each image place, and the number of supervised tokens."""
    sample = replace(processor(prompt), max_text_tokens=limit).encode(talk(*texts), [RED] * images, train=True)
    shown = "".join(processor().decode([id_]) if id_ >= 0 else "■" for id_ in sample["ids"].tolist())
    return shown, int((sample["labels"] != NONE).sum())


def test_golden_truncation() -> None:
    assert cut("first", 13, "a", "bcd", images=1) == ("■■■In: a\nOut: bc", 2)


def test_image_places_after_the_limit_stay() -> None:
    assert cut("in place", 13, "a", "bcd", "<image>e", "f", images=1) == ("In: a\nOut: bc■■■", 2)


def test_a_sample_is_rejected_before_its_images_are_decoded() -> None:
    with pytest.raises(DataError, match="begins after 11 text tokens, but only 5 are read"):
        replace(processor(), max_text_tokens=5).encode(talk("a", "b"), [b"no image"], train=True)
