from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmvl.errors import RecipeError
from ssmvl.recipes.files import recipe_names, recipe_path
from ssmvl.recipes.merge import Recipe, load_recipe, merge

Install = Callable[[str, str], None]
Write = Callable[..., Path]

CONNECTOR = "model: {connector: {name: msc_advanced, scan_order: bsm, num_layers: 2}}\n"


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def written(text: str | bytes, name: str = "mine.yaml") -> Path:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return written


def message(recipe: str | Path | Recipe, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe, *overrides)
    return str(caught.value)


# Reading


def test_scalars_follow_yaml_1_2(write: Write) -> None:
    path = write("model: {a: 1e-4, b: 1.5, c: 3, d: yes, e: 'x', f: null, g: true}\n")
    model = load_recipe(path, "model.h=2e-3", "model.i=1E5").data["model"]
    assert model == {"a": 1e-4, "b": 1.5, "c": 3, "d": "yes", "e": "x", "f": None, "g": True, "h": 2e-3, "i": 1e5}
    assert type(model["a"]) is type(model["h"]) is type(model["i"]) is float
    assert type(model["c"]) is int


@pytest.mark.parametrize("text", ["model: {a: 1}\nmodel: {b: 2}\n", "model: {a: 1, a: 2}\n"])
def test_a_duplicate_key_is_rejected(write: Write, text: str) -> None:
    assert "duplicate key" in message(write(text))


@pytest.mark.parametrize(
    "content",
    [
        b"- a\n- b\n",
        b"",
        b"hello\n",
        b"5\n",
        b"stages: {}\n",
        b"model: x\n",
        b"1: a\n",
        b"\xff\xfe\x80",
        b"\x00\x01",
        b"a:\n\t- b\n",
    ],
)
def test_a_file_that_is_not_a_recipe_is_one_problem(write: Write, content: bytes) -> None:
    path = write(content)
    assert message(path).startswith(f"{path}: 1 problem")


def test_an_unknown_top_level_key_is_reported_with_the_nearest_name(write: Write) -> None:
    text = message(write("model: {}\nstagess: {}\nsede: 1\n"))
    assert "2 problems" in text
    assert "stagess: unknown part of a recipe. Did you mean 'stages'?" in text
    assert "sede: unknown part of a recipe. Did you mean 'seed'?" in text


def test_a_recipe_is_given_as_a_name_file_directory_or_recipe(write: Write) -> None:
    path = write("model: {}\n", "recipe.yaml")
    assert load_recipe(path).data == load_recipe(str(path.parent)).data
    assert load_recipe(load_recipe(path)) == load_recipe(path)
    assert load_recipe("quickstart").source == str(recipe_path("quickstart"))
    assert "quickstart" in recipe_names()


def test_an_unknown_recipe_is_reported_with_the_nearest_name(tmp_path: Path) -> None:
    assert "unknown recipe 'quickstrat', and no such file exists. Did you mean 'quickstart'?" in message("quickstrat")
    assert f"{tmp_path / 'nosuch.yaml'} does not exist" in message(tmp_path / "nosuch.yaml")
    assert f"unknown recipe '{tmp_path}', and no such file exists" in message(tmp_path)


def test_the_run_is_named_after_the_file(write: Write) -> None:
    assert load_recipe(write("model: {}\n")).data["run"] == "mine"
    assert load_recipe(write("model: {}\nrun: other\n")).data["run"] == "other"
    folder = write("model: {}\n", "recipe.yaml").parent
    assert load_recipe(folder).data["run"] == folder.name


def test_interpolations_are_resolved(write: Write) -> None:
    path = write("seed: 3\nmodel: {a: '${seed}', b: {c: '${model.a}'}}\n")
    assert load_recipe(path).data["model"] == {"a": 3, "b": {"c": 3}}
    assert load_recipe(path, "model.d=${seed}", "seed=4").data["model"]["d"] == 4


@pytest.mark.parametrize("value", ["${nope}", "${", "${oc.nosuch:1}", "${model.a}"])
def test_an_unresolvable_interpolation_is_reported_with_its_path(write: Write, value: str) -> None:
    assert "model.a" in message(write(f"model: {{a: '{value}'}}\n"))
    assert "model.a" in message(write("model: {b: 1}\n"), f"model.a={value}")


@pytest.mark.parametrize(
    "recipe", ["quickstart", CONNECTOR, "model: {a: 1e-5, b: [1, '2', null], c: 'on', d: '1e-4'}\n"]
)
def test_the_printed_recipe_reads_back_equal(write: Write, recipe: str) -> None:
    first = load_recipe(write(recipe) if "\n" in recipe else recipe)
    assert load_recipe(write(first.to_yaml(), "again.yaml")).data == first.data


def test_text_that_looks_like_an_interpolation_survives_a_second_reading(write: Write) -> None:
    first = load_recipe(write("model: {a: '\\${b}'}\n"))
    assert first.data["model"]["a"] == "${b}"
    assert load_recipe(first).data == first.data
    assert load_recipe(write(first.to_yaml(), "again.yaml")).data == first.data


# Overrides


def test_a_component_written_as_a_name_keeps_the_name_with_overridden_options(write: Write) -> None:
    path = write("model: {connector: msc_advanced, encoders: {a: digit_vit}}\nstages: {s: {data: digit_scenes}}\n")
    data = load_recipe(
        path, "model.connector.scan_order=csm", "model.encoders.a.stem=fine", "stages.s.data.seed=3"
    ).data
    assert data["model"]["connector"] == {"name": "msc_advanced", "scan_order": "csm"}
    assert data["model"]["encoders"]["a"] == {"name": "digit_vit", "stem": "fine"}
    assert data["stages"]["s"]["data"] == {"name": "digit_scenes", "seed": 3}


def test_a_nested_component_written_as_a_name_keeps_the_name_too(write: Write) -> None:
    path = write("model: {connector: {name: msc_advanced, mixer: mamba2}}\n")
    connector = load_recipe(path, "model.connector.mixer.d_state=16").data["model"]["connector"]
    assert connector["mixer"] == {"name": "mamba2", "d_state": 16}


def test_every_component_is_written_as_a_mapping(write: Write) -> None:
    text = "model: {encoders: {a: e}, fusion: f, connector: c, language: l, prompt: p, tokenizer: bytes}\n"
    data = load_recipe(write(text + "stages: {order: [s], s: {data: d, prompt: q}}\nevaluation: {data: d}\n")).data
    assert data["model"] == {
        "encoders": {"a": {"name": "e"}},
        "fusion": {"name": "f"},
        "connector": {"name": "c"},
        "language": {"name": "l"},
        "prompt": {"name": "p"},
        "tokenizer": "bytes",
    }
    assert data["stages"] == {"s": {"data": {"name": "d"}, "prompt": {"name": "q"}}}
    assert data["evaluation"] == {"data": {"name": "d"}}


@pytest.mark.parametrize("override", ["model.connector=mlp", "model.connector.name=mlp", "model.connector={name: mlp}"])
def test_a_different_name_drops_the_options_of_the_old_component(write: Write, override: str) -> None:
    assert load_recipe(write(CONNECTOR), override).data["model"]["connector"] == {"name": "mlp"}


@pytest.mark.parametrize(
    "override",
    ["model.connector=msc_advanced", "model.connector.name=msc_advanced", "model.connector.scan_order=bsm"],
)
def test_the_same_name_keeps_the_options(write: Write, override: str) -> None:
    connector = load_recipe(write(CONNECTOR), override).data["model"]["connector"]
    assert connector == {"name": "msc_advanced", "scan_order": "bsm", "num_layers": 2}


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("model.x=b=c", "b=c"),
        ("model.x=", None),
        ("model.x=[1, 2]", [1, 2]),
        ("model.x={y: 1}", {"y": 1}),
        ("model.x='1'", "1"),
        ("model.x=a.b=c d", "a.b=c d"),
        ("model.x=true", True),
    ],
)
def test_an_override_is_split_at_the_first_equals_sign_and_read_as_yaml(
    write: Write, override: str, value: Any
) -> None:
    assert load_recipe(write("model: {}\n"), override).data["model"]["x"] == value


@pytest.mark.parametrize("override", ["--x", "--x=1", "-x=1", "a", "=3", "", "=", "a.=1", ".a=1", "a..b=1"])
def test_an_invalid_override_is_rejected(write: Write, override: str) -> None:
    error = message(write("model: {}\n"), override)
    assert f"{override!r} is not an override; write key=value" in error
    assert ("options of the launcher go before the recipe" in error) == override.startswith("-")


@pytest.mark.parametrize("value", ["[1", "{a: 1, a: 2}", "a: b: c", "{a:{b:c}}"])
def test_an_override_whose_value_is_not_yaml_is_reported_with_its_path(write: Write, value: str) -> None:
    error = message(write("model: {}\n"), f"model.x={value}")
    assert f"model.x: {value!r} is not a YAML value" in error
    assert ("put a space after the ':' of a mapping" in error) == (":{" in value)


def test_overrides_are_applied_one_by_one(write: Write) -> None:
    path = write(CONNECTOR)
    data = load_recipe(path, "model.connector=mlp", "model.connector=msc_advanced", "seed=1", "seed=2").data
    assert data["model"]["connector"] == {"name": "msc_advanced"}
    assert data["seed"] == 2


def test_an_override_changes_neither_the_original_recipe_nor_the_file(write: Write) -> None:
    path = write(CONNECTOR)
    first = load_recipe(path)
    load_recipe(first, "model.connector.num_layers=9")
    assert first == load_recipe(path)


def test_an_encoder_or_stage_that_is_null_is_removed(write: Write) -> None:
    base = write("model: {encoders: {a: x, b: y}, prompt: p}\nstages: {s: {data: d}, t: {data: d}}\n", "base.yaml")
    data = load_recipe(base, "model.encoders.a=null", "stages.s=null", "model.prompt=null").data
    assert data["model"] == {"encoders": {"b": {"name": "y"}}, "prompt": None}
    assert data["stages"] == {"t": {"data": {"name": "d"}}}
    path = write("base: base.yaml\nmodel: {encoders: {b: null}}\nstages: {t: null}\n")
    data = load_recipe(path, "model.encoders.c=z").data
    assert (list(data["model"]["encoders"]), list(data["stages"])) == (["a", "c"], ["s"])


# Bases


def test_a_base_is_merged_and_keeps_its_order_of_keys(write: Write) -> None:
    write("seed: 5\nmodel: {connector: mlp, encoders: {a: x, b: y}}\n", "base.yaml")
    path = write("base: base.yaml\nmodel: {encoders: {c: z, b: {size: 2}}, connector: {hidden: 7}}\n")
    data = load_recipe(path).data
    assert "base" not in data
    assert data["seed"] == 5
    assert data["run"] == "mine"
    assert data["model"]["connector"] == {"name": "mlp", "hidden": 7}
    assert list(data["model"]["encoders"]) == ["a", "b", "c"]
    assert data["model"]["encoders"]["b"] == {"name": "y", "size": 2}


def test_a_component_with_a_different_name_drops_the_options_of_the_base(write: Write) -> None:
    write(CONNECTOR, "base.yaml")
    data = load_recipe(write("base: base.yaml\nmodel: {connector: {name: mlp, a: 1}}\n")).data
    assert data["model"]["connector"] == {"name": "mlp", "a": 1}


def test_a_base_may_be_the_name_of_a_recipe(write: Write) -> None:
    data = load_recipe(write("base: quickstart\nseed: 8\n")).data
    assert data["model"] == load_recipe("quickstart").data["model"]
    assert (data["seed"], data["run"]) == (8, "mine")


def test_bases_may_have_bases_to_any_depth(write: Write) -> None:
    write("model: {a: 1, b: 1, c: 1}\n", "bottom.yaml")
    write("base: bottom.yaml\nmodel: {b: 2}\n", "base.yaml")
    write("base: base.yaml\nmodel: {c: 3}\n", "over.yaml")
    assert load_recipe(write("base: over.yaml\nseed: 4\n")).data == {
        "seed": 4, "model": {"a": 1, "b": 2, "c": 3}, "run": "mine"
    }  # fmt: skip


def test_circular_bases_are_rejected(write: Write) -> None:
    write("base: mine.yaml\n", "base.yaml")
    error = message(write("base: base.yaml\nmodel: {}\n"))
    assert "base: circular bases: " in error
    assert error.endswith("mine.yaml")


def test_a_missing_base_is_reported_with_the_recipe_that_needs_it(write: Write) -> None:
    base = write("base: nosuch.yaml\n", "base.yaml")
    assert message(write("base: base.yaml\n")) == f"{base}: 1 problem\n  base: nosuch.yaml does not exist"


@pytest.mark.parametrize("base", ["nosuch", "nosuch.yaml", "5", "[a]", "", "{a: b}", "''"])
def test_an_invalid_base_is_a_problem(write: Write, base: str) -> None:
    assert "1 problem" in message(write(f"base: {base}\nmodel: {{}}\n"))


# Recipes of plugins


def recipe_plugin(target: str, name: str = "plugin_recipe") -> str:
    return (
        f"import ssmvl\n@ssmvl.hookimpl\ndef ssmvl_register(register):\n    register('recipe', {name!r}, {target!r})\n"
    )


def test_a_plugin_may_register_a_recipe(install_plugin: Install, tmp_path: Path) -> None:
    (tmp_path / "zz_package" / "recipes").mkdir(parents=True)
    (tmp_path / "zz_package" / "__init__.py").write_text("raise RuntimeError('finding a file must import nothing')")
    (tmp_path / "zz_package" / "recipes" / "x.yaml").write_text("model: {a: 1}\n")
    install_plugin("zz-recipes", recipe_plugin("zz_package/recipes/x.yaml"))
    assert load_recipe("plugin_recipe").data["model"] == {"a": 1}
    assert "plugin_recipe" in recipe_names()


@pytest.mark.parametrize("target", ["zz_nosuch/x.yaml", "zz_no.such/x.yaml", "zz_recipes/x.yaml", "ssmvl/nosuch.yaml"])
def test_a_missing_recipe_of_a_plugin_is_a_problem(install_plugin: Install, target: str) -> None:
    install_plugin("zz-recipes", recipe_plugin(target))
    assert "1 problem" in message("plugin_recipe")


def test_a_plugin_cannot_replace_a_recipe_of_the_core(install_plugin: Install) -> None:
    install_plugin("zz-recipes", recipe_plugin("zz_package/recipes/x.yaml", "quickstart"))
    assert recipe_path("quickstart").parent.name in ("recipes", "_recipes")
    assert load_recipe("quickstart").data["model"]["connector"]["name"] == "msc_advanced"


# Merging

TREES = st.recursive(
    st.integers() | st.text(max_size=3) | st.none() | st.lists(st.integers(), max_size=2),
    lambda inner: st.dictionaries(st.sampled_from(["a", "b", "c", "name"]), inner, max_size=3),
    max_leaves=6,
)
MAPPINGS = st.dictionaries(st.sampled_from(["a", "b", "c"]), TREES, max_size=3)
quick = settings(max_examples=50, deadline=None, database=None)


@quick
@given(MAPPINGS)
def test_merging_nothing_changes_nothing(base: dict[str, Any]) -> None:
    assert merge(base, {}) == base
    assert merge(base, base) == base


@quick
@given(MAPPINGS, st.sampled_from("abc"), st.integers(), st.integers())
def test_the_later_override_wins(base: dict[str, Any], key: str, first: int, second: int) -> None:
    merged = merge(merge(base, {key: first}), {key: second})
    assert merged == {**base, key: second}
    assert [k for k in merged if k in base] == list(base)
