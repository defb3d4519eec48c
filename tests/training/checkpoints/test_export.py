"""Export of a checkpoint file or of shards: the saved model is bit-equal, and no code in the checkpoint is executed."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from made_checkpoints import CHECKPOINTS, FILE, SHARDS, WRITERS, equal, run_of, state, weights, write_file, write_shards
from ranks import two_ranks
from torch import Tensor
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

import ssmvl
from ssmvl.checkpoints import read_tensors
from ssmvl.errors import CheckpointError, RecipeError
from ssmvl.recipes.merge import load_recipe
from ssmvl.training.checkpoints.export import export, find_checkpoint
from ssmvl.training.checkpoints.latest import latest_complete

# Composer and streaming warn by themselves, and torch when it saves shards of one rank.
pytestmark = pytest.mark.filterwarnings("default")
OUT = Path("out")


@pytest.fixture
def tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Tensors of the quickstart's model; its run folder is in the working directory."""
    monkeypatch.chdir(tmp_path)
    return run_of("quickstart")[1]


class Runs:
    """Calls a function when it is unpickled."""

    def __init__(self, call: Callable[..., Any], *args: object) -> None:
        self.call, self.args = call, args

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, ...]]:
        return self.call, self.args


RAN = Path("ran")
MKDIR = Runs(os.makedirs, str(RAN), 0o777, True)
COPY = Runs(shutil.copyfile, "runs/quickstart/recipe.yaml", str(RAN))


@pytest.mark.long
def test_checkpoints_of_real_runs(tiny: Path) -> None:
    short = ("stages.align=null", "stages.order=null", "stages.finetune.duration=2ba", "evaluation=null")
    ssmvl.train(tiny, "run=one", *short)
    two_ranks(lambda: ssmvl.train(tiny, "run=two", *short), tiny.parent)
    for run, end in (("one", "-rank0.pt"), ("two", "")):
        checkpoints, saved = Path("runs", run, "finetune/checkpoints"), Path("runs", run, "model")
        last, first = Path(f"{run}2"), Path(f"{run}1")
        assert export(checkpoints, last) == (f"{checkpoints}/ep0-ba2{end}", [])
        assert equal(weights(last), weights(saved))
        assert {p.name: p.read_bytes() for p in last.iterdir()} == {p.name: p.read_bytes() for p in saved.iterdir()}
        export(checkpoints / f"ep0-ba1{end}", first)
        assert not equal(weights(first), weights(saved))


@pytest.mark.parametrize("kind", WRITERS)
def test_only_the_model_is_exported_bit_equal(kind: str, tensors: dict[str, Tensor]) -> None:
    path = WRITERS[kind](state(tensors))
    assert export(path, OUT) == (str(path), [])
    assert equal(weights(OUT), tensors)
    elsewhere = Path(shutil.move(CHECKPOINTS, Path("elsewhere/quickstart/align")))  # as with `checkpoints: elsewhere`
    with pytest.raises(CheckpointError, match=r"is not in a run folder \(.*\).*--recipe .* with the run folder"):
        export(elsewhere, "out2")
    export(elsewhere, "out2", recipe="runs/quickstart")
    assert equal(weights(Path("out2")), tensors)


def test_a_tied_tensor_is_saved_once(tensors: dict[str, Tensor]) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    config = {"model_type": "llama", **sizes, "vocab_size": 352, "tie_word_embeddings": True}
    language = f"model.language={{name: causal_lm, num_tokens: 339, config: {json.dumps(config)}}}"
    recipe, tied = run_of("quickstart", "run=tied", language)
    shards = Path("runs/tied/align/checkpoints/ep0-ba4")
    out = Path("tied")
    export(write_shards(shards, state(tied)), out, recipe=recipe)  # the shards hold it twice
    assert tied.keys() - read_tensors(out / "model.safetensors")[0].keys() == {"language.model.lm_head.weight"}
    assert equal(weights(out), tied)


@pytest.mark.parametrize("kind", WRITERS)
def test_a_damaged_checkpoint_is_skipped(kind: str, tensors: dict[str, Tensor]) -> None:
    latest = WRITERS[kind](state(tensors))
    older = latest.rename(latest.with_name(latest.name.replace("ba4", "ba2")))
    WRITERS[kind](state(tensors))
    os.truncate(max(latest.rglob("*"), default=latest), 1000)  # the last name is that of a shard
    path, (reason,) = export(CHECKPOINTS, OUT)
    assert path == str(older)
    assert reason.startswith(f"{latest} ")
    with pytest.raises(CheckpointError, match=rf"^{re.escape(reason)}$"):
        find_checkpoint(latest)
    shutil.rmtree(older) if older.is_dir() else older.unlink()
    expected = rf"no complete checkpoint:\n  {re.escape(reason)}\npass the directory of a stage's checkpoints"
    with pytest.raises(CheckpointError, match=expected):
        find_checkpoint(CHECKPOINTS)


def test_a_file_executes_no_code(tensors: dict[str, Tensor]) -> None:
    content = state(tensors)
    content["state"]["callbacks"]["Copy"] = COPY
    write_file(FILE, content)
    torch.load(FILE, weights_only=False)
    assert RAN.is_file(), "unrestricted unpickling executes it"
    RAN.unlink()
    export(FILE, OUT)
    assert equal(weights(OUT), tensors)
    content["state"]["callbacks"]["Mkdir"] = MKDIR  # from a module that torch rejects by name
    write_file(FILE, content)
    with pytest.raises(CheckpointError, match=r"cannot be read \(UnpicklingError: .*os\.makedirs"):
        export(FILE, "out2")
    with pytest.raises(CheckpointError, match=r"cannot be read \(UnpicklingError: .*os\.makedirs"):
        export(FILE, "out2", trust_pickle=True)
    assert not RAN.exists()


def test_an_index_executes_no_code_unless_it_is_trusted(tensors: dict[str, Tensor]) -> None:
    write_shards(SHARDS, state(tensors), lambda metadata: setattr(metadata, "planner_data", MKDIR))
    for name in (SHARDS, CHECKPOINTS):
        with pytest.raises(CheckpointError, match=r"(?s)more than names.*\(os\.makedirs\).*pass --trust-pickle"):
            export(name, OUT)
    assert not RAN.exists()
    export(CHECKPOINTS, OUT, trust_pickle=True)
    assert RAN.is_dir()
    assert equal(weights(OUT), tensors)


def bytes_for_a_tensor(metadata: Metadata) -> None:
    """Torch's own reader would unpickle these bytes."""
    metadata.state_dict_metadata["state.model.model.language.norm_f.weight"] = BytesStorageMetadata()


def pickle_in_a_part(metadata: Metadata) -> None:
    buffer = io.BytesIO()
    torch.save(MKDIR, buffer)
    shard = SHARDS / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes() + buffer.getvalue())
    for key, entry in metadata.storage_data.items():
        if key.fqn == "state.model.model.language.norm_f.weight":
            entry.offset, entry.length = shard.stat().st_size - len(buffer.getvalue()), len(buffer.getvalue())


def part_in_another_directory(metadata: Metadata) -> None:
    for entry in metadata.storage_data.values():
        entry.relative_path = f"../ep0-ba4/{entry.relative_path}"


def part_out_of_bounds(metadata: Metadata) -> None:
    for key in metadata.storage_data:
        object.__setattr__(key, "offset", torch.Size([3] * len(key.offset or ())))


def missing_part(metadata: Metadata) -> None:
    metadata.storage_data = {k: v for k, v in metadata.storage_data.items() if not k.fqn.endswith("norm_f.weight")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (bytes_for_a_tensor, r"does not fit the model:\n  missing language\.norm_f\.weight \(128,\)$"),
        (pickle_in_a_part, r"cannot be read \(UnpicklingError: .*os\.makedirs"),
        (part_in_another_directory, r"'\.\./ep0-ba4/__0_0\.distcp' is in another directory"),
        (part_out_of_bounds, r"a part of .* is out of bounds; the index is damaged"),
        (missing_part, r"the index does not list all parts of state\.model\.model\.language\.norm_f\.weight$"),
    ],
)
def test_a_bad_index(change: Callable[[Metadata], None], message: str, tensors: dict[str, Tensor]) -> None:
    write_shards(SHARDS, state(tensors), change)
    with pytest.raises(CheckpointError, match=message):
        export(SHARDS, OUT)
    assert not OUT.exists()
    assert not RAN.exists()


@pytest.mark.parametrize("kind", WRITERS)
def test_files_without_a_trained_model(kind: str, tensors: dict[str, Tensor]) -> None:
    optimizer = {"state": {"optimizers": state(tensors)["state"]["optimizers"]}}
    for content in (optimizer, {"weight": torch.zeros(2)}, {"state": torch.zeros(2)}):
        path = WRITERS[kind](content)
        with pytest.raises(CheckpointError, match=r"holds no model of a training run"):
            export(path, OUT)
        shutil.rmtree(CHECKPOINTS)


@pytest.mark.parametrize("kind", WRITERS)
def test_the_checkpoint_of_another_recipe(kind: str, tensors: dict[str, Tensor]) -> None:
    path = WRITERS[kind](state(tensors))
    recipe, _ = run_of("quickstart", "run=other", "model.language.num_layers=3")
    expected = r"ep0-ba4.*, with the recipe .*, does not fit the model:\n  unexpected language\.layers\.3\."
    with pytest.raises(CheckpointError, match=expected):
        export(path, OUT, recipe=recipe)
    with pytest.raises(RecipeError, match="unknown recipe 'nothing'"):
        export(path, OUT, recipe="nothing")
    assert not OUT.exists()


def test_a_different_model_of_the_same_shapes(tensors: dict[str, Tensor]) -> None:
    write_file(FILE, state(tensors))
    with pytest.raises(CheckpointError, match=r"(?s)weights of a different model.*language\.layers\.0\.mixer.*groups"):
        export(FILE, OUT, recipe=load_recipe("quickstart", "model.language.mixer.norm_groups=2"))
    assert not OUT.exists()


def test_the_prompt_of_a_checkpoint_outside_a_stage_directory_is_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _, tensors = run_of("quickstart", "stages.align.prompt=plain")
    elsewhere = write_file(Path("copied/ep0-ba4-rank0.pt"), state(tensors))
    with pytest.warns(UserWarning, match=r"is not in a stage's directory, .*stages\.align\.prompt: 'plain' overrides"):
        export(elsewhere, OUT, "runs/quickstart")
    write_file(FILE, state(tensors))
    export(FILE, "known")
    prompts = [load_recipe(folder).data["model"]["prompt"]["name"] for folder in (OUT, "known")]
    assert prompts == ["mamba", "plain"]


def test_a_flipped_byte_in_a_file_is_found(tensors: dict[str, Tensor]) -> None:
    write_file(FILE, state(tensors))
    data = bytearray(FILE.read_bytes())
    data[data.find(tensors["language.embedding.weight"].numpy().tobytes()) + 163] ^= 64
    FILE.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"is damaged: its entry .* does not match the checksum in the file"):
        export(FILE, OUT)
    (reason,) = latest_complete(CHECKPOINTS, finite=True)[1].values()
    assert "does not match the checksum" in reason


def test_paths_without_a_checkpoint(tensors: dict[str, Tensor]) -> None:
    with pytest.raises(CheckpointError, match=r"^gs://bucket/ep0-ba4: no such file .* only s3:// .*, so copy it here"):
        export("gs://bucket/ep0-ba4", OUT)
    with pytest.raises(CheckpointError, match=r"quickstart holds no checkpoint of a run; pass the directory of"):
        export("runs/quickstart", OUT)
    SHARDS.mkdir(parents=True)  # of a run that was killed while writing
    with pytest.raises(CheckpointError, match=r"ep0-ba4 cannot be read \(FileNotFoundError: .*\.metadata"):
        export(SHARDS, OUT)
    with pytest.raises(CheckpointError, match=r"recipe\.yaml cannot be read \(BadZipFile"):
        export("runs/quickstart/recipe.yaml", OUT)


def test_a_directory_with_other_files_is_kept(tensors: dict[str, Tensor]) -> None:
    write_file(FILE, state(tensors))
    for out in (CHECKPOINTS, Path("runs/quickstart")):
        before = sorted(out.rglob("*"))
        with pytest.raises(CheckpointError, match=r"nothing is overwritten: choose an empty or new directory"):
            export(FILE, out)
        assert sorted(out.rglob("*")) == before


def test_a_saved_model_is_kept_and_is_not_a_checkpoint(tensors: dict[str, Tensor]) -> None:
    write_file(FILE, state(tensors))
    export(FILE, OUT)
    before = {path.name: path.read_bytes() for path in OUT.iterdir()}
    with pytest.raises(CheckpointError, match=r"^out holds README\.md, .*; nothing is overwritten: choose an empty"):
        export(FILE, OUT)
    assert {path.name: path.read_bytes() for path in OUT.iterdir()} == before
    with pytest.raises(CheckpointError, match=r"^out is already a saved model; load it with ssmvl\.load"):
        export(OUT, "again")
    with pytest.raises(CheckpointError, match=r"^out/model\.safetensors needs no export"):
        export(OUT / "model.safetensors", "again")
