"""A long text is cut at its end for training; image places and the first answer's tokens stay."""

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
    """Turns whose questions hold marks anywhere, and the number of images; sometimes images without marks."""
    words, marks, texts = st.text("ab é\n", max_size=8), 0, []
    for _ in range(draw(st.integers(1, 4))):
        here = draw(st.integers(0, 2))
        marks += here
        texts += ["<image>".join(draw(words) for _ in range(here + 1)), draw(words)]
    return talk(*texts), marks or draw(st.integers(0, 2))


@given(given_=conversations(), limit=st.integers(1, 120), prompt=st.sampled_from(sorted(PROMPTS)))
def test_what_is_left_is_the_sample_without_the_end_of_its_text(
    given_: tuple[list[dict[str, str]], int], limit: int, prompt: str
) -> None:
    conversation, images = given_
    made = processor(prompt)
    whole = made.encode(conversation, [RED] * images)
    text = [at for at, id_ in enumerate(whole["ids"].tolist()) if id_ != -1]
    gone = set(text[limit:])
    left = [at for at in range(len(whole["ids"])) if at not in gone]
    limited = replace(made, max_text_tokens=limit)
    if (whole["labels"][left][1:] == NONE).all():
        with pytest.raises(DataError, match="nothing to learn in this sample"):
            limited.encode(conversation, [RED] * images, train=True)
        return
    sample = limited.encode(conversation, [RED] * images, train=True)
    assert torch.equal(sample["ids"], whole["ids"][left])
    assert torch.equal(sample["labels"], whole["labels"][left])
    assert (sample["ids"] == -1).sum() == PLACES * images
    assert (sample["ids"] != -1).sum() == min(limit, len(text))
    supervised = sample["labels"] != NONE
    assert supervised[1:].any()
    assert torch.equal(sample["labels"][supervised], sample["ids"][supervised])
    assert len(sample["images"][ImageSpec(4)]) == images
    if not gone:
        assert torch.equal(sample["ids"], whole["ids"])
    read = limited.encode(conversation, [RED] * images)  # an answer to be scored, not trained on, is never cut
    assert torch.equal(read["ids"], whole["ids"])


@given(given_=conversations(), prompt=st.sampled_from(sorted(PROMPTS)))
def test_the_limit_at_which_a_sample_is_refused_is_named(given_: tuple[list[dict[str, str]], int], prompt: str) -> None:
    conversation, images = given_
    made = processor(prompt)
    whole = made.encode(conversation, [RED] * images)
    labels = whole["labels"].tolist()
    first = next((at for at in range(1, len(labels)) if labels[at] != NONE), None)
    if first is None:
        with pytest.raises(DataError, match="no supervised token"):
            replace(made, max_text_tokens=1).encode(conversation, [RED] * images, train=True)
        return
    before = list(accumulate(int(id_ != -1) for id_ in whole["ids"].tolist()))[first] - 1
    if before:
        with pytest.raises(DataError) as caught:
            replace(made, max_text_tokens=before).encode(conversation, [RED] * images, train=True)
        assert f"begins after {before} text tokens, and only {before} are read" in str(caught.value)
        assert "max_text_tokens" in str(caught.value)
    assert replace(made, max_text_tokens=before + 1).encode(conversation, [RED] * images, train=True)


def cut(prompt: str, limit: int, *texts: str, images: int = 0) -> tuple[str, int]:
    """The text that is left, with a ■ for each image place, and the number of supervised tokens."""
    sample = replace(processor(prompt), max_text_tokens=limit).encode(talk(*texts), [RED] * images, train=True)
    shown = "".join(processor().decode([id_]) if id_ >= 0 else "■" for id_ in sample["ids"].tolist())
    return shown, int((sample["labels"] != NONE).sum())


def test_golden_cut() -> None:
    assert cut("first", 13, "a", "bcd", images=1) == ("■■■In: a\nOut: bc", 2)


def test_places_behind_the_cut_stay() -> None:
    assert cut("in place", 13, "a", "bcd", "<image>e", "f", images=1) == ("In: a\nOut: bc■■■", 2)


def test_a_refused_sample_is_refused_before_its_images_are_decoded() -> None:
    with pytest.raises(DataError, match="begins after 11 text tokens, and only 5 are read"):
        replace(processor(), max_text_tokens=5).encode(talk("a", "b"), [b"no image"], train=True)
