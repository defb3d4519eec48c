"""Tokenizers of models on the Hub, downloaded only when needed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hub import Hub
from huggingface_hub import HfApi, constants
from huggingface_hub.utils import reset_sessions

import ssmvl
from ssmvl.errors import CheckpointError
from ssmvl.model.build import build_processor
from ssmvl.processing.tokenizers import byte_tokenizer, load_tokenizer

NAME = "owner/small-lm.v1"


@pytest.fixture
def model(hub: Hub) -> Path:
    """A Hub model with a byte tokenizer, whose end token is `</s>`, and weights that no test needs."""
    folder, tokenizer = hub.model(NAME), byte_tokenizer()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def downloads(hub: Hub) -> set[str]:
    """Names of the files that were downloaded so far."""
    return {
        request.rpartition("/")[2] for request in hub.requests if request.startswith("GET") and "resolve" in request
    }


def test_tokenizer_and_end_of_a_model(hub: Hub, model: Path) -> None:
    tokenizer, end = load_tokenizer(NAME)
    assert (end, tokenizer.get_vocab_size()) == ("</s>", 258)
    assert downloads(hub) == {"tokenizer.json", "tokenizer_config.json"}


def test_a_model_without_a_config(hub: Hub, model: Path) -> None:
    (model / "tokenizer_config.json").unlink()
    assert load_tokenizer(NAME)[1] == "<|endoftext|>"


def test_downloaded_files_load_without_a_connection(hub: Hub, model: Path) -> None:
    first, _ = load_tokenizer(NAME)
    hub.close()
    again, end = load_tokenizer(NAME)
    assert end == "</s>"
    assert again.to_str() == first.to_str()


def test_a_directory_of_that_name_takes_precedence(
    hub: Hub, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(NAME).mkdir(parents=True)
    byte_tokenizer().save(f"{NAME}/tokenizer.json")
    assert load_tokenizer(NAME)[0].get_vocab_size() == 257
    assert hub.requests == []


def test_only_a_processor_needs_the_tokenizer(hub: Hub, model: Path) -> None:
    recipe = ssmvl.load_recipe("quickstart", f"model.tokenizer={NAME}", "model.language.num_tokens=258")
    built = ssmvl.build_model(recipe, device="meta")
    assert hub.requests == []
    processor = build_processor(recipe, built)
    assert (processor.end, processor.end_id) == ("</s>", 257)
    ids = processor.encode([{"role": "user", "content": "a</s>"}, {"role": "assistant", "content": "b"}])["ids"]
    assert ids.tolist().count(257) == 1


@pytest.mark.parametrize("name", ["owner/none", "no--body/..", NAME])
def test_a_failed_download_names_the_sources_and_the_allowed_values(hub: Hub, name: str) -> None:
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)}: no such file .* Hub .* Allowed: `bytes`"):
        load_tokenizer(name)


@pytest.mark.parametrize("offline", [False, True])
def test_no_connection(hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch, offline: bool) -> None:
    if offline:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        reset_sessions()
    else:
        hub.close()
    with pytest.raises(CheckpointError, match=r"cannot be downloaded from the Hub .* a directory"):
        load_tokenizer(NAME)
    assert hub.requests == []


def test_a_model_with_only_a_sentencepiece_file(hub: Hub, model: Path) -> None:
    (model / "tokenizer.json").unlink()
    (model / "tokenizer.model").write_bytes(b"sentencepiece")
    with pytest.raises(CheckpointError, match=rf"load the tokenizer '{NAME}': .*AutoTokenizer.*save_pretrained"):
        load_tokenizer(NAME)


def test_the_fake_hub_returns_pushed_files(hub: Hub, model: Path, tmp_path: Path) -> None:
    """A test of the fake Hub itself, because other tests push to it."""
    files = {path.name: path.read_bytes() for path in model.iterdir()} | {"README.md": b"---\n{}\n---\n# A model\n"}
    (tmp_path / "saved" / "deep").mkdir(parents=True)
    for file, content in (files | {"deep/empty.txt": b""}).items():
        (tmp_path / "saved" / file).write_bytes(content)
    api = HfApi()
    assert api.create_repo("me/mine", exist_ok=True).repo_id == "me/mine"
    before = hub.commit("me/mine")
    commit = api.upload_folder(repo_id="me/mine", folder_path=tmp_path / "saved")
    assert commit.oid == hub.commit("me/mine") != before
    assert hub.files("me/mine") == files | {"deep/empty.txt": b""}
    assert load_tokenizer("me/mine")[1] == "</s>"
    assert api.create_repo("me/mine", exist_ok=True).repo_id == "me/mine"
    assert api.model_info("me/mine").sha == commit.oid
