"""Assistant: answers in batches, arguments, saving and loading."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from PIL import Image

import ssmvl
from ssmvl.checkpoints import read_tensors
from ssmvl.errors import BackendError, CheckpointError, DataError
from ssmvl.generation.assistant import Assistant
from ssmvl.interfaces import Message
from ssmvl.model.build import build_processor
from ssmvl.processing.batch import collate, pad

PROMPTS = ["a", "what is this?", "", "x" * 90, "Which row?", "b", "cc"]


@pytest.fixture(scope="module")
def assistant() -> Assistant:
    torch.manual_seed(3)
    text = ("model.tokenizer=bytes", "model.language.num_tokens=257")
    recipe = ssmvl.load_recipe("quickstart", *text, "model.language.mixer.num_groups=1")  # which transformers supports
    model = ssmvl.build_model(recipe, weights="recipe")
    with torch.no_grad():
        for block in model.language.layers:  # otherwise a tied model repeats its last token for any input
            block.mixer.out_proj.weight.mul_(40)
    return Assistant(model, build_processor(recipe, model), recipe)


@pytest.fixture(scope="module")
def images() -> list[Image.Image | None]:
    colors = ["red", None, "blue", "white", None, "green", "black"]
    return [c and Image.new("RGB", (50 + i, 40), c) for i, c in enumerate(colors)]


@pytest.mark.parametrize("size", [1, 2, 7])
def test_answers_do_not_depend_on_the_batch(assistant: Assistant, images: list[Image.Image | None], size: int) -> None:
    alone = [assistant.generate([p], [i], max_new_tokens=16)[0] for p, i in zip(PROMPTS, images, strict=True)]
    together: list[str] = []
    for start in range(0, 7, size):
        part = slice(start, start + size)
        together += assistant.generate(PROMPTS[part], images[part], max_new_tokens=16)
    assert together == alone
    assert len(set(alone)) > 2


@pytest.mark.parametrize("extra", [1, 40])
def test_answers_do_not_depend_on_the_content_of_the_padding(
    assistant: Assistant, images: list[Image.Image | None], extra: int
) -> None:
    model, processor = assistant.model, assistant.processor
    pairs = zip(PROMPTS, images, strict=True)
    samples = [processor.encode([{"role": "user", "content": p}], [] if i is None else [i]) for p, i in pairs]
    inputs = pad(collate(samples))
    rows, length = inputs["ids"].shape
    padded = torch.randint(257, (rows, length + extra))
    for row, sample in zip(padded, samples, strict=True):
        row[: len(sample["ids"])] = sample["ids"]
    positions = inputs["image_positions"]
    with torch.no_grad():
        visual, state = model.encode(inputs["images"]), model.language.new_state(rows)
        lengths = torch.tensor([len(sample["ids"]) for sample in samples])
        logits = model.prefill(padded, lengths, visual, positions + positions // length * extra, state)
        answers = [processor.decode(ids) for ids in assistant._continue(logits, state, 16)]
    assert answers == assistant.generate(PROMPTS, images, max_new_tokens=16)


@pytest.mark.parametrize("size", [1, 2, 7])
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_rows_padded_on_either_side_give_the_same_answers(
    assistant: Assistant, images: list[Image.Image | None], size: int, side: str
) -> None:
    expected = assistant.generate(PROMPTS, images, max_new_tokens=16)
    answers: list[str] = []
    for start in range(0, 7, size):
        prompts, part = PROMPTS[start : start + size], images[start : start + size]
        own = [i for i in part if i is not None]
        pairs = zip(prompts, ([] if i is None else [i] for i in part), strict=True)
        rows = [assistant.processor.encode([{"role": "user", "content": p}], i)["ids"] for p, i in pairs]
        width = max(map(len, rows)) + 5
        ids, mask = torch.randint(257, (len(rows), width)), torch.zeros(len(rows), width, dtype=torch.bool)
        for number, row in enumerate(rows):
            before = {"left": width - len(row), "right": 0, "both": (width - len(row)) // 2}[side]
            ids[number, before : before + len(row)] = row
            mask[number, before : before + len(row)] = True
        answers += assistant.generate_ids(ids, mask, own, max_new_tokens=16)
    assert answers == expected


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        ([[1, 2]], [[1]], r"must both have shape \(B, T\), received \(1, 2\), \(1, 1\)"),
        ([[1, 2], [3, 4]], [[1, 1], [0, 0]], "row 1 has no real position"),
        ([[1, 9999]], [[1, 1]], "row 0 has id 9999; allowed are 0…"),
        ([[1, -7]], [[1, 1]], "row 0 has id -7"),
        ([[1, -1]], [[1, 1]], r"the images need \[\] image places, but the rows have \[1\]"),
    ],
)
def test_invalid_ids_are_rejected(
    assistant: Assistant, ids: list[list[int]], mask: list[list[int]], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        assistant.generate_ids(torch.tensor(ids), torch.tensor(mask))


def test_ids_of_no_rows(assistant: Assistant) -> None:
    assert assistant.generate_ids(torch.zeros(0, 3, dtype=torch.long), torch.zeros(0, 3)) == []


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_answers_are_the_same(assistant: Assistant, images: list[Image.Image | None]) -> None:
    compiled = Assistant(assistant.model, assistant.processor, assistant.recipe)
    compiled.compile()
    expected = assistant.generate(PROMPTS[:2], images[:2], max_new_tokens=16)
    assert compiled.generate(PROMPTS[:2], images[:2], max_new_tokens=16) == expected


def test_decoding_equals_a_forward_over_the_whole_text(assistant: Assistant, images: list[Image.Image | None]) -> None:
    model, processor = assistant.model, assistant.processor
    (answer,) = assistant.generate(["why?"], [images[0]], max_new_tokens=6)
    sample = processor.encode([{"role": "user", "content": "why?"}], [images[0]])
    ids, expected = sample["ids"], []
    for _ in range(6):
        image_positions = (ids == -1).nonzero().squeeze(1)
        with torch.no_grad():
            logits = model(ids[None], image_positions, torch.tensor([len(ids) - 1]), sample["images"])
        expected.append(int(logits[0, :257].argmax()))
        ids = torch.cat([ids, torch.tensor(expected[-1:])])
    length = expected.index(processor.end_id) if processor.end_id in expected else 6
    assert answer == processor.decode(expected[:length])


def test_an_answer_ends_at_the_end_token_and_has_no_padding_ids(assistant: Assistant) -> None:
    logits = torch.full((2, 272), -1.0)
    logits[:, 260:] = 9.0  # padding rows of the embedding, without a token
    logits[0, 5], logits[1, assistant.processor.end_id] = 1.0, 1.0
    rows = assistant._continue(logits, assistant.model.language.new_state(2), limit=1)
    assert rows == [[5], []]


def test_no_prompts_no_tokens(assistant: Assistant) -> None:
    assert assistant.generate([]) == []
    assert assistant.generate(["a"], max_new_tokens=0) == [""]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a",), r"list of texts, received a single text; write generate\(\[prompt\], \[image\]\)"),
        ((None,), "list of texts, received a NoneType"),
        ((["a", 5],), "list of texts or conversations; prompt 1 has type int: 5"),
        ((["a"], Image.new("RGB", (8, 8))), "images must be a list, received a Image"),
        ((["a"], "x"), "images must be a list, received a str"),
        ((["a"], b"x"), "images must be a list, received a bytes"),
        ((["a"], Path("x")), "images must be a list, received a PosixPath"),
    ],
)
def test_arguments_must_be_lists(assistant: Assistant, arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        assistant.generate(*arguments)


@pytest.mark.parametrize("limit", ["5", 2.5, None])
def test_a_length_that_is_not_an_integer_is_rejected(assistant: Assistant, limit: Any) -> None:
    with pytest.raises(DataError, match="max_new_tokens must be an integer, received"):
        assistant.generate(["a"], max_new_tokens=limit)
    with pytest.raises(DataError, match="max_new_tokens must be an integer, received"):
        assistant.generate_ids(torch.ones(1, 1), torch.ones(1, 1), max_new_tokens=limit)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "bf16"}, "dtype must be a floating-point torch.dtype, such as torch.bfloat16; received 'bf16'"),
        ({"dtype": torch.int8}, "received torch.int8"),
        ({"device": "gpu"}, "device 'gpu' is not available"),
        ({"device": "cuda:99"}, "device 'cuda:99' is not available"),
        ({"device": 2.5}, "device 2.5 is not available"),
    ],
)
def test_an_unknown_device_or_dtype_is_rejected(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(BackendError, match=message) as caught:
        ssmvl.load(tmp_path, **options)
    assert len(str(caught.value).splitlines()) == 1


def test_several_images_and_turns_reach_the_model(assistant: Assistant) -> None:
    red, blue = (Image.new("RGB", (48, 48), color) for color in ("red", "blue"))
    talk: list[Message] = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    question: list[Message] = [{"role": "user", "content": "which?"}]
    cases: list[tuple[Any, Any, list[Message], list[Image.Image]]] = [
        ("which?", [red, blue], question, [red, blue]),
        (talk, red, talk, [red]),
        ("which?", None, question, []),
    ]
    answers = assistant.generate([case[0] for case in cases], [case[1] for case in cases], max_new_tokens=6)
    for answer, (_, _, conversation, own) in zip(answers, cases, strict=True):
        ids = assistant.processor.encode(conversation, own)["ids"][None]
        assert [answer] == assistant.generate_ids(ids, torch.ones_like(ids), own, max_new_tokens=6)
    with pytest.raises(DataError, match="prompt 0 must end with a user message; it has 2 messages"):
        assistant.generate([talk[:2]])


def test_inputs_that_would_be_misread_are_rejected(assistant: Assistant) -> None:
    ids = torch.tensor([[5, 6, 7]])
    for mask in (torch.tensor([[-float("inf"), 0, 0]]), torch.tensor([[float("nan"), 1, 1]])):
        with pytest.raises(DataError, match="mask must be True or 1"):
            assistant.generate_ids(ids, mask)
    with pytest.raises(DataError, match="ids must be integers"):
        assistant.generate_ids(ids.float(), torch.ones(1, 3))
    with pytest.raises(DataError, match="message 0 has images, which would be ignored"):
        assistant.generate(cast(Any, [[{"role": "user", "content": "q", "images": ["a.png"]}]]))
    with pytest.raises(DataError, match="unpaired surrogate"):
        assistant.generate(["a\ud800b"])
    with pytest.raises(DataError, match="unpaired surrogate"):
        assistant.generate([[{"role": "user", "content": "a\ud800b"}]])
    broken = copy.deepcopy(assistant)
    with torch.no_grad():
        broken.model.language.norm_f.weight[0] = float("nan")
    with pytest.raises(BackendError, match="logits are NaN"):
        broken.generate(["q"])


def test_there_must_be_as_many_images_as_prompts(assistant: Assistant) -> None:
    with pytest.raises(DataError, match="2 prompts, but 1 images"):
        assistant.generate(["a", "b"], [None])


def test_an_image_that_cannot_be_decoded_is_named(assistant: Assistant, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_text("not an image")
    with pytest.raises(DataError, match=r"x\.png: cannot be decoded"):
        assistant.generate(["a"], [tmp_path / "x.png"])


def test_saved_and_loaded_answers_the_same(
    assistant: Assistant, images: list[Image.Image | None], tmp_path: Path
) -> None:
    assistant.save_pretrained(tmp_path / "model")
    loaded = ssmvl.load(tmp_path / "model")
    saved = assistant.model.state_dict()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in loaded.model.state_dict().items())
    assert loaded.generate(PROMPTS, images, max_new_tokens=5) == assistant.generate(PROMPTS, images, max_new_tokens=5)
    assert ssmvl.load(tmp_path).recipe == loaded.recipe, "its parent directory, as in a run folder"


def test_weights_alone_are_loaded_with_a_recipe(
    assistant: Assistant, images: list[Image.Image | None], tmp_path: Path
) -> None:
    assistant.save_pretrained(tmp_path / "model")
    alone = (tmp_path / "model" / "model.safetensors").rename(tmp_path / "alone.safetensors")
    loaded = ssmvl.load(alone, recipe=assistant.recipe)
    assert loaded.generate(PROMPTS, images, max_new_tokens=5) == assistant.generate(PROMPTS, images, max_new_tokens=5)
    assert (
        next(ssmvl.load("recipe", recipe="quickstart", dtype=torch.bfloat16).model.parameters()).dtype is torch.bfloat16
    )


def test_saving_again_replaces_the_directory(assistant: Assistant, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    assistant.save_pretrained(folder)
    assistant.save_pretrained(folder)
    assert {p.name for p in folder.iterdir()} == {
        "model.safetensors",
        "recipe.yaml",
        "tokenizer.json",
        "tokenizer_config.json",
        "ssmvl.json",
        "README.md",
        "SHA256SUMS",
    }
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"contains other files \(notes\.txt\)"):
        assistant.save_pretrained(folder)
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_failed_save_keeps_the_old_directory(
    assistant: Assistant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assistant.save_pretrained(tmp_path / "model")

    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("ssmvl.checkpoints.files.write_tensors", full)
    with pytest.raises(CheckpointError, match="no space"):
        assistant.save_pretrained(tmp_path / "model")
    assert read_tensors(tmp_path / "model" / "model.safetensors")[0]
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_tilde_in_a_path_is_expanded(assistant: Assistant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assistant.save_pretrained("~/model")
    assistant.save_language("~/language")
    assert (tmp_path / "model" / "model.safetensors").is_file()
    assert (tmp_path / "language" / "model.safetensors").is_file()
    assert ssmvl.load("~/model").recipe == ssmvl.load(tmp_path / "model").recipe


@pytest.mark.parametrize("name", ["file", "file/model"])
def test_a_file_in_the_way_is_kept(assistant: Assistant, tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("mine")
    for save in (assistant.save_pretrained, assistant.save_language):
        with pytest.raises(CheckpointError, match=rf"the directory .*{name} cannot be written"):
            save(tmp_path / name)
    assert (tmp_path / "file").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_model_card_without_the_marker_is_kept(assistant: Assistant, tmp_path: Path) -> None:
    assistant.save_pretrained(tmp_path)
    card = tmp_path / "README.md"
    generated = card.read_text()
    card.write_text(generated.replace("fusion channel", "fusion of old"))
    assistant.save_pretrained(tmp_path)
    assert card.read_text() == generated
    card.write_bytes(b"# Mine, \xe9tranger\r\n")
    assistant.save_pretrained(tmp_path)
    assert card.read_bytes() == b"# Mine, \xe9tranger\r\n"


@pytest.mark.parametrize("text", ["", "{}", '{"format_version": 99}'])
def test_a_missing_or_newer_format_is_rejected(assistant: Assistant, tmp_path: Path, text: str) -> None:
    assistant.save_pretrained(tmp_path)
    (tmp_path / "ssmvl.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"ssmvl\.json cannot be read|format version 99"):
        ssmvl.load(tmp_path)


def test_a_saved_model_states_its_format_and_version(assistant: Assistant, tmp_path: Path) -> None:
    assistant.save_pretrained(tmp_path / "model")
    about = json.loads((tmp_path / "model" / "ssmvl.json").read_text())
    assert (about["format_version"], about["ssmvl"]) == (2, ssmvl.__version__)
