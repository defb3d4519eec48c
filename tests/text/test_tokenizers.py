"""The byte tokenizers, and tokenizers from files."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

import ssmvl
from ssmvl.data.scenes import QUESTIONS
from ssmvl.errors import CheckpointError
from ssmvl.text.tokenizers import END, byte_tokenizer, load_tokenizer

BYTES = byte_tokenizer()


def test_bytes_has_one_id_per_byte_and_the_end() -> None:
    tokenizer = load_tokenizer("bytes")
    assert sorted(tokenizer.get_vocab().values()) == list(range(257))
    assert tokenizer.token_to_id(END) == 256


def test_words_has_bytes_and_whole_words_of_the_quickstarts_questions() -> None:
    tokenizer = load_tokenizer("words")
    assert tokenizer.get_vocab_size() == ssmvl.load_recipe("quickstart").data["model"]["language"]["num_tokens"]
    assert tokenizer.get_vocab().keys() >= BYTES.get_vocab().keys()
    rng = np.random.default_rng(0)
    scene = {(0, 1): 3, (2, 1): 7}
    for ask in QUESTIONS.values():
        pair = None
        while pair is None:
            pair = ask(scene, rng)
        for text in pair:
            pieces = re.findall(r" ?\d| ?[A-Za-z]+|[.,?] ?", text)
            assert len(tokenizer.encode(text).ids) == len(pieces), text


@settings(deadline=None)
@given(text=st.text())
def test_any_text_round_trips_through_words(text: str) -> None:
    tokenizer = load_tokenizer("words")
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


def test_end_token_is_one_id_and_is_left_out_of_text() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode("a" + END).ids
    assert ids == [64, 256]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a"


@pytest.mark.parametrize("name", ["", "tokenizer.json"])
def test_loads_a_folder_or_its_file(tmp_path: Path, name: str) -> None:
    BYTES.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(str(tmp_path / name))
    assert loaded.get_vocab() == BYTES.get_vocab()
    assert loaded.encode("a" + END).ids == [64, 256]


def test_loads_a_path_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    BYTES.save(str(tmp_path / "mine.json"))
    assert load_tokenizer("~/mine.json").get_vocab_size() == 257


def test_missing_tokenizer_says_what_is_allowed(tmp_path: Path) -> None:
    for name in ("byte", str(tmp_path), str(tmp_path / "none.json")):
        with pytest.raises(CheckpointError, match=r"no tokenizer .*bytes"):
            load_tokenizer(name)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model": 3}', "\0\1"])
def test_damaged_tokenizer_names_the_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(text)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: cannot be read"):
        load_tokenizer(str(path))


def test_tokenizer_without_an_end_is_refused(tmp_path: Path) -> None:
    Tokenizer(models.BPE(vocab={"a": 0}, merges=[])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match=r"no token <\|endoftext\|>"):
        load_tokenizer(str(tmp_path))
