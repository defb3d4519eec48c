"""Checkpoints of Mamba language models in the layouts of state-spaces and transformers, read and written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

from ssmvl.checkpoints import open_checkpoint, write_tensors
from ssmvl.errors import CheckpointError, ContractError
from ssmvl.language.mamba_lm import Mamba1LM, MambaLM
from ssmvl.layers.mamba1 import Mamba1Mixer
from ssmvl.layers.mamba2 import Mamba2Mixer
from ssmvl.model.loading import open_weights

WIDTH, LAYERS, TOKENS = 32, 2, 20
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
CONFIG = {
    "d_model": WIDTH, "d_intermediate": 0, "n_layer": LAYERS, "vocab_size": TOKENS, "attn_layer_idx": [],
    "attn_cfg": {}, "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True, "tie_embeddings": True,
}  # fmt: skip


@pytest.fixture(autouse=True)
def silent_transformers() -> Iterator[None]:
    """Silence the hint that a faster path could be installed."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(before)


def mamba1(**options: Any) -> Mamba1LM:
    def mixer(width: int, num_paths: int) -> nn.Module:
        return Mamba1Mixer(width, num_paths, d_state=4)

    return Mamba1LM(width=WIDTH, num_layers=LAYERS, num_tokens=TOKENS, mixer=mixer, **options)


def mamba2(groups: int = 1, d_state: int = 8, norm_groups: int | None = 1, **options: Any) -> MambaLM:
    def mixer(width: int, num_paths: int) -> nn.Module:
        return Mamba2Mixer(width, num_paths, d_state=d_state, head_dim=16, num_groups=groups, norm_groups=norm_groups)

    return MambaLM(width=WIDTH, num_layers=LAYERS, num_tokens=TOKENS, mixer=mixer, **options)


def state_spaces_file(folder: Path, version: int, ssm_cfg: dict[str, Any], **change: Tensor) -> dict[str, Tensor]:
    """Write `pytorch_model.bin` and `config.json` as mamba-ssm does, with hand-written names and shapes."""
    inner = 2 * WIDTH
    rows = 32 if version == 2 else 24  # 20 ids padded to a multiple of 16, and of 8
    if version == 2:
        groups, state = ssm_cfg.get("ngroups", 1), ssm_cfg["d_state"]
        channels, heads = inner + 2 * groups * state, inner // 16
        mixer = {
            "in_proj.weight": (inner + channels + heads, WIDTH), "conv1d.weight": (channels, 1, 4),
            "conv1d.bias": (channels,), "dt_bias": (heads,), "A_log": (heads,), "D": (heads,),
            "norm.weight": (inner,), "out_proj.weight": (WIDTH, inner),
        }  # fmt: skip
    else:
        mixer = {
            "in_proj.weight": (2 * inner, WIDTH), "conv1d.weight": (inner, 1, 4), "conv1d.bias": (inner,),
            "x_proj.weight": (2 + 2 * 4, inner), "dt_proj.weight": (inner, 2), "dt_proj.bias": (inner,),
            "A_log": (inner, 4), "D": (inner,), "out_proj.weight": (WIDTH, inner),
        }  # fmt: skip
    shapes = {"backbone.embedding.weight": (rows, WIDTH), "backbone.norm_f.weight": (WIDTH,)}
    for i in range(LAYERS):
        shapes[f"backbone.layers.{i}.norm.weight"] = (WIDTH,)
        shapes |= {f"backbone.layers.{i}.mixer.{name}": shape for name, shape in mixer.items()}
    tensors = {name: torch.randn(shape) / 4 for name, shape in shapes.items()}
    tensors["lm_head.weight"] = tensors["backbone.embedding.weight"]
    tensors |= change
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps({**CONFIG, "ssm_cfg": ssm_cfg}))
    return tensors


@pytest.mark.parametrize(
    ("version", "ssm_cfg"),
    [
        (1, {"dt_rank": "auto", "expand": 2, "dt_min": 0.001}),
        (2, {"layer": "Mamba2", "d_state": 8, "headdim": 16, "chunk_size": 64, "sequence_parallel": True}),
    ],
)
def test_state_spaces(tmp_path: Path, version: int, ssm_cfg: dict[str, Any]) -> None:
    theirs = state_spaces_file(tmp_path, version, ssm_cfg)
    ours = mamba1() if version == 1 else mamba2()
    open_weights(tmp_path, "language").load(ours)
    assert torch.equal(ours.embedding.weight, theirs["backbone.embedding.weight"])
    assert torch.equal(ours.norm_f.weight, theirs["backbone.norm_f.weight"])
    for i, layer in enumerate(ours.layers):
        assert torch.equal(layer.norm.weight, theirs[f"backbone.layers.{i}.norm.weight"])
        for name, parameter in layer.mixer.named_parameters():
            assert torch.equal(parameter, theirs[f"backbone.layers.{i}.mixer.{name}"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer": "Mamba2", "d_state": 4, "headdim": 16, "ngroups": 2}, "mixer.num_groups is 1, .* needs 2"),
        ({"layer": "Mamba2", "d_state": 8, "headdim": 16, "norm_before_gate": True}, "norm_before_gate is not set"),
        (
            {"layer": "Mamba2", "d_state": 8, "headdim": 16, "dt_limit": [0.0, 1.0]},
            r"dt_limit is .*needs \(0\.0, 1\.0\)",
        ),
    ],
)
def test_a_different_config_with_the_same_shapes(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    state_spaces_file(tmp_path, 2, change)
    with pytest.raises(CheckpointError, match=message):
        open_weights(tmp_path, "language").load(mamba2())


def test_another_vocabulary_another_depth_and_an_untied_head(tmp_path: Path) -> None:
    ssm_cfg = {"layer": "Mamba2", "d_state": 8, "headdim": 16}
    state_spaces_file(tmp_path, 2, ssm_cfg, **{"lm_head.weight": torch.zeros(32, WIDTH)})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from backbone\.embedding\.weight"):
        open_weights(tmp_path, "language").load(mamba2())
    state_spaces_file(tmp_path, 2, ssm_cfg)
    with pytest.raises(CheckpointError, match=r"backbone\.embedding\.weight\) is \(32, 32\), the model has \(48, 32\)"):
        open_weights(tmp_path, "language").load(
            MambaLM(width=WIDTH, num_layers=LAYERS, num_tokens=40, mixer=lambda **_: mamba2().layers[0].mixer)
        )
    state_spaces_file(tmp_path, 2, ssm_cfg, **{"backbone.layers.2.norm.weight": torch.ones(WIDTH)})
    with pytest.raises(CheckpointError, match=r"n_layer 2, but the tensors have 3"):
        open_weights(tmp_path, "language").load(mamba2())


def randomized(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 5)
    return model.eval()


def hf_mamba1(tied: bool) -> nn.Module:
    return MambaForCausalLM(
        MambaConfig(hidden_size=WIDTH, num_hidden_layers=LAYERS, vocab_size=24, state_size=4, tie_word_embeddings=tied)
    )


def hf_mamba2(tied: bool, groups: int = 2) -> nn.Module:
    return Mamba2ForCausalLM(
        Mamba2Config(
            hidden_size=WIDTH, num_hidden_layers=LAYERS, vocab_size=32, state_size=8, head_dim=16, num_heads=4,
            n_groups=groups, tie_word_embeddings=tied, chunk_size=4,
        )
    )  # fmt: skip


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("version", [1, 2])
def test_transformers_files_are_read_and_written(tmp_path: Path, version: int, tied: bool) -> None:
    theirs = randomized(hf_mamba1(tied) if version == 1 else hf_mamba2(tied, groups=1))
    safe = not (tied and version == 2)  # transformers 4.57 does not write that one as safetensors
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB", safe_serialization=safe)
    assert len(list((tmp_path / "theirs").glob("*.index.json"))) == 1
    ours = mamba1(tied=tied) if version == 1 else mamba2(tied=tied)
    open_weights(tmp_path / "theirs", "language").load(ours)
    with torch.no_grad():
        expected, logits = theirs(IDS).logits, ours.head(ours.backbone(ours.embed(IDS)))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)

    tensors, config = ours.to_transformers(end_id=0)
    write_tensors(tmp_path / "model.safetensors", tensors, {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(IDS).logits, expected, rtol=1e-5, atol=1e-5)
    read = mamba1(tied=tied) if version == 1 else mamba2(tied=tied)
    open_weights(tmp_path, "language").load(read)
    assert read.state_dict().keys() == ours.state_dict().keys()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor)


def test_several_groups_are_normalized_as_configured(tmp_path: Path) -> None:
    """transformers 4.57 normalizes the whole width (huggingface/transformers#40861); 5 and mamba-ssm, each group."""
    theirs = randomized(hf_mamba2(False, groups=2))
    theirs.save_pretrained(tmp_path / "theirs")
    whole, each = mamba2(groups=2, norm_groups=1, tied=False), mamba2(groups=2, norm_groups=None, tied=False)
    assert each.layers[0].mixer.norm.groups == 2
    for ours in (whole, each):
        open_weights(tmp_path / "theirs", "language").load(ours)
    with torch.no_grad():
        expected, logits = theirs(IDS).logits, [ours.head(ours.backbone(ours.embed(IDS))) for ours in (whole, each)]
    same, other = logits if transformers.__version__.startswith("4.") else reversed(logits)
    torch.testing.assert_close(same, expected, rtol=1e-4, atol=1e-4)
    assert (other - expected).abs().max() > 0.01
    with pytest.warns(UserWarning, match="transformers before version 5 normalizes the whole width"):
        tensors, config = each.to_transformers(end_id=0)
    assert config["n_groups"] == 2
    write_tensors(tmp_path / "model.safetensors", tensors, {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = mamba2(groups=2, norm_groups=None, tied=False)
    open_weights(tmp_path, "language").load(again)
    with torch.no_grad():
        assert torch.equal(again.head(again.backbone(again.embed(IDS))), logits[1])


@pytest.mark.parametrize("kind", ["mamba1", "mamba2", "state_spaces"])
def test_a_file_must_match_a_config_that_ties_the_head(tmp_path: Path, kind: str) -> None:
    """An untied model would use the file's different head, whereas transformers and mamba-ssm use the embedding."""
    if kind == "state_spaces":
        tensors = state_spaces_file(tmp_path, 1, {})
        path, name = tmp_path / "pytorch_model.bin", "backbone.embedding.weight"
        (tmp_path / "config.json").write_text('{"ssm_cfg": {}, "tie_embeddings": true}')
        ours = mamba1(tied=False)
    else:
        model = hf_mamba1(True) if kind == "mamba1" else hf_mamba2(True, groups=1)
        tensors, name = dict(model.state_dict()), "backbone.embeddings.weight"
        (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict()))
        path = tmp_path / "pytorch_model.bin"
        ours = mamba1(tied=False) if kind == "mamba1" else mamba2(tied=False)
    torch.save({**tensors, "lm_head.weight": tensors[name] + 1}, path)
    with pytest.raises(CheckpointError, match=rf"lm_head\.weight differs from {name}, but config\.json ties them"):
        open_weights(tmp_path, "language").load(ours)
    torch.save({**tensors, "lm_head.weight": tensors[name].clone()}, path)
    open_weights(tmp_path, "language").load(ours)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"rms_norm": False}, "has rms_norm = False; only True is supported"),
        ({"d_intermediate": 128}, "has d_intermediate = 128; only 0 is supported"),
        ({"attn_layer_idx": [1]}, r"has attn_layer_idx = \[1\]; only \[\] is supported"),
        ({"n_layer": 7}, f"has n_layer 7, but the tensors have {LAYERS} layers"),
        ({"norm_epsilon": 1e-6}, r"norm_f\.eps is 1e-05, the checkpoint needs 1e-06"),
        ({"d_model": 999}, f"width is {WIDTH}, the checkpoint needs 999"),
        ({"d_model": WIDTH, "expand": 3}, f"inner is {2 * WIDTH}, the checkpoint needs {3 * WIDTH}"),
        ({"model_type": "falcon_mamba"}, "'falcon_mamba', but mamba-ssm's model types start with 'mamba'"),
        ({"nlayer": 2}, r"unknown options: nlayer\. Allowed: .*n_layer"),
    ],
)
def test_options_outside_of_ssm_cfg_are_compared(tmp_path: Path, option: dict[str, Any], message: str) -> None:
    state_spaces_file(tmp_path, 1, {})
    (tmp_path / "config.json").write_text(json.dumps({"ssm_cfg": {}, "d_model": WIDTH, "n_layer": LAYERS, **option}))
    with pytest.raises(CheckpointError, match=message):
        open_weights(tmp_path, "language").load(mamba1())


def test_transformers_with_other_groups_and_the_same_shapes(tmp_path: Path) -> None:
    hf_mamba2(True, groups=2).save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(CheckpointError, match=r"d_state is 16, .* needs 8\n.*num_groups is 1, .* needs 2"):
        open_weights(tmp_path, "language").load(mamba2(groups=1, d_state=16))
    with pytest.raises(CheckpointError, match=r"norm\.groups is 4, .* needs 1 or 2"):
        open_weights(tmp_path, "language").load(mamba2(groups=2, norm_groups=4))


def test_transformers_with_another_activation(tmp_path: Path) -> None:
    hf_mamba1(True).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_act": "gelu", "layer_norm_epsilon": 1e-6}))
    message = (
        r"hidden_act is not set, .* needs 'gelu'\n.*0\.norm\.eps is 1e-05, .* 1e-06\n.*norm_f\.eps is 1e-05, .* 1e-06"
    )
    with pytest.raises(CheckpointError, match=message):
        open_weights(tmp_path, "language").load(mamba1())


def test_another_model_with_the_same_names_is_rejected(tmp_path: Path) -> None:
    hf_mamba1(True).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "falcon_mamba"}))
    with pytest.raises(CheckpointError, match="has model_type 'falcon_mamba'; supported: mamba, mamba2"):
        open_weights(tmp_path, "language")


def test_mamba1_of_state_spaces_needs_no_config(tmp_path: Path) -> None:
    theirs, ours = state_spaces_file(tmp_path, 1, {}), mamba1()
    for text in (None, "{}", '{"ssm_cfg": null}'):
        (tmp_path / "config.json").unlink() if text is None else (tmp_path / "config.json").write_text(text)
        open_weights(tmp_path, "language").load(ours)
        assert torch.equal(ours.layers[1].mixer.A_log, theirs["backbone.layers.1.mixer.A_log"])


@pytest.mark.parametrize("config", [None, {}, {"d_model": WIDTH}, {"ssm_cfg": ["Mamba2"]}, {"ssm_cfg": "Mamba2"}])
def test_mamba2_of_state_spaces_needs_a_config(tmp_path: Path, config: Any) -> None:
    state_spaces_file(tmp_path, 2, {"layer": "Mamba2", "d_state": 8, "headdim": 16})
    replace_config(tmp_path, config)
    message = r"pytorch_model\.bin: its config\.json (is missing or empty|lacks ssm_cfg|has ssm_cfg = .*; it must)"
    with pytest.raises(CheckpointError, match=message):
        open_weights(tmp_path, "language")


def replace_config(folder: Path, config: Any) -> None:
    (folder / "config.json").unlink(missing_ok=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("version", "ssm_cfg", "message"),
    [
        (1, {"layer": "Mamba2"}, "has layer 'Mamba2', but the tensors are those of Mamba1"),
        (2, {"d_state": 8, "headdim": 16}, "has layer 'Mamba1', but the tensors are those of Mamba2"),
        (
            2,
            {"layer": "Mamba2", "d_state": 8, "A_scale": 2},
            r"unknown ssm_cfg options for Mamba2: A_scale\. Allowed: ",
        ),
        (
            2,
            {"layer": "Mamba2", "d_state": 8, "dt_scale": 1},
            r"unknown ssm_cfg options for Mamba2: dt_scale\. Allowed: ",
        ),
        (1, {"headdim": 64, "dt_rank": 2}, r"unknown ssm_cfg options for Mamba1: headdim\. Allowed: .*dt_rank"),
    ],
)
def test_a_config_that_contradicts_the_tensors_or_has_unknown_options(
    tmp_path: Path, version: int, ssm_cfg: dict[str, Any], message: str
) -> None:
    state_spaces_file(tmp_path, version, {"d_state": 8, **ssm_cfg} if version == 2 else ssm_cfg)
    with pytest.raises(CheckpointError, match=rf"pytorch_model\.bin: .*{message}"):
        open_weights(tmp_path, "language")


@pytest.mark.parametrize("value", [3, "0", None, [0.0], {"a": 1}])
def test_an_invalid_dt_limit_is_a_difference(tmp_path: Path, value: Any) -> None:
    state_spaces_file(tmp_path, 2, {"layer": "Mamba2", "d_state": 8, "headdim": 16, "dt_limit": value})
    with pytest.raises(CheckpointError, match=r"dt_limit is \(0\.0, inf\), the checkpoint needs"):
        open_weights(tmp_path, "language").load(mamba2())


@pytest.mark.parametrize("version", [1, 2])
def test_transformers_files_need_a_config(tmp_path: Path, version: int) -> None:
    (hf_mamba1(True) if version == 1 else hf_mamba2(True)).save_pretrained(tmp_path, safe_serialization=False)
    config = json.loads((tmp_path / "config.json").read_text())
    required = (
        ["model_type"] if version == 1 else ["model_type", "n_groups", "state_size", "head_dim", "time_step_limit"]
    )
    for key in required:
        replace_config(tmp_path, {k: v for k, v in config.items() if k != key})
        with pytest.raises(CheckpointError, match=rf"pytorch_model\.bin: its config\.json lacks {key}, "):
            open_weights(tmp_path, "language")
    for empty in ({}, None):
        replace_config(tmp_path, empty)
        with pytest.raises(CheckpointError, match=r"its config\.json is missing or empty, "):
            open_weights(tmp_path, "language")
    replace_config(tmp_path, {**config, "model_type": "mamba2" if version == 1 else "mamba"})
    with pytest.raises(
        CheckpointError, match=rf"describes Mamba{3 - version}, but the tensors are those of Mamba{version}"
    ):
        open_weights(tmp_path, "language")


def test_the_norm_eps_of_a_file_must_match_the_model(tmp_path: Path) -> None:
    hf_mamba2(True).save_pretrained(tmp_path, safe_serialization=False)
    ours = mamba2(groups=2)
    ours.layers[0].mixer.norm.eps = 1e-6
    with pytest.raises(CheckpointError, match=r"layers\.0\.mixer\.norm\.eps is 1e-06, the checkpoint needs 1e-05"):
        open_weights(tmp_path, "language").load(ours)


def test_models_without_an_equivalent_in_transformers() -> None:
    with pytest.raises(ContractError, match="norm_groups must equal num_groups, which is 2, but is 1"):
        mamba2(groups=2, norm_groups=1).to_transformers(0)
    other = mamba2()
    other.layers[0].mixer = nn.Linear(1, 1)
    with pytest.raises(ContractError, match="transformers has no language model with Linear mixers"):
        other.to_transformers(0)


def test_a_language_model_is_not_a_whole_model(tmp_path: Path) -> None:
    hf_mamba1(True).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"this file holds a language model; load it with model\.language"):
        open_weights(tmp_path, "model")
    assert "lm_head.weight" not in open_checkpoint(tmp_path).tensors
