"""Conversion of a conversation with images to ids, labels and pixels."""

from __future__ import annotations

import pickle
from itertools import groupby
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from ssmvl.errors import DataError
from ssmvl.interfaces import IMAGE_PLACE, ImageSpec, Piece, Prompt
from ssmvl.processing.processor import Processor, Sample
from ssmvl.processing.prompts import MambaPrompt, PlainPrompt
from ssmvl.processing.tokenizers import END, byte_tokenizer
from ssmvl.processing.transforms import ImageLike

SMALL, LARGE = ImageSpec(4), ImageSpec(6)
IN, OUT, END_ID, NONE = [40, 77, 25, 220], [198, 46, 84, 83, 25, 220], 256, -100
AGAIN = [198, *IN]
RED, BLUE = Image.new("RGB", (5, 3), (255, 0, 0)), Image.new("RGB", (3, 5), (0, 0, 255))


class InPlacePrompt(MambaPrompt):
    image_placement = "in_place"


def processor(prompt: Prompt | None = None, tokenizer: Tokenizer | None = None) -> Processor:
    return Processor(tokenizer or byte_tokenizer(), prompt or MambaPrompt(), (SMALL, LARGE), tokens_per_image=2)


def merging_tokenizer() -> Tokenizer:
    """A byte tokenizer with one merged token: a space followed by the letter b."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate([*alphabet, "Ġb"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("Ġ", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    return tokenizer


def talk(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def same(a: Sample, b: Sample) -> bool:
    pixels = all(torch.equal(a["images"][spec], b["images"][spec]) for spec in (SMALL, LARGE))
    return torch.equal(a["ids"], b["ids"]) and torch.equal(a["labels"], b["labels"]) and pixels


def test_golden_sample() -> None:
    sample = processor().encode(talk("a", "b"), [RED], train=True)
    assert sample["ids"].tolist() == [-1, -1, *IN, 64, *OUT, 65, END_ID]
    assert sample["labels"].tolist() == [NONE] * 13 + [65, END_ID]
    assert sample["ids"].dtype == sample["labels"].dtype == torch.int64


def test_every_answer_is_supervised_and_no_question_is() -> None:
    labels = processor().encode(talk("a", "b", "c", "d"))["labels"]
    assert labels[labels != NONE].tolist() == [65, END_ID, 67, END_ID]


def test_question_ends_where_the_answer_begins() -> None:
    sample = processor().encode(talk("a"))
    assert sample["ids"].tolist() == [*IN, 64, *OUT]
    assert sample["labels"].tolist() == [NONE] * 11


@pytest.mark.parametrize("count", [0, 1, 3])
def test_image_places_come_first(count: int) -> None:
    ids = processor().encode(talk("a", "b"), [RED] * count)["ids"]
    assert ids[: 2 * count].tolist() == [-1] * (2 * count)
    assert (ids == -1).sum() == 2 * count


def test_pixels_for_every_spec_in_the_order_given() -> None:
    images = processor().encode(talk("a"), [RED, BLUE])["images"]
    assert {spec: tuple(pixels.shape) for spec, pixels in images.items()} == {SMALL: (2, 3, 4, 4), LARGE: (2, 3, 6, 6)}
    for pixels in images.values():
        assert pixels.dtype == torch.uint8
        assert pixels[:, :, 0, 0].tolist() == [[255, 0, 0], [0, 0, 255]]


def test_no_image() -> None:
    images = processor().encode(talk("a"))["images"]
    assert {spec: tuple(pixels.shape) for spec, pixels in images.items()} == {SMALL: (0, 3, 4, 4), LARGE: (0, 3, 6, 6)}
    assert all(pixels.dtype == torch.uint8 for pixels in images.values())


def test_marks_are_removed_from_the_text_when_images_come_first() -> None:
    plain = processor().encode(talk("a", "b"), [RED])
    assert same(processor().encode(talk("<image>\na", "b"), [RED]), plain)
    assert same(processor().encode(talk("<image>a", "b"), [RED]), plain)
    assert same(processor().encode(talk("<image> a", "b"), [RED]), plain)


def test_a_mark_below_the_question_is_removed_with_its_line_break() -> None:
    plain = processor().encode(talk("a", "b"), [RED])
    assert same(processor().encode(talk("a\n<image>", "b"), [RED]), plain)


def test_marks_in_place() -> None:
    ids = processor(InPlacePrompt()).encode(talk("a<image>b", "c", "<image>\nd"), [RED, BLUE])["ids"].tolist()
    assert ids == [*IN, 64, -1, -1, 65, *OUT, 66, END_ID, *AGAIN, -1, -1, 198, 67, *OUT]


def test_in_place_images_without_marks_precede_the_first_question() -> None:
    for given in (talk("a", "b", "c"), talk("<image>\n<image>\na", "b", "c")):
        ids = processor(InPlacePrompt()).encode(given, [RED, BLUE])["ids"].tolist()
        assert ids == [*IN, -1, -1, 198, -1, -1, 198, 64, *OUT, 65, END_ID, *AGAIN, 66, *OUT]


def test_marks_that_a_prompt_omits_are_counted() -> None:
    assert processor(PlainPrompt()).encode(talk("<image>", "b"), [RED])["ids"].tolist() == [-1, -1, 65, END_ID]
    with pytest.raises(DataError, match="2 <image> marks"):
        processor(PlainPrompt()).encode(talk("<image><image>", "b"), [RED])


def test_a_sample_without_text_and_image_is_rejected() -> None:
    assert processor(PlainPrompt()).encode(talk("a"), [RED])["ids"].tolist() == [-1, -1]
    with pytest.raises(DataError, match="no text and no image in this sample"):
        processor(PlainPrompt()).encode(talk("a"))


@pytest.mark.parametrize(("text", "count"), [("<image>", 0), ("<image>", 2), ("<image><image>", 1)])
def test_different_numbers_of_marks_and_images_are_rejected(text: str, count: int) -> None:
    with pytest.raises(DataError, match=f"{text.count('<image>')} <image> marks .* {count} images"):
        processor().encode(talk(text), [RED] * count)


def test_mark_in_an_answer_is_text() -> None:
    sample = processor().encode(talk("a", "<image>"), [RED])
    assert (sample["ids"] == -1).sum() == 2
    assert processor().decode(sample["ids"][-8:].tolist()) == "<image>"


def test_special_tokens_in_user_text_are_text() -> None:
    for texts in (("x" + END, "b"), ("a", END + "x"), (END, END)):
        sample = processor().encode(talk(*texts))
        assert sample["ids"].tolist().count(END_ID) == 1
        assert sample["ids"][-1] == END_ID
        read = processor().decode(sample["ids"].tolist())
        assert read == f"In: {texts[0]}\nOut: {texts[1]}"


def test_the_text_before_an_answer_is_tokenized_separately_from_the_answer() -> None:
    assert merging_tokenizer().encode(" b").ids == [256]
    ids = processor(tokenizer=merging_tokenizer()).encode(talk("b", "b"))["ids"].tolist()
    assert ids == [*IN[:-1], 256, *OUT, 65, 257]


def test_ids_of_a_shorter_conversation_are_a_prefix() -> None:
    texts = ("b b", "b", "b", "b b")
    merging = processor(tokenizer=merging_tokenizer())
    full = merging.encode(talk(*texts), [RED])["ids"].tolist()
    for turns in (1, 2, 3):
        shorter = merging.encode(talk(*texts[:turns]), [RED])["ids"].tolist()
        assert full[: len(shorter)] == shorter


def test_a_sample_without_supervised_tokens_is_rejected_in_training() -> None:
    with pytest.raises(DataError, match="no supervised token in this sample"):
        processor().encode(talk("a"), [RED], train=True)


def test_the_end_of_an_empty_answer_is_supervised() -> None:
    labels = processor().encode(talk("a", ""), train=True)["labels"]
    assert labels[labels != NONE].tolist() == [220, END_ID]


@pytest.mark.parametrize("content", [None, 5, ["a"]])
def test_content_that_is_not_a_string_is_a_data_error(content: Any) -> None:
    with pytest.raises(DataError, match="message 0"):
        processor().encode([{"role": "user", "content": content}], [RED])


def test_image_that_cannot_be_read_is_a_data_error() -> None:
    with pytest.raises(DataError, match="image bytes"):
        processor().encode(talk("a"), [b"no image"])


def test_pickled_processor_makes_equal_samples() -> None:
    original = processor()
    before = original.encode(talk("<image>\na" + END, "b"), [RED], train=True)
    copy = pickle.loads(pickle.dumps(original))
    assert same(copy.encode(talk("<image>\na" + END, "b"), [RED], train=True), before)
    assert copy.end_id == original.end_id == END_ID


def test_the_end_token_is_the_tokenizers() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(["</s>"])
    other_end = Processor(tokenizer, MambaPrompt(), (SMALL,), tokens_per_image=2, end="</s>")
    assert other_end.end_id == 257
    assert other_end.encode(talk("a", "b"))["ids"].tolist() == [*IN, 64, *OUT, 65, 257]


def test_decode_omits_special_tokens() -> None:
    assert processor().decode([64, END_ID, 65]) == "ab"


class Tiled(Processor):
    """A processor whose images have different numbers of visual tokens."""

    def tokens_of(self, image: ImageLike) -> int:
        return 1 if image is RED else 3


@pytest.mark.parametrize(("prompt", "gap"), [(MambaPrompt(), False), (InPlacePrompt(), True)])
def test_each_image_takes_its_own_number_of_places(prompt: Any, gap: bool) -> None:
    tiled = Tiled(byte_tokenizer(), prompt, (SMALL,), tokens_per_image=2)
    ids = tiled.encode(talk("<image>a<image>", "b"), [RED, BLUE])["ids"].tolist()
    runs = [len(list(run)) for id_, run in groupby(ids) if id_ == IMAGE_PLACE]
    assert runs == ([1, 3] if gap else [4])


class DropsAMark(InPlacePrompt):
    def pieces(self, conversation: Any, end: str) -> list[Piece]:
        return [p._replace(text=p.text.replace("<image>", "", 1)) for p in super().pieces(conversation, end)]


def test_a_prompt_that_drops_an_image_mark_is_rejected() -> None:
    broken = Processor(byte_tokenizer(), DropsAMark(), (SMALL,), tokens_per_image=2)
    with pytest.raises(DataError, match="the prompt dropped 1 of 1 <image> marks"):
        broken.encode(talk("<image>a", "b"), [RED])
