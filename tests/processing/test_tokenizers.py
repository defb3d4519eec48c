"""Byte tokenizers, and tokenizers from files."""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, models, processors
from transformers import AutoTokenizer

import ssmvl
from ssmvl.data.scenes.scenes import QUESTIONS
from ssmvl.errors import CheckpointError
from ssmvl.interfaces import ImageSpec, Piece, Prompt
from ssmvl.model.saved import tokenizer_files, write_files
from ssmvl.processing.processor import Processor
from ssmvl.processing.prompts import MambaPrompt, PlainPrompt, VicunaPrompt
from ssmvl.processing.tokenizers import END, byte_tokenizer, load_tokenizer

BYTES = byte_tokenizer()


def test_bytes_has_one_id_per_byte_and_the_end() -> None:
    tokenizer, end = load_tokenizer("bytes")
    assert end == END
    assert sorted(tokenizer.get_vocab().values()) == list(range(257))
    assert tokenizer.token_to_id(END) == 256


def test_words_has_bytes_and_the_words_of_the_quickstarts_questions() -> None:
    tokenizer, end = load_tokenizer("words")
    assert end == END
    assert tokenizer.get_vocab_size() == ssmvl.load_recipe("quickstart").data["model"]["language"]["num_tokens"]
    assert tokenizer.get_vocab().keys() >= BYTES.get_vocab().keys()
    rng = np.random.default_rng(0)
    scene = {(0, 1): 3, (2, 1): 7}
    for make_question in QUESTIONS.values():
        pair = None
        while pair is None:
            pair = make_question(scene, rng)
        for text in pair:
            pieces = re.findall(r" ?\d| ?[A-Za-z]+|[.,?] ?", text)
            assert len(tokenizer.encode(text).ids) == len(pieces), text


@settings(deadline=None)
@given(text=st.text())
def test_any_text_round_trips_through_words(text: str) -> None:
    tokenizer, _ = load_tokenizer("words")
    tokenizer.encode_special_tokens = True
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=True) == text


def test_golden_ids() -> None:
    assert BYTES.encode("!a z\n").ids == [0, 64, 220, 89, 198]
    assert BYTES.encode("é").ids == [127, 102]


@settings(deadline=None)
@given(text=st.text())
def test_any_text_round_trips_with_one_id_per_byte(text: str) -> None:
    BYTES.encode_special_tokens = True
    ids = BYTES.encode(text).ids
    assert len(ids) == len(text.encode())
    assert BYTES.decode(ids, skip_special_tokens=True) == text


def test_end_token_is_one_id_and_omitted_from_text() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode("a" + END).ids
    assert ids == [64, 256]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a"


@pytest.mark.parametrize("name", ["", "tokenizer.json"])
def test_loads_a_directory_or_its_file(tmp_path: Path, name: str) -> None:
    BYTES.save(str(tmp_path / "tokenizer.json"))
    loaded, end = load_tokenizer(str(tmp_path / name))
    assert end == END, "the end token of an older version's directory, without a tokenizer_config.json"
    assert loaded.get_vocab() == BYTES.get_vocab()
    assert loaded.encode("a" + END).ids == [64, 256]


def test_loads_a_path_in_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    BYTES.save(str(tmp_path / "mine.json"))
    assert load_tokenizer("~/mine.json")[0].get_vocab_size() == 257


def test_a_missing_tokenizer_lists_the_allowed_values(tmp_path: Path) -> None:
    for name in ("byte", str(tmp_path), str(tmp_path / "none.json")):
        with pytest.raises(CheckpointError, match=r"load the tokenizer.* Allowed: `bytes`, `words`, a tokenizer.json,"):
            load_tokenizer(name)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model": 3}', "\0\1"])
def test_a_damaged_tokenizer_names_the_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(text)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: cannot be read"):
        load_tokenizer(str(path))


def write(folder: Path, config: object, *special: str) -> Path:
    """Write a byte tokenizer with these special tokens and this `tokenizer_config.json` into `folder`."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(list(special))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("eos", ["</s>", {"__type": "AddedToken", "content": "</s>", "special": True}])
def test_the_end_token_is_the_configs_eos_token(tmp_path: Path, eos: object) -> None:
    tokenizer, end = load_tokenizer(str(write(tmp_path, {"eos_token": eos}, "</s>")))
    assert (end, tokenizer.token_to_id(end)) == ("</s>", 257)


@pytest.mark.parametrize("config", [{}, {"eos_token": None}])
def test_a_config_without_an_eos_token(tmp_path: Path, config: object) -> None:
    assert load_tokenizer(str(write(tmp_path, config)))[1] == END


@pytest.mark.parametrize("config", [[], 3, {"eos_token": 5}, {"eos_token": {"content": 5}}])
def test_a_damaged_config_names_the_file(tmp_path: Path, config: object) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: "):
        load_tokenizer(str(write(tmp_path, config)))
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: cannot be read"):
        load_tokenizer(str(tmp_path))


def test_truncation_padding_and_dropout_of_a_file_are_ignored_with_a_warning(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")], dropout=0.9))
    tokenizer.add_special_tokens([END])
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=20)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    warning = (
        r"tokenizer\.json: ignoring truncation to 4 tokens and padding and BPE dropout of 0\.9, which would change"
    )
    with pytest.warns(UserWarning, match=warning):
        loaded, end = load_tokenizer(str(tmp_path))
    for _ in range(10):
        assert loaded.encode("ab" * 9).ids == [2] * 9
    processor = Processor(loaded, MambaPrompt(), (ImageSpec(8),), tokens_per_image=1, end=end)
    write_files(tmp_path / "saved", {"weight": torch.zeros(1)}, tokenizer_files(processor))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_tokenizer(str(tmp_path / "saved"))


def llama_like(folder: Path, *, special: bool, template: bool, config: dict[str, Any] | None = None) -> Processor:
    """A processor whose tokenizer has `<s>`, as a special token if `special`, in the post-processor if `template`."""
    tokens = ["<unk>", "<s>", *sorted({*map(chr, range(32, 127)), "\n"})]
    vocab = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.add_special_tokens(["</s>", *(["<s>"] if special else [])])
    if template:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", **(config or {})}))
    loaded, end = load_tokenizer(str(folder))
    return Processor(loaded, MambaPrompt(), (ImageSpec(8),), tokens_per_image=2, end=end)


QUESTION = [{"role": "user", "content": "Why?"}]


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("prompt", [MambaPrompt(), PlainPrompt(), VicunaPrompt()])
def test_a_bos_token_of_the_post_processor_precedes_images(tmp_path: Path, special: bool, prompt: Prompt) -> None:
    processor = replace(llama_like(tmp_path, special=special, template=True), prompt=prompt)
    image = Image.new("RGB", (8, 8))
    sample = processor.encode([*QUESTION, {"role": "assistant", "content": "So."}], [image], train=True)
    ids, labels = sample["ids"].tolist(), sample["labels"].tolist()
    assert (ids.count(1), ids[0], labels[0]) == (1, 1, -100)
    if prompt.image_placement == "before_all_text":
        assert ids[:4] == [1, -1, -1, ids[3]]
    assert "<s>" not in processor.decode([id_ for id_ in ids if id_ > 1])
    assert ids[-1] == labels[-1] == processor.end_id


@pytest.mark.parametrize("special", [True, False])
def test_vicunas_bos_is_one_token_if_the_tokenizer_has_one(tmp_path: Path, special: bool) -> None:
    processor = replace(llama_like(tmp_path, special=special, template=False), prompt=VicunaPrompt())
    assert processor.encode(QUESTION)["ids"].tolist()[:2] == [1, processor.tokenizer.token_to_id("A")]
    bytes_only = Processor(byte_tokenizer(), VicunaPrompt(), (ImageSpec(8),), tokens_per_image=1)
    assert bytes_only.decode(bytes_only.encode(QUESTION)["ids"].tolist()).startswith("A chat between")


@pytest.mark.parametrize("template", [True, False])
@pytest.mark.parametrize("add", [True, False, None])
def test_the_config_may_enable_or_disable_the_bos_token(tmp_path: Path, template: bool, add: bool | None) -> None:
    config = {"add_bos_token": add, "bos_token": {"content": "<s>"}}
    processor = llama_like(tmp_path, special=True, template=template, config=config)
    has_bos = template if add is None else add
    assert (processor.encode(QUESTION)["ids"].tolist()[0] == 1) == has_bos
    write_files(tmp_path / "saved", {"weight": torch.zeros(1)}, tokenizer_files(processor))
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert (again("Why?")["input_ids"][0] == 1) == has_bos


def test_a_missing_bos_token_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"adds the bos_token '<bos>', but the tokenizer has no such token"):
        llama_like(tmp_path, special=True, template=False, config={"add_bos_token": True, "bos_token": "<bos>"})


def test_a_bos_token_other_than_the_post_processors_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"adds the bos_token '<unk>', but the tokenizer adds \['<s>'\]"):
        llama_like(tmp_path, special=True, template=True, config={"add_bos_token": True, "bos_token": "<unk>"})


@pytest.mark.parametrize("bos", ["$0", "$A", "<s> x", "a:0"])
def test_a_bos_token_of_any_spelling_is_added_once_or_rejected(tmp_path: Path, bos: str) -> None:
    folder = write(tmp_path, {"add_bos_token": True, "bos_token": bos, "eos_token": "<|endoftext|>"}, bos)
    if set(bos) & {"$", ":"}:  # special characters of templates
        with pytest.raises(CheckpointError, match="cannot be prepended to a text; rename it"):
            load_tokenizer(str(folder))
    else:
        assert load_tokenizer(str(folder))[0].encode("cat").ids == [257, *BYTES.encode("cat").ids]


@pytest.mark.parametrize("id_", [258, 400])
def test_ids_with_gaps_are_rejected(tmp_path: Path, id_: int) -> None:
    saved = json.loads(BYTES.to_str())
    saved["model"]["vocab"]["Q"] = id_
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    with pytest.raises(CheckpointError, match=f"has 257 tokens, but its largest id is {id_}; ids must be"):
        load_tokenizer(str(tmp_path))


def test_a_bos_token_in_the_middle_of_a_template_is_one_token(tmp_path: Path) -> None:
    class Turns:
        image_placement = "before_all_text"

        def pieces(self, conversation: Any, end: str) -> list[Piece]:
            return [Piece("<s>[", template=True), Piece("x"), Piece("]</s><s>[", template=True)]

    for special in (True, False):
        processor = replace(llama_like(tmp_path, special=special, template=False), prompt=cast(Any, Turns()))
        assert processor.encode(QUESTION)["ids"].tolist().count(1) == 2


def test_a_tokenizer_without_an_end_token_is_rejected(tmp_path: Path) -> None:
    Tokenizer(models.BPE(vocab={"a": 0}, merges=[])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match=r"no special token <\|endoftext\|> .* name another as `eos_token`"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(CheckpointError, match="no special token !"):  # an ordinary token of the tokenizer
        load_tokenizer(str(write(tmp_path, {"eos_token": "!"})))


def test_a_saved_tokenizer_loads_equally_here_and_in_transformers(tmp_path: Path) -> None:
    tokenizer, end = load_tokenizer(str(write(tmp_path, {"eos_token": "</s>"}, "</s>")))
    processor = Processor(tokenizer, MambaPrompt(), (ImageSpec(8),), tokens_per_image=1, end=end)
    write_files(tmp_path / "saved", {"weight": torch.zeros(1)}, tokenizer_files(processor))
    again, end_again = load_tokenizer(str(tmp_path / "saved"))
    assert end_again == "</s>"
    assert again.to_str() == tokenizer.to_str()
    auto = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert auto.eos_token_id == 257
    ids = again.encode("What , is 'this ?</s>").ids
    assert auto.encode("What , is 'this ?</s>") == ids
    assert auto.decode(ids, skip_special_tokens=True) == again.decode(ids) == "What , is 'this ?"
