"""The shipped recipes match the papers and freeze no part without pretrained weights."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ssmvl.model.build import build_model
from ssmvl.plugins import components
from ssmvl.recipes.ablations import PREFIX, shipped_ablations
from ssmvl.recipes.files import recipe_names, recipe_path
from ssmvl.recipes.merge import Recipe, load_recipe
from ssmvl.training.checked import check
from ssmvl.training.freezing import is_under
from ssmvl.training.stage_prompts import prompts_of_stages

SYSTEMS = ["ml_mamba", "cobra", "vl_mamba", "mamba_vlm", "mamba_vlm_7b"]
EVERY = [*recipe_names(), *[PREFIX + entry.name for entry in shipped_ablations()]]
TINY = {"name": "mamba2_lm", "width": 64, "num_layers": 1, "num_tokens": 257}

NEW, ALL = ["connector"], ["connector", "language"]  # trained parts
ALIGN = ("data/llava_558k", "plain", NEW, 1e-3, 0.0, 256, "1ep")
FINETUNE: dict[str, tuple[Any, ...]] = {
    "ml_mamba": ("data/llava_lvis_875k", None, ALL, 2e-5, 0.1, 64, "2ep"),
    "cobra": ("data/llava_lvis_lrv_1231k", None, ALL, 2e-5, 0.1, 128, "2ep"),
    "vl_mamba": ("data/llava_665k", None, ALL, 2e-5, 0.0, 128, "1ep"),
    "mamba_vlm": ("data/llava_lvis_lrv_1231k", None, ["fusion", *ALL], 2e-5, 0.1, 128, "2ep"),
    "mamba_vlm_7b": ("data/llava_665k", None, ["fusion", *ALL], 2e-5, 0.1, 128, "1ep"),
}
# Visual tokens; parameters of fusion, connector and language model, published or computed by hand from the widths.
SIZES = {
    "ml_mamba": (729, 0, 184_405_440, 2_702_599_680),
    "cobra": (729, 0, 47_789_568, 2_768_345_600),
    "vl_mamba": (729, 0, 50_754_560, 2_768_345_600),
    "mamba_vlm": (1458, 2_509_056, 6_515_968, 2_768_345_600),
    "mamba_vlm_7b": (1458, 2_509_056, 8_286_976, 6_738_415_616),
}


def in_small(recipe: Recipe) -> Recipe:
    """Replace the encoders and the language model by tiny ones; keep fusion and connector."""
    model = recipe.data["model"]
    encoders = {name: {"name": "digit_vit", "stem": "fine"} for name in model["encoders"]}
    small = {**model, "encoders": encoders, "language": TINY, "tokenizer": "bytes"}
    return Recipe({**recipe.data, "model": small}, recipe.source)


def weights_of(kind: str, node: dict[str, Any]) -> str:
    """Return the component's option `weights`, its default if it is not set, or `none` if there is no such option."""
    parameters = inspect.signature(components().find(kind, node["name"]).load()).parameters
    default = parameters["weights"].default if "weights" in parameters else "none"
    return str(node.get("weights", default))


def frozen_without_weights(recipe: Recipe) -> list[str]:
    """Return `stage: part` wherever a stage freezes a part with neither pretrained nor trained weights."""
    model = recipe.data["model"]
    names = [name for name, _ in build_model(in_small(recipe), device="meta").named_parameters()]
    kinds = {f"encoders.{name}": ("encoder", node) for name, node in model["encoders"].items()}
    kinds |= {kind: (kind, model[kind]) for kind in ("fusion", "connector")}
    kinds |= {"language": ("language_model", model["language"])}
    parts = [part for part in kinds if any(is_under(name, part) for name in names)]
    known = {part for part in parts if weights_of(*kinds[part]) not in ("none", "None")}
    frozen = []
    for stage in recipe.data["stages"]:
        train = recipe.data["stages"][stage]["train"]
        known |= {part for part in parts if any(is_under(part, prefix) for prefix in train)}
        frozen += [f"{stage}: {part}" for part in parts if part not in known]
    return frozen


@pytest.mark.parametrize("name", EVERY)
def test_no_part_is_frozen_without_weights(name: str) -> None:
    assert frozen_without_weights(load_recipe(name)) == []


@pytest.mark.parametrize(
    ("name", "overrides", "expected"),
    [
        ("mamba_vlm", ["stages.finetune.train=[connector, language]"], ["finetune: fusion"]),
        ("mamba_vlm_7b", ["stages.finetune.train=[fusion, connector.w1, language]"], ["finetune: connector"]),
        ("ml_mamba", ["model.encoders.dinov2.weights=none"], ["align: encoders.dinov2", "finetune: encoders.dinov2"]),
        ("ml_mamba", ["model.language.weights=none"], ["align: language"]),
        ("ml_mamba", ["stages.order=[finetune, align]", "stages.finetune.train=[language]"], ["finetune: connector"]),
        ("ml_mamba", ["stages.order=[finetune, align]", "model.language.weights=none"], []),
        ("quickstart", ["stages.align.train=[language]"], ["align: connector"]),
    ],
)
def test_a_part_frozen_without_weights_is_found(name: str, overrides: list[str], expected: list[str]) -> None:
    assert frozen_without_weights(load_recipe(name, *overrides)) == expected


@pytest.mark.parametrize("name", SYSTEMS)
def test_stages_match_the_papers(name: str) -> None:
    stages = load_recipe(name).data["stages"]
    published = {"finetune": FINETUNE[name]}
    if name in ("ml_mamba", "vl_mamba"):
        published = {"align": ALIGN, **published}
    assert list(stages) == list(published)
    for stage, expected in published.items():
        node = stages[stage]
        assert node["data"]["name"] == "shards"
        assert node["warmup"] == "0.03dur"
        inputs = (node["data"]["folder"], (node.get("prompt") or {}).get("name"), node["train"])
        steps = (node["optimizer"]["lr"], node["optimizer"]["weight_decay"], node["batch"], node["duration"])
        assert (*inputs, *steps) == expected
        assert node["batch"] % (8 * node["microbatch"]) == 0  # divides evenly over the papers' eight GPUs


@pytest.mark.parametrize("name", SYSTEMS)
def test_parts_have_the_published_and_documented_sizes(name: str) -> None:
    model, data = build_model(name, device="meta"), load_recipe(name).data["model"]
    counts = {part: sum(p.numel() for p in module.parameters()) for part, module in model.named_children()}
    fusion, connector, language = (counts[part] for part in ("fusion", "connector", "language"))
    assert (model.tokens_per_image, fusion, connector, language) == SIZES[name]

    shown = column_of_the_docs(name)
    node = data["language"]
    layers = node.get("num_layers") or node["config"]["num_hidden_layers"]
    no_fusion = len(data["encoders"]) == 1
    assert shown["fusion"] == ("none" if no_fusion else f"`{data['fusion']['name']}`, width {model.fusion.width}")
    assert shown["connector"].partition(",")[0] == f"`{data['connector']['name']}`"
    order = data["connector"].get("scan_order")
    paths = order and components().find("scan_order", order).load()(model.grid).shape[0]
    assert shown["scan order"] == (f"`{order}`, {paths} paths" if order else "–")
    assert shown["visual tokens per image"] == str(model.tokens_per_image)
    assert shown["width, layers"] == f"{model.language.width}, {layers}"
    assert shown["prompt"] == f"`{data['prompt']['name']}`"
    assert shown["parameters: encoders"] == f"{counts['encoders']:,}"
    assert shown["fusion and connector"] == f"{fusion + connector:,}"
    assert shown["language model"] == f"{language:,}"
    assert shown["total"] == f"{sum(counts.values()):,}"


def column_of_the_docs(name: str) -> dict[str, str]:
    """Return a system's column in the first table of docs/systems.md; `the same` repeats the cell to the left."""
    text = (Path(__file__).parents[2] / "docs/systems.md").read_text()
    table = text.partition("## Side by side")[2].partition("\n## ")[0]
    column: dict[str, str] = {}
    for line in re.findall(r"^\| (\w.*) \|$", table, flags=re.MULTILINE):
        label, *cells = line.split(" | ")
        index = SYSTEMS.index(name)
        while cells[index] == "the same":
            index -= 1
        column[label] = cells[index]
    assert column["recipe"] == f"[{name}](../recipes/{name}.yaml)"
    return column


@pytest.mark.parametrize("name", SYSTEMS)
def test_rows_are_packed_if_the_kernel_supports_it(name: str) -> None:
    recipe = load_recipe(name)
    packed = {stage.get("packed", True) for stage in recipe.data["stages"].values()}
    assert packed == {recipe.data["model"]["language"]["name"] == "mamba2_lm"}


@pytest.mark.parametrize("name", SYSTEMS)
def test_overrides_in_the_comments_are_valid(name: str) -> None:
    comments = "\n".join(re.findall("#.*", recipe_path(name).read_text()))
    overrides = re.findall(r"[\w.]+=\S+", comments)
    recipe = load_recipe(name, *overrides)
    assert overrides or name not in ("ml_mamba", "mamba_vlm")
    assert check(in_small(recipe)).notes == prompts_of_stages(recipe)


def test_the_released_configuration_of_ml_mamba_is_an_override() -> None:
    recipe = load_recipe("ml_mamba", "run=released", "stages.align=null", "stages.finetune.batch=128")
    assert list(recipe.data["stages"]) == ["finetune"]
    assert frozen_without_weights(recipe) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", SYSTEMS)
def test_building_on_meta_takes_little_memory(name: str) -> None:
    code = (  # not ru_maxrss, which starts at the size of the parent process
        "import re, ssmvl\n"
        f"ssmvl.build_model({name!r}, device='meta')\n"
        "print(int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) * 1024)"
    )
    start = time.monotonic()
    peak = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    print(f"{name}: {time.monotonic() - start:.1f} s, imports included, {peak / 1e9:.2f} GB at the peak")
    assert peak < 1e9
