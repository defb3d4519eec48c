from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hub import Hub
from huggingface_hub import hf_hub_download
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ssmvl.errors import Problem, RecipeError
from ssmvl.processing.tokenizers import byte_tokenizer
from ssmvl.recipes.merge import load_recipe
from ssmvl.training.checked import check
from ssmvl.training.freezing import is_under
from ssmvl.training.stage_prompts import recipe_after

Install = Callable[[str, str], None]

SCANS = """
import torch, ssmvl

def twice(grid):
    order = torch.arange(grid.length)
    order[4] = 2
    return order[None]

def short(grid):
    return torch.arange(grid.length - 1)[None]

def floats(grid):
    return torch.arange(grid.length, dtype=torch.float32)[None]

@ssmvl.hookimpl
def ssmvl_register(register):
    for order in (twice, short, floats):
        register("scan_order", order.__name__, order)
"""


def problems(*overrides: str) -> dict[str, str]:
    with pytest.raises(RecipeError) as caught:
        check(load_recipe("quickstart", *overrides))
    assert all(isinstance(problem, Problem) for problem in caught.value.problems)
    return dict(caught.value.problems)


def test_a_valid_recipe_becomes_a_plan_with_its_order_of_stages() -> None:
    checked = check(load_recipe("quickstart", "stages.align.batch=7"))
    plan, notes = checked.plan, checked.notes
    assert list(plan.stages) == ["align", "finetune"]
    assert plan.stages["align"].batch == 7
    assert plan.stages["finetune"].optimizer.betas == (0.9, 0.98)
    assert plan.evaluation is not None
    assert notes == []


def test_prompts_that_differ_from_the_models_are_noted_and_saved() -> None:
    shares = "{a: {data: {name: digit_scenes}, prompt: zephyr}, b: {data: {name: digit_scenes}}}"
    recipe = load_recipe(
        "quickstart", "stages.align.prompt=plain", f"stages.finetune.data={{name: mix, streams: {shares}}}"
    )
    assert check(recipe).notes == [
        "stages.align.prompt: 'plain' overrides model.prompt 'mamba'; the stage's model is saved with 'plain'",
        "stages.finetune.data.streams.a.prompt: 'zephyr', but the stage's model is saved with 'mamba'",
    ]
    assert recipe_after(recipe, "align").data["model"]["prompt"] == {"name": "plain"}
    same = "{a: {data: {name: digit_scenes}, prompt: zephyr}, b: {data: {name: digit_scenes}, prompt: zephyr}}"
    mixed = load_recipe("quickstart", f"stages.finetune.data={{name: mix, streams: {same}}}")
    assert recipe_after(mixed, "finetune").data["model"]["prompt"] == {"name": "zephyr"}
    assert recipe_after(recipe, "finetune") is recipe
    assert recipe.data["model"]["prompt"] == {"name": "mamba"}


def test_order_overrides_the_order_of_the_mapping() -> None:
    plan = check(load_recipe("quickstart", "stages.order=[finetune, align]")).plan
    assert list(plan.stages) == ["finetune", "align"]


def test_a_recipe_may_have_no_evaluation() -> None:
    plan = check(load_recipe("quickstart", "evaluation=null")).plan
    assert plan.evaluation is None


def test_checking_allocates_no_weight() -> None:
    sizes: list[int] = []

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            tensors = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
            sizes.extend(tensor.numel() for tensor in tensors if tensor.device.type != "meta")
            return out

    with Largest():
        check(load_recipe("quickstart"), weights=False)  # weight files would be read into memory
    assert sizes
    assert max(sizes) < 100


def test_several_mistakes_are_all_reported() -> None:
    found = problems("model.connector.mixer.d_stat=1", "stages.align.batch=many", "evaluation.data.nosuch=1")
    assert set(found) == {"model.connector.mixer.d_stat", "stages.align.batch", "evaluation.data.nosuch"}
    assert "Did you mean 'd_state'?" in found["model.connector.mixer.d_stat"]


def test_mistakes_in_composer_options_are_reported_with_the_others() -> None:
    found = problems(
        "model.language.name=mamba2_ml",
        "stages.align.callbacks={LRMonito: {}}",
        "stages.finetune.loggers={FileLogger: {filenam: x}}",
        "stages.finetune.duration=soon",
        "stages.order=[align]",
    )
    assert set(found) == {
        "model.language",
        "stages.align.callbacks.LRMonito",
        "stages.finetune.loggers.FileLogger.filenam",
        "stages.finetune.duration",
        "stages.order",
    }
    assert "Did you mean 'mamba2_lm'?" in found["model.language"]
    assert "Did you mean 'LRMonitor'?" in found["stages.align.callbacks.LRMonito"]
    assert "Did you mean 'filename'?" in found["stages.finetune.loggers.FileLogger.filenam"]


@pytest.mark.parametrize(
    ("override", "path"),
    [
        ("stages.align.duration=soon", "stages.align.duration"),
        ("stages.align.duration=500", "stages.align.duration"),
        ("stages.align.duration=''", "stages.align.duration"),
        ("stages.align.duration=-5ba", "stages.align.duration"),
        ("stages.align.warmup=3%", "stages.align.warmup"),
        ("stages.align.checkpoint=50", "stages.align.checkpoint"),
        ("stages.align.batch=0", "stages.align.batch"),
        ("stages.align.batch='0'", "stages.align.batch"),
        ("stages.align.batch=???", "stages.align.batch"),
        ("stages.align.microbatch=-1", "stages.align.microbatch"),
        ("stages.align.sharding=fsdp1", "stages.align.sharding"),
        ("stages.align.train=connector", "stages.align.train"),
        ("stages.align.train=[]", "stages.align.train"),
        ("stages.align.optimizer.betas=[0.9]", "stages.align.optimizer.betas"),
        ("stages.align.data=digit", "stages.align.data"),
        ("stages.order=[align, align]", "stages.order"),
        ("stages.order=[align, finetune, third]", "stages.order"),
        ("stages.order=align", "stages.order"),
        ("stages=null", "stages"),
        ("evaluation.batch=0", "evaluation.batch"),
        ("model.encoders={}", "model.encoders"),
        ("model.encoders=null", "model.encoders"),
        ("run=null", "run"),
        ("seed=null", "seed"),
    ],
)
def test_one_mistake_gives_one_problem_at_its_path(override: str, path: str) -> None:
    overrides = ["model.encoders=null", override] if override == "model.encoders={}" else [override]
    assert list(problems(*overrides)) == [path]


def test_a_recipe_without_stages_cannot_be_trained() -> None:
    recipe = load_recipe("quickstart")
    del recipe.data["stages"]
    with pytest.raises(RecipeError, match="stages: Plan needs 'stages'"):
        check(recipe)


@pytest.mark.parametrize("prefix", ["conector", "connecto", "connector.", "connector.layers.9", ""])
def test_a_prefix_that_matches_nothing_is_reported_at_its_path(prefix: str) -> None:
    found = problems(f"stages.align.train=['{prefix}']", f"stages.finetune.optimizer.lr_of={{'{prefix}': 1e-3}}")
    assert set(found) == {"stages.align.train", "stages.finetune.optimizer.lr_of"}
    assert all(f"no parameter of the model is under {prefix!r}" in message for message in found.values())


def test_the_nearest_prefix_is_suggested() -> None:
    assert "Did you mean 'connector'?" in problems("stages.align.train=[conector]")["stages.align.train"]
    assert "'encoders.coarse'?" in problems("stages.align.train=[encoders.corse]")["stages.align.train"]


@pytest.mark.parametrize(
    ("name", "prefix", "under"),
    [
        ("connector.a", "connector", True),
        ("connector", "connector", True),
        ("connector2.a", "connector", False),
        ("a", "a.b", False),
    ],
)
def test_a_prefix_matches_whole_parts_only(name: str, prefix: str, under: bool) -> None:
    assert is_under(name, prefix) is under


@pytest.mark.parametrize(
    "callbacks",
    [
        "{LRMonitor: null}",
        "{EarlyStopper: {monitor: evaluation/loss, dataloader_label: evaluation}}",
        "{ThresholdStopper: {monitor: evaluation/accuracy/all, dataloader_label: evaluation, threshold: 0.9}}",
    ],
)
def test_composer_callbacks_are_accepted(callbacks: str) -> None:
    evaluation = "stages.align.evaluation={data: digit_scenes}"
    check(load_recipe("quickstart", f"stages.align.callbacks={callbacks}", evaluation))


@pytest.mark.parametrize(
    ("callbacks", "path"),
    [
        ("{LRMonitor: 5}", "stages.align.callbacks.LRMonitor"),
        ("{LRMonitor: {x: 1}}", "stages.align.callbacks.LRMonitor.x"),
        ("{EarlyStopper: {monitor: loss}}", "stages.align.callbacks.EarlyStopper"),
        ("[LRMonitor]", "stages.align.callbacks"),
    ],
)
def test_callback_options_are_checked(callbacks: str, path: str) -> None:
    assert list(problems(f"stages.align.callbacks={callbacks}")) == [path]


def test_without_composer_the_check_notes_what_it_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssmvl.training.composer_classes.find_spec", lambda name: None)
    notes = check(load_recipe("quickstart", "stages.align.callbacks={NoSuch: {}}")).notes
    assert any(note.startswith("stages.align.callbacks: not checked") for note in notes)


def test_a_tokenizer_with_other_ids_is_reported_with_the_other_problems() -> None:
    found = problems("model.tokenizer=bytes", "stages.align.train=[conector]")
    assert set(found) == {"model.tokenizer", "stages.align.train"}
    assert "but tokenizer 'bytes' has 257 ids" in found["model.tokenizer"]


@pytest.mark.parametrize("name", ["nowhere", "none.json", "a/b/c", "x--y/z"])
def test_a_missing_tokenizer_is_a_problem(hub: Hub, name: str) -> None:
    assert f"cannot load the tokenizer: {name}: " in problems(f"model.tokenizer={name}")["model.tokenizer"]
    assert hub.requests == []


def test_a_tokenizer_on_the_hub_is_checked_once_it_is_downloaded(hub: Hub) -> None:
    folder, recipe = hub.model("owner/lm"), load_recipe("quickstart", "model.tokenizer=owner/lm")
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text("{}")
    note = "model.tokenizer: not checked, owner/lm is not in the hub's cache; it is downloaded when training starts"
    assert check(recipe).notes == [note]
    hf_hub_download("owner/lm", "tokenizer.json")  # without its config, its end token is unknown
    assert check(recipe).notes == [note]
    hf_hub_download("owner/lm", "tokenizer_config.json")
    hub.close()
    assert "has 257 ids" in problems("model.tokenizer=owner/lm")["model.tokenizer"]
    assert check(load_recipe(recipe, "model.language.num_tokens=257")).notes == []


def test_grids_that_do_not_match_are_reported_at_the_fusion() -> None:
    found = problems("model.encoders.coarse={name: timm, model: test_vit, image_size: 160}")
    assert list(found) == ["model.fusion"]
    assert "fine has (1, 3, 3)" in found["model.fusion"]
    assert "coarse has (1, 10, 10)" in found["model.fusion"]


def test_an_encoder_can_be_replaced_by_one_with_the_same_grid() -> None:
    check(load_recipe("quickstart", "model.encoders.coarse={name: timm, model: test_vit, image_size: 48}"))


@pytest.mark.parametrize(
    ("order", "why"),
    [
        ("twice", r"path 0 is not a permutation: position 4 holds index 2 again"),
        ("short", r"must return paths \(K, 9\), returned \(1, 8\)"),
        ("floats", r"must return int64 indices, returned torch.float32"),
    ],
)
def test_a_scan_order_that_breaks_its_contract_is_named(install_plugin: Install, order: str, why: str) -> None:
    install_plugin("zz-scans", SCANS)
    with pytest.raises(RecipeError, match=rf"model\.connector: scan_order '{order}' \(zz-scans 1\.0.*{why}"):
        check(load_recipe("quickstart", f"model.connector.scan_order={order}"))


@pytest.mark.parametrize(
    ("overrides", "path"),
    [
        (["model.language.mixer.head_dim=7"], "model.language"),
        (["model.language.width=0"], "model.language.width"),
        (["model.language.num_layers=0"], "model.language.num_layers"),
        (["model.connector.mixer.head_dim=7"], "model.connector"),
        (["model.encoders.coarse={name: timm, model: no_such_vit}"], "model.encoders.coarse"),
        (["model.encoders.coarse={name: timm, model: resnet18}"], "model.encoders.coarse"),
        (["model.fusion.order=[fine]"], "model.fusion"),
    ],
)
def test_mistakes_found_by_building_are_reported_at_their_path(overrides: list[str], path: str) -> None:
    assert list(problems(*overrides)) == [path]


@pytest.mark.parametrize("name", ["'a.b'", "1", "''"])
def test_the_name_of_an_encoder_must_be_a_valid_module_name(name: str) -> None:
    encoders = f"model.encoders={{{name}: {{name: digit_vit, stem: fine}}}}"
    (path,) = problems("model.fusion.order=null", "model.encoders=null", encoders)
    assert path.startswith("model.encoders")


def test_a_component_that_raises_in_its_constructor_is_one_problem(install_plugin: Install) -> None:
    code = "import ssmvl\ndef bad(in_width, out_width, grid):\n    raise RuntimeError('no such thing')\n"
    code += "@ssmvl.hookimpl\ndef ssmvl_register(register):\n    register('connector', 'bad', bad)\n"
    install_plugin("zz-bad", code)
    found = problems("model.connector=bad")
    assert list(found) == ["model.connector"]
    assert "no such thing" in found["model.connector"]


def test_a_component_that_lacks_a_part_of_its_contract_is_named(install_plugin: Install) -> None:
    code = "import ssmvl\nfrom torch import nn\nclass Bare(nn.Module):\n"
    code += "    def __init__(self, in_width, out_width, grid):\n        super().__init__()\n"
    code += "@ssmvl.hookimpl\ndef ssmvl_register(register):\n    register('connector', 'bare', Bare)\n"
    install_plugin("zz-bare", code)
    message = problems("model.connector=bare")["model.connector"]
    assert "connector 'bare' (zz-bare 1.0 (zz_bare)) lacks num_tokens, shard_units" in message
