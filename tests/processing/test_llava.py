"""The `vicuna` prompt with a LLaMA-like tokenizer gives the ids of LLaVA-1.5."""

from __future__ import annotations

import itertools

import pytest
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from ssmvl.interfaces import IGNORED, ImageSpec
from ssmvl.processing.processor import Processor
from ssmvl.processing.prompts import VICUNA_SYSTEM, VicunaPrompt

IMAGE = Image.new("RGB", (8, 8))
TALKS = [
    ["<image>\nWhat is this?", "A cat."],
    ["<image>\nWhat is this?"],
    ["What is this?\n<image>", "A cat."],
    ["What is <image> this?", "A cat.", "Where?", "On a mat."],
    ["<image>", "A cat.", "<image>\nWhere is this?", "On a mat.", "What is this?<image>"],
    ["<image>\n<image>\nWhat is this?", "A cat."],
    ["<image><image> What", "A cat."],
    ["What is this?", "A cat.", "Where is  this?", "On a mat."],
    ["  What is\n this?", " A cat."],
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """A tokenizer of characters, runs of spaces, and every word of `TALKS` with the space before it."""
    texts = [VICUNA_SYSTEM, "USER: ASSISTANT:", *itertools.chain(*TALKS)]
    words = {f"▁{word}" for text in texts for word in text.replace("<image>", " ").split()}
    merges = {("▁", "▁"): None} | {(word[:i], word[i]): None for word in sorted(words) for i in range(1, len(word))}
    characters = sorted({character for text in texts for character in text} | {"▁"})
    tokens = ["<unk>", "<s>", "</s>", *characters, *("".join(pair) for pair in merges)]
    vocab = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=list(merges), unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    return tokenizer


def llava(tokenizer: Tokenizer, texts: list[str], places: int) -> list[int]:
    """LLaVA's ids: one text, split at its images and tokenized part by part.

    The tokenizer adds a space at the beginning of each part and after each `</s>`. Image marks are first moved to the
    front of their message.
    """
    text = f"{VICUNA_SYSTEM} "
    for number, content in enumerate(texts):
        if count := content.count("<image>"):
            content = ("<image>\n" * count + content.replace("<image>", "").strip()).strip()
        text += f"ASSISTANT: {content}</s>" if number % 2 else f"USER: {content} "
    text += "ASSISTANT:" if len(texts) % 2 else ""
    tokenizer.encode_special_tokens = False
    ids = [tokenizer.token_to_id("<s>")]
    for number, part in enumerate(text.split("<image>")):
        ids += [-1] * places * bool(number) + tokenizer.encode(part, add_special_tokens=False).ids
    return ids


@pytest.mark.parametrize("texts", TALKS)
def test_ids_equal_those_of_llava(tokenizer: Tokenizer, texts: list[str]) -> None:
    processor = Processor(tokenizer, VicunaPrompt(), (ImageSpec(8),), tokens_per_image=3, end="</s>")
    talk = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    sample = processor.encode(talk, [IMAGE] * "".join(texts).count("<image>"))
    assert sample["ids"].tolist() == llava(tokenizer, texts, 3)
    assert tokenizer.token_to_id("<unk>") not in sample["ids"].tolist()
    supervised = [tokenizer.encode(f"{text}</s>", add_special_tokens=False).ids for text in texts[1::2]]
    assert sample["labels"][sample["labels"] != IGNORED].tolist() == list(itertools.chain(*supervised))


def test_an_image_without_a_mark_is_placed_as_in_llava(tokenizer: Tokenizer) -> None:
    processor = Processor(tokenizer, VicunaPrompt(), (ImageSpec(8),), tokens_per_image=3, end="</s>")
    ids = processor.encode([{"role": "user", "content": "What is this?"}], [IMAGE])["ids"].tolist()
    assert ids == llava(tokenizer, TALKS[0][:1], 3)
