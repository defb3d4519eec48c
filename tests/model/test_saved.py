"""Saved models: shards, the Hub, and the language model for transformers."""

from __future__ import annotations

import copy
import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch.nn.utils import parametrizations, prune
from transformers import AutoModelForCausalLM, AutoTokenizer

import ssmvl
from ssmvl.checkpoints import files
from ssmvl.errors import CheckpointError, ContractError
from ssmvl.generation.assistant import Assistant
from ssmvl.model.build import build_processor
from ssmvl.processing.prompts import VicunaPrompt
from ssmvl.processing.tokenizers import END, byte_tokenizer, load_tokenizer


@pytest.fixture(scope="module")
def assistant() -> Assistant:
    recipe = ssmvl.load_recipe("quickstart")
    model = ssmvl.build_model(recipe)
    return Assistant(model, build_processor(recipe, model), recipe)


@pytest.fixture
def one_group() -> Assistant:
    """An assistant whose language model transformers supports."""
    recipe = ssmvl.load_recipe("quickstart", "model.language.mixer.num_groups=1")
    model = ssmvl.build_model(recipe)
    return Assistant(model, build_processor(recipe, model), recipe)


def assert_equal(first: Assistant, second: Assistant) -> None:
    own, other = first.model.state_dict(), second.model.state_dict()
    assert own.keys() == other.keys()
    assert all(torch.equal(own[name], other[name]) for name in own)
    assert first.recipe.data == second.recipe.data
    assert first.processor.end == second.processor.end


def test_shards_are_bit_equal(assistant: Assistant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "SHARD", 10**6)
    assistant.save_pretrained(tmp_path / "model")
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 2
    assert_equal(ssmvl.load(tmp_path / "model"), assistant)


def test_a_missing_shard_is_named(assistant: Assistant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "SHARD", 10**6)
    assistant.save_pretrained(tmp_path / "model")
    max((tmp_path / "model").glob("model-*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match=r"model-0000\d-of-0000\d\.safetensors: missing"):
        ssmvl.load(tmp_path / "model")


def test_to_the_hub_and_back(assistant: Assistant, tmp_path: Path, hub: Any) -> None:
    url = assistant.push_to_hub("someone/small")
    assert url.startswith(hub.url)
    assert hub.files("someone/small")["README.md"].decode().startswith("---\nlibrary_name: ssmvl")
    assert_equal(ssmvl.load("someone/small"), assistant)
    hub.close()
    assert_equal(ssmvl.load("someone/small"), assistant)


def test_pushing_over_a_larger_model_removes_its_shards(
    assistant: Assistant, hub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "SHARD", 10**6)
    assistant.push_to_hub("someone/small")
    assert "model.safetensors.index.json" in hub.files("someone/small")
    monkeypatch.setattr(files, "SHARD", 10**9)
    recipe = assistant.recipe
    other = Assistant(ssmvl.build_model(recipe), assistant.processor, recipe)
    other.push_to_hub("someone/small")
    assert_equal(ssmvl.load("someone/small"), other)


def test_a_model_card_without_the_marker_is_kept_on_the_hub(assistant: Assistant, hub: Any) -> None:
    assistant.push_to_hub("someone/small")
    card = hub.model("someone/small") / "README.md"
    generated = card.read_text()
    card.write_text(generated.replace("fusion channel", "fusion of old"))
    assistant.push_to_hub("someone/small")
    assert card.read_text() == generated
    card.write_text("# Mine\n")
    assistant.push_to_hub("someone/small")
    assert card.read_text() == "# Mine\n"


@pytest.mark.parametrize("name", ["small", "no such/model", "a/b/c", "", None, "a--b/c"])
def test_pushing_to_a_malformed_id(assistant: Assistant, hub: Any, name: Any) -> None:
    with pytest.raises(CheckpointError, match=r"is not a Hub model id; write owner/model|cannot be pushed") as caught:
        assistant.push_to_hub(name)
    assert len(str(caught.value).splitlines()) == 1
    assert hub.requests == []


def test_pushing_without_a_connection(assistant: Assistant, hub: Any) -> None:
    hub.close()
    with pytest.raises(CheckpointError, match=r"someone/small cannot be pushed to the Hub \("):
        assistant.push_to_hub("someone/small")


def test_a_missing_model_on_the_hub(hub: Any) -> None:
    with pytest.raises(CheckpointError, match="someone/none: no such file or directory, and it cannot be downloaded"):
        ssmvl.load("someone/none")
    hub.model("someone/empty").joinpath("notes.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds no saved model"):
        ssmvl.load("someone/empty")


def test_nothing_is_downloaded_without_a_request(hub: Any) -> None:
    language = "model.language={weights: someone/big}"
    timm = "model.encoders.fine={name: timm, model: vit_tiny_patch16_224, weights: augreg_in21k_ft_in1k}"
    clip = "model.encoders.coarse={name: open_clip, model: ViT-B-16-quickgelu, weights: openai}"
    ssmvl.build_model("quickstart", language, timm, clip, "model.tokenizer=someone/words")
    assert hub.requests == []


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_language_model_from_the_hub(hub: Any, name: str) -> None:
    source = ssmvl.build_model("quickstart", "model.language.mixer.norm_groups=4").language
    tensors = {f"backbone.{key}": t for key, t in source.state_dict().items()}
    folder = hub.model("someone/language")
    (folder / "config.json").write_text('{"ssm_cfg": {"layer": "Mamba2", "d_state": 16, "headdim": 32, "ngroups": 4}}')
    if name == "pytorch_model.bin":
        torch.save(tensors, folder / name)
    else:
        files.write_tensors(folder / name, tensors)
    mixer = "{name: mamba2, norm_groups: 4}"
    overrides = [f"model.language={{weights: someone/language, mixer: {mixer}}}"]
    model = ssmvl.build_model("quickstart", *overrides, weights="recipe")
    for key, tensor in model.language.state_dict().items():
        assert torch.equal(tensor, source.state_dict()[key])


def test_the_language_model_for_transformers(one_group: Assistant, tmp_path: Path) -> None:
    assistant = one_group
    assistant.save_language(tmp_path / "language")
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "language").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "language")
    transformers.logging.set_verbosity(before)
    ids = torch.tensor([tokenizer("What is in row 2?").input_ids])
    assert ids[0].tolist() == assistant.processor.tokenizer.encode("What is in row 2?").ids
    assert tokenizer.eos_token_id == assistant.processor.end_id
    language: Any = assistant.model.language
    with torch.no_grad():
        expected = language.head(language.backbone(language.embed(ids)))
        torch.testing.assert_close(reference(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_language_model_built_by_transformers(tmp_path: Path, assistant: Assistant) -> None:
    config = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config |= {"intermediate_size": 48, "vocab_size": 400, "tie_word_embeddings": True}
    recipe = ssmvl.load_recipe("quickstart", f"model.language={{name: causal_lm, num_tokens: 339, config: {config}}}")
    own = Assistant(ssmvl.build_model(recipe), assistant.processor, recipe)
    own.save_language(tmp_path / "language")
    reference, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "language").eval(), torch.tensor([[3, 1, 4]])
    language: Any = own.model.language
    with torch.no_grad():
        torch.testing.assert_close(reference(ids).logits, language.head(language.backbone(language.embed(ids))))


def test_transformers_stops_at_our_end_token(tmp_path: Path, assistant: Assistant) -> None:
    """This includes its own models, even if their config has a different end token."""
    config = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config |= {"intermediate_size": 48, "vocab_size": 400, "eos_token_id": 2}
    tokens = assistant.processor.tokenizer.get_vocab_size()
    causal_lm = f"model.language={{name: causal_lm, num_tokens: {tokens}, config: {config}}}"
    for name, overrides in (("ours", ["model.language.mixer.num_groups=1"]), ("transformers", [causal_lm])):
        recipe = ssmvl.load_recipe("quickstart", *overrides)
        model, end = ssmvl.build_model(recipe), assistant.processor.end_id
        Assistant(model, assistant.processor, recipe).save_language(tmp_path / name)
        language = AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()
        assert language.generation_config.eos_token_id == end
        language.get_output_embeddings().register_forward_hook(
            lambda module, inputs, logits, end=end: logits.index_fill(-1, torch.tensor([end]), 1e9)
        )
        ids = torch.tensor([[3, 1, 4]])
        assert language.generate(ids, do_sample=False, max_new_tokens=8)[0].tolist() == [3, 1, 4, end]


def test_a_language_model_that_transformers_does_not_support(assistant: Assistant, tmp_path: Path) -> None:
    recipe = ssmvl.load_recipe("quickstart")  # four groups, but one norm
    other = Assistant(ssmvl.build_model(recipe), assistant.processor, recipe)
    with pytest.raises(ContractError, match="norm_groups must equal num_groups, which is 4, but is 1"):
        other.save_language(tmp_path / "language")
    assert not (tmp_path / "language").exists()


def flip(path: Path, index: int) -> None:
    data = bytearray(path.read_bytes())
    data[index] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("shards", [False, True])
def test_a_flipped_byte_is_found_and_its_file_named(
    assistant: Assistant, tmp_path: Path, shards: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shards:
        monkeypatch.setattr(files, "SHARD", 10**6)
    folder = tmp_path / "model"
    assistant.save_pretrained(folder)
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=folder, check=True)
    assert_equal(ssmvl.load(folder), assistant)
    path = max(folder.glob("*.safetensors"))
    flip(path, path.stat().st_size - 3)
    for read in (lambda: ssmvl.load(folder), lambda: ssmvl.build_model("quickstart", weights=folder)):
        with pytest.raises(CheckpointError, match=rf"{path.name} is damaged: its SHA-256 digest does not match"):
            read()
    assert ssmvl.load(folder, verify=False).model is not None
    (folder / "SHA256SUMS").unlink()
    assert ssmvl.load(folder).model is not None


def test_a_model_of_an_earlier_version_without_digests_loads(assistant: Assistant, tmp_path: Path) -> None:
    assistant.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "SHA256SUMS").unlink()
    assert_equal(ssmvl.load(tmp_path / "model"), assistant)


def lora(model: Any) -> None:
    model.language = peft.get_peft_model(model.language, peft.LoraConfig(r=2, target_modules=["in_proj"]))


def pruned(model: Any) -> None:
    prune.l1_unstructured(model.connector.layers[0].mixer.in_proj, "weight", amount=0.5)


def wider(model: Any) -> None:
    model.language.norm_f = torch.nn.RMSNorm(64)


def eps(model: Any) -> None:
    model.language.norm_f.eps = 0.5


def swapped_activation(model: Any) -> None:
    model.connector.stem[1] = torch.nn.ReLU()


def dynamic_int8(model: Any) -> None:
    model.connector = torch.ao.quantization.quantize_dynamic(model.connector, {torch.nn.Linear})


def not_a_number(model: Any) -> None:
    with torch.no_grad():
        model.language.norm_f.weight[3] = float("nan")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lora, r"missing language\.embedding\.weight .*merge_and_unload"),
        (lambda model: parametrizations.weight_norm(model.language.layers[0].mixer.in_proj), "original0"),
        (pruned, r"missing connector\.layers\.0\.mixer\.in_proj\.weight"),
        (wider, r"language\.norm_f\.weight is \(64,\), the model has \(128,\)"),
        (not_a_number, r"1 of \d+ tensors are not finite: language\.norm_f\.weight"),
        (lambda model: model.to("meta"), "a model on meta has no weights"),
        (eps, r"language\.norm_f\.eps is 0\.5, the recipe needs 1e-05"),
        (swapped_activation, r"connector\.stem\.1 is 'ReLU', the recipe needs 'GELU'"),
        (dynamic_int8, "are not tensors; quantized models cannot be saved"),
    ],
)
def test_a_model_that_could_not_be_loaded_is_not_written(
    assistant: Assistant, tmp_path: Path, change: Callable[[Any], object], why: str
) -> None:
    assistant.save_pretrained(tmp_path / "model")
    changed = copy.deepcopy(assistant)
    change(changed.model)
    with pytest.raises(CheckpointError, match=f"(?s)model was not written: .*{why}"):
        changed.save_pretrained(tmp_path / "model")
    assert_equal(ssmvl.load(tmp_path / "model"), assistant)  # the older model is kept


def test_wrappers_and_merged_adapters_are_saved_under_original_names(assistant: Assistant, tmp_path: Path) -> None:
    wrapped: Any = copy.deepcopy(assistant)
    wrapped.model.connector = torch.nn.DataParallel(torch.compile(wrapped.model.connector))
    wrapped.model.language.layers[0] = torch.compile(torch.nn.DataParallel(wrapped.model.language.layers[0]))
    wrapped.model = torch.compile(wrapped.model)
    wrapped.save_pretrained(tmp_path / "wrapped")
    assert_equal(ssmvl.load(tmp_path / "wrapped"), assistant)
    adapted: Any = copy.deepcopy(assistant)
    lora(adapted.model)
    with torch.no_grad():
        for name, parameter in adapted.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    adapted.model.language = adapted.model.language.merge_and_unload()
    adapted.save_pretrained(tmp_path / "merged")
    assert_equal(ssmvl.load(tmp_path / "merged"), adapted)
    name = "language.layers.0.mixer.in_proj.weight"
    assert not torch.equal(adapted.model.state_dict()[name], assistant.model.state_dict()[name])


def test_a_tokenizer_of_a_different_size_is_not_written(assistant: Assistant, tmp_path: Path) -> None:
    other = copy.copy(assistant)
    other.processor = replace(assistant.processor, tokenizer=byte_tokenizer())
    with pytest.raises(CheckpointError, match=r"the tokenizer has 257 ids, but the language model has \d+"):
        other.save_pretrained(tmp_path / "model")


def test_weights_shared_by_two_layers_are_written_twice(assistant: Assistant, tmp_path: Path) -> None:
    shared: Any = copy.deepcopy(assistant)
    first, second, *_ = shared.model.language.layers
    second.mixer.in_proj.weight = first.mixer.in_proj.weight
    shared.save_pretrained(tmp_path / "model")
    assert_equal(ssmvl.load(tmp_path / "model"), shared)


def test_a_prompt_other_than_the_recipes_is_rejected(assistant: Assistant, tmp_path: Path) -> None:
    other = copy.copy(assistant)
    other.processor = replace(assistant.processor, prompt=VicunaPrompt())
    with pytest.raises(CheckpointError, match="prompt is VicunaPrompt, but the recipe's is MambaPrompt"):
        other.save_pretrained(tmp_path / "model")


@pytest.mark.parametrize("change", [not_a_number, lora, eps])
def test_a_language_model_alone_is_checked_too(
    assistant: Assistant, tmp_path: Path, change: Callable[[Any], object]
) -> None:
    changed = copy.deepcopy(assistant)
    change(changed.model)
    with pytest.raises((CheckpointError, ContractError)):
        changed.save_language(tmp_path / "language")
    assert not (tmp_path / "language").exists()


def test_digests_without_a_file_are_damaged(assistant: Assistant, tmp_path: Path) -> None:
    assistant.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "SHA256SUMS").write_text("")
    with pytest.raises(CheckpointError, match=r"SHA256SUMS is damaged: it does not list model\.safetensors"):
        ssmvl.load(tmp_path / "model")


def test_a_saved_model_of_version_1_begins_texts_as_in_its_training(tmp_path: Path) -> None:
    words = json.loads(load_tokenizer("words")[0].to_str())
    begin = {"SpecialToken": {"id": END, "type_id": 0}}
    single = [begin, {"Sequence": {"id": "A", "type_id": 0}}]
    number = load_tokenizer("words")[0].token_to_id(END)
    added = {END: {"id": END, "ids": [number], "tokens": [END]}}
    words["post_processor"] = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": added}
    (tmp_path / "tokenizer.json").write_text(json.dumps(words))
    recipe = ssmvl.load_recipe("quickstart", f"model.tokenizer={tmp_path}")
    model = ssmvl.build_model(recipe)
    assistant = Assistant(model, build_processor(recipe, model), recipe)
    assistant.save_pretrained(tmp_path / "model")
    about = tmp_path / "model" / "ssmvl.json"
    for version, begins in ((2, True), (1, False)):
        about.write_text(about.read_text().replace('"format_version": 2', f'"format_version": {version}'))
        ids = ssmvl.load(tmp_path / "model").processor.encode([{"role": "user", "content": "hi"}])["ids"].tolist()
        assert (ids[0] == number) == begins
