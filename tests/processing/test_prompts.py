"""Prompt formats and their ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ssmvl_ml_mamba.prompts import ZephyrPrompt
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

import ssmvl
from ssmvl.errors import DataError, RecipeError
from ssmvl.interfaces import ImageSpec, Piece, Prompt
from ssmvl.model.build import build_processor
from ssmvl.model.saved import save_folder
from ssmvl.processing.processor import Processor
from ssmvl.processing.prompts import MambaPrompt, PlainPrompt, VicunaPrompt
from ssmvl.processing.tokenizers import byte_tokenizer
from ssmvl.testing import check_prompt

QUESTION = [Piece("In: ", False, True), Piece("why?", False, False), Piece("\nOut: ", False, True)]
ANSWER = [Piece("so.", True, False), Piece("<end>", True, True)]
VICUNA = (
    "<s>A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: "
)
PROMPTS = [MambaPrompt, PlainPrompt, VicunaPrompt, ZephyrPrompt]
SPECIAL = ["<s>", "</s>", "<|endoftext|>", "<|user|>", "<|assistant|>"]


def user(text: str = "why?") -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str = "so.") -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize("prompt", PROMPTS)
def test_satisfies_the_contract(prompt: type[Prompt]) -> None:
    check_prompt(prompt)
    assert prompt().image_placement == ("in_place" if prompt is VicunaPrompt else "before_all_text")


def test_mamba_question_ends_where_the_answer_begins() -> None:
    assert MambaPrompt().pieces([user()], "<end>") == QUESTION


def test_mamba_answer_and_its_end_are_supervised() -> None:
    assert MambaPrompt().pieces([user(), assistant()], "<end>") == QUESTION + ANSWER


def test_mamba_turns_are_separated_by_one_line_break() -> None:
    pieces = MambaPrompt().pieces([user(), assistant(), user("why?"), assistant("so.")], "<end>")
    assert pieces == [*QUESTION, *ANSWER, Piece("\nIn: ", template=True), *QUESTION[1:], *ANSWER]
    assert "".join(piece.text for piece in pieces) == "In: why?\nOut: so.<end>\nIn: why?\nOut: so.<end>"


def test_plain_is_only_the_captions() -> None:
    assert PlainPrompt().pieces([user()], "<end>") == []
    assert PlainPrompt().pieces([user(), assistant()], "<end>") == ANSWER
    assert PlainPrompt().pieces([user(), assistant(), user(), assistant(), user()], "<end>") == ANSWER * 2


def test_a_caption_is_stripped_as_in_the_released_code() -> None:
    talk = [user(), {"role": "assistant", "content": "\n so. "}]
    assert PlainPrompt().pieces(talk, "<end>") == ANSWER


def test_zephyr_turns() -> None:
    pieces = ZephyrPrompt().pieces([user(), assistant(), user(), assistant()], "<end>")
    middle = Piece("<end>\n<|assistant|>\n", template=True)
    first = [Piece("<|user|>\n", template=True), Piece("why?"), middle]
    assert pieces == [*first, *ANSWER, Piece("\n<|user|>\n", template=True), *first[1:], *ANSWER]
    assert ZephyrPrompt().pieces([user()], "<end>") == first
    text = "<|user|>\nwhy?<end>\n<|assistant|>\nso.<end>"
    assert "".join(piece.text for piece in pieces) == f"{text}\n{text}"


@pytest.mark.parametrize("prompt", [MambaPrompt, ZephyrPrompt])
def test_whitespace_is_stripped_as_in_the_released_code(prompt: type[Prompt]) -> None:
    talk = [{"role": "user", "content": " why?\n"}, {"role": "assistant", "content": "\nso. "}]
    assert prompt().pieces(talk, "<end>") == prompt().pieces([user(), assistant()], "<end>")
    talk[1] = {"role": "assistant", "content": ""}
    assert prompt().pieces(talk, "<end>")[-2] == Piece(" ", supervised=True)


@pytest.fixture(scope="module")
def neox() -> Tokenizer:
    """A byte-level BPE with GPT-NeoX's pre-tokenizer, which attaches a space to the following word."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([f"In: What is this? {VICUNA}\nOut: <|user|> <|assistant|> a cat"] * 2, trainer)
    tokenizer.add_special_tokens(["<end>"])
    return tokenizer


@pytest.mark.parametrize(
    ("prompt", "opening", "middle"),
    [(MambaPrompt, "In: ", "\nOut: "), (ZephyrPrompt, "<|user|>\n", "<end>\n<|assistant|>\n")],
)
@given(texts=st.lists(st.text(" \nabWhatuser:'s?!3é猫", max_size=12), min_size=1, max_size=4))
def test_ids_equal_those_of_each_turn_tokenized_as_one_text(
    neox: Tokenizer, prompt: type[Prompt], opening: str, middle: str, texts: list[str]
) -> None:
    expected = []
    for number, text in enumerate(texts):
        if number % 2:
            turn = (text.strip() or " ") + "<end>"
        else:
            turn = ("\n" if number else "") + opening + text.strip() + middle
        neox.encode_special_tokens = False
        expected += neox.encode(turn).ids
    processor = Processor(neox, prompt(), (ImageSpec(8),), tokens_per_image=2, end="<end>")
    talk = [(user, assistant)[number % 2](text) for number, text in enumerate(texts)]
    assert processor.encode(talk)["ids"].tolist() == expected


def test_vicuna_turns() -> None:
    first = [Piece(VICUNA, template=True), Piece("why?"), Piece(" ASSISTANT:", template=True)]
    second = [Piece("USER: ", template=True), *first[1:]]
    assert VicunaPrompt().pieces([user()], "<end>") == first
    assert (
        VicunaPrompt().pieces([user(), assistant(), user(), assistant()], "<end>") == first + ANSWER + second + ANSWER
    )


def test_vicuna_moves_images_to_the_front() -> None:
    assert Piece("<image>\na") in VicunaPrompt().pieces([user("a<image>")], "")
    assert Piece("<image>") in VicunaPrompt().pieces([user("<image>\n")], "")


@pytest.mark.parametrize("prompt", PROMPTS)
def test_an_empty_conversation_is_rejected(prompt: type[Prompt]) -> None:
    with pytest.raises(DataError, match="the conversation is empty"):
        prompt().pieces([], "<end>")


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize(
    ("conversation", "index"),
    [
        ([assistant()], 0),
        ([{"role": "system", "content": "be kind"}, user()], 0),
        ([user(), user()], 1),
        ([user(), assistant(), assistant()], 2),
        ([{"content": "why?"}], 0),
        ([{"role": "user"}], 0),
        ([user(), {"role": "assistant", "content": None}], 1),
        ([{"role": "user", "content": ["why?"]}], 0),
    ],
)
def test_a_bad_message_is_named(prompt: type[Prompt], conversation: list[dict[str, Any]], index: int) -> None:
    with pytest.raises(DataError, match=f"message {index} must be .*'{('user', 'assistant')[index % 2]}'"):
        prompt().pieces(conversation, "<end>")


@pytest.mark.parametrize("prompt", PROMPTS)
def test_special_tokens_in_user_text_are_never_parsed(prompt: type[Prompt]) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(SPECIAL)
    processor = Processor(tokenizer, prompt(), (ImageSpec(8),), tokens_per_image=2, end="</s>")
    special = {tokenizer.token_to_id(token) for token in SPECIAL}

    def read(text: str) -> tuple[list[int], str]:
        talk = [user(f"{text}?"), assistant(f"{text}!"), user(f"?{text}"), assistant(text), user(text)]
        ids = processor.encode(talk)["ids"].tolist()
        return [id_ for id_ in ids if id_ in special], processor.decode(ids)

    parsed, plain = read("@@")
    assert parsed.count(processor.end_id) in (2, 5), "one per answer; zephyr has one per question too"
    for token in SPECIAL:
        assert read(token) == (parsed, plain.replace("@@", token))


def test_a_saved_model_with_an_unregistered_prompt(tmp_path: Path) -> None:
    recipe = ssmvl.load_recipe("quickstart")
    model = ssmvl.build_model(recipe)
    save_folder(tmp_path / "saved", model.state_dict(), recipe, build_processor(recipe, model))
    path = tmp_path / "saved" / "recipe.yaml"
    parts = path.read_text().split("name: mamba\n")
    assert len(parts) == 2
    path.write_text("name: mambo\n".join(parts))
    with pytest.raises(RecipeError, match=r"model\.prompt: unknown prompt 'mambo'\. Did you mean 'mamba'\? Allowed: "):
        ssmvl.load(tmp_path / "saved")
