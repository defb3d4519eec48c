from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmvl.errors import RecipeError
from ssmvl.recipe import Recipe, bind, load_recipe, merge, recipe_names, recipe_path
from ssmvl.registry import Part

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


def test_scalars_are_read_as_a_person_means_them(write: Write) -> None:
    path = write("model: {a: 1e-4, b: 1.5, c: 3, d: off, e: 'x', f: null, g: true}\n")
    model = load_recipe(path, "model.h=2e-3", "model.i=1E5").data["model"]
    assert model == {"a": 1e-4, "b": 1.5, "c": 3, "d": False, "e": "x", "f": None, "g": True, "h": 2e-3, "i": 1e5}
    assert type(model["a"]) is type(model["h"]) is type(model["i"]) is float
    assert type(model["c"]) is int


@pytest.mark.parametrize("text", ["model: {a: 1}\nmodel: {b: 2}\n", "model: {a: 1, a: 2}\n"])
def test_a_key_that_stands_twice_is_refused(write: Write, text: str) -> None:
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
def test_a_file_that_is_no_recipe_says_so(write: Write, content: bytes) -> None:
    path = write(content)
    assert message(path).startswith(f"{path}: 1 problem")


def test_an_unknown_top_level_key_is_answered_with_the_nearest(write: Write) -> None:
    text = message(write("model: {}\nstage: {}\nsede: 1\n"))
    assert "2 problems" in text
    assert "stage: no such part of a recipe. Did you mean 'stages'?" in text
    assert "sede: no such part of a recipe. Did you mean 'seed'?" in text


def test_a_recipe_is_found_by_name_file_folder_or_itself(write: Write) -> None:
    path = write("model: {}\n", "recipe.yaml")
    assert load_recipe(path).data == load_recipe(str(path.parent)).data
    assert load_recipe(load_recipe(path)) == load_recipe(path)
    assert load_recipe("quickstart").source == str(recipe_path("quickstart"))
    assert "quickstart" in recipe_names()


def test_a_missing_recipe_is_named_with_a_suggestion(tmp_path: Path) -> None:
    assert "no recipe named 'quickstrat', and no such file. Did you mean 'quickstart'?" in message("quickstrat")
    assert f"no such file: {tmp_path / 'nosuch.yaml'}" in message(tmp_path / "nosuch.yaml")
    assert f"no such file: {tmp_path / 'recipe.yaml'}" in message(tmp_path)


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
def test_an_interpolation_that_leads_nowhere_is_a_problem_of_its_place(write: Write, value: str) -> None:
    assert "model.a" in message(write(f"model: {{a: '{value}'}}\n"))
    assert "model.a" in message(write("model: {b: 1}\n"), f"model.a={value}")


@pytest.mark.parametrize(
    "recipe", ["quickstart", CONNECTOR, "model: {a: 1e-5, b: [1, '2', null], c: 'on', d: '1e-4'}\n"]
)
def test_the_printed_recipe_reads_back_equal(write: Write, recipe: str) -> None:
    first = load_recipe(write(recipe) if "\n" in recipe else recipe)
    assert load_recipe(write(first.to_yaml(), "again.yaml")).data == first.data


def test_text_that_looks_like_an_interpolation_survives_being_read_twice(write: Write) -> None:
    first = load_recipe(write("model: {a: '\\${b}'}\n"))
    assert first.data["model"]["a"] == "${b}"
    assert load_recipe(first).data == first.data
    assert load_recipe(write(first.to_yaml(), "again.yaml")).data == first.data


# Overrides


def test_a_component_written_as_a_name_keeps_it_under_an_override(write: Write) -> None:
    path = write("model: {connector: msc_advanced, encoders: {a: digit_vit}}\nstages: {s: {data: digits}}\n")
    data = load_recipe(
        path, "model.connector.scan_order=csm", "model.encoders.a.stem=fine", "stages.s.data.seed=3"
    ).data
    assert data["model"]["connector"] == {"name": "msc_advanced", "scan_order": "csm"}
    assert data["model"]["encoders"]["a"] == {"name": "digit_vit", "stem": "fine"}
    assert data["stages"]["s"]["data"] == {"name": "digits", "seed": 3}


def test_a_nested_component_written_as_a_name_keeps_it_too(write: Write) -> None:
    path = write("model: {connector: {name: msc_advanced, mixer: mamba2}}\n")
    connector = load_recipe(path, "model.connector.mixer.d_state=16").data["model"]["connector"]
    assert connector["mixer"] == {"name": "mamba2", "d_state": 16}


def test_every_fixed_place_of_a_component_is_written_out(write: Write) -> None:
    text = "model: {encoders: {a: e}, fusion: f, connector: c, language: l, prompt: p, tokenizer: bytes}\n"
    data = load_recipe(write(text + "stages: {order: [s], s: {data: d}}\nevaluation: {data: d}\n")).data
    assert data["model"] == {
        "encoders": {"a": {"name": "e"}},
        "fusion": {"name": "f"},
        "connector": {"name": "c"},
        "language": {"name": "l"},
        "prompt": {"name": "p"},
        "tokenizer": "bytes",
    }
    assert data["stages"] == {"order": ["s"], "s": {"data": {"name": "d"}}}
    assert data["evaluation"] == {"data": {"name": "d"}}


@pytest.mark.parametrize("override", ["model.connector=mlp", "model.connector.name=mlp", "model.connector={name: mlp}"])
def test_another_name_drops_the_options_of_the_first(write: Write, override: str) -> None:
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
def test_a_token_that_is_no_override_is_refused(write: Write, override: str) -> None:
    assert f"{override!r} is no override; write key=value" in message(write("model: {}\n"), override)


@pytest.mark.parametrize("value", ["[1", "{a: 1, a: 2}", "a: b: c"])
def test_an_override_whose_value_is_no_yaml_is_refused_at_its_place(write: Write, value: str) -> None:
    assert f"model.x: {value!r} is no YAML value" in message(write("model: {}\n"), f"model.x={value}")


def test_overrides_are_applied_one_by_one(write: Write) -> None:
    path = write(CONNECTOR)
    data = load_recipe(path, "model.connector=mlp", "model.connector=msc_advanced", "seed=1", "seed=2").data
    assert data["model"]["connector"] == {"name": "msc_advanced"}
    assert data["seed"] == 2


def test_an_override_changes_neither_the_recipe_it_is_laid_on_nor_the_file(write: Write) -> None:
    path = write(CONNECTOR)
    first = load_recipe(path)
    load_recipe(first, "model.connector.num_layers=9")
    assert first == load_recipe(path)


# Bases


def test_a_base_is_laid_under_and_keeps_its_order_of_keys(write: Write) -> None:
    write("seed: 5\nmodel: {connector: mlp, encoders: {a: x, b: y}}\n", "under.yaml")
    path = write("base: under.yaml\nmodel: {encoders: {c: z, b: {size: 2}}, connector: {hidden: 7}}\n")
    data = load_recipe(path).data
    assert "base" not in data
    assert data["seed"] == 5
    assert data["run"] == "mine"
    assert data["model"]["connector"] == {"name": "mlp", "hidden": 7}
    assert list(data["model"]["encoders"]) == ["a", "b", "c"]
    assert data["model"]["encoders"]["b"] == {"name": "y", "size": 2}


def test_a_component_of_another_name_drops_the_options_of_the_base(write: Write) -> None:
    write(CONNECTOR, "under.yaml")
    data = load_recipe(write("base: under.yaml\nmodel: {connector: {name: mlp, a: 1}}\n")).data
    assert data["model"]["connector"] == {"name": "mlp", "a": 1}


def test_a_base_may_be_the_name_of_a_recipe(write: Write) -> None:
    data = load_recipe(write("base: quickstart\nseed: 8\n")).data
    assert data["model"] == load_recipe("quickstart").data["model"]
    assert (data["seed"], data["run"]) == (8, "mine")


def test_a_base_with_a_base_is_refused(write: Write) -> None:
    write("model: {}\n", "bottom.yaml")
    write("base: bottom.yaml\n", "under.yaml")
    assert "under.yaml has a base itself; one level is allowed" in message(write("base: under.yaml\n"))


@pytest.mark.parametrize("base", ["nosuch", "nosuch.yaml", "5", "[a]", "", "{a: b}", "''"])
def test_a_base_that_is_none_is_a_problem(write: Write, base: str) -> None:
    assert "1 problem" in message(write(f"base: {base}\nmodel: {{}}\n"))


# Recipes of plugins


def recipe_plugin(target: str, name: str = "theirs") -> str:
    return (
        f"import ssmvl\n@ssmvl.hookimpl\ndef ssmvl_register(register):\n    register('recipe', {name!r}, {target!r})\n"
    )


def test_a_plugin_brings_a_recipe(install_plugin: Install, tmp_path: Path) -> None:
    (tmp_path / "zz_package" / "recipes").mkdir(parents=True)
    (tmp_path / "zz_package" / "__init__.py").write_text("raise RuntimeError('looking for a file imports nothing')")
    (tmp_path / "zz_package" / "recipes" / "x.yaml").write_text("model: {a: 1}\n")
    install_plugin("zz-recipes", recipe_plugin("zz_package/recipes/x.yaml"))
    assert load_recipe("theirs").data["model"] == {"a": 1}
    assert "theirs" in recipe_names()


@pytest.mark.parametrize("target", ["zz_nosuch/x.yaml", "zz_no.such/x.yaml", "zz_recipes/x.yaml", "ssmvl/nosuch.yaml"])
def test_a_plugins_recipe_that_is_not_there_is_a_problem(install_plugin: Install, target: str) -> None:
    install_plugin("zz-recipes", recipe_plugin(target))
    assert "1 problem" in message("theirs")


def test_a_plugin_does_not_replace_a_recipe_of_the_core(install_plugin: Install) -> None:
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
def test_nothing_laid_on_a_recipe_changes_nothing(base: dict[str, Any]) -> None:
    assert merge(base, {}) == base
    assert merge(base, base) == base


@quick
@given(MAPPINGS, st.sampled_from("abc"), st.integers(), st.integers())
def test_the_later_of_two_overrides_wins(base: dict[str, Any], key: str, first: int, second: int) -> None:
    merged = merge(merge(base, {key: first}), {key: second})
    assert merged == {**base, key: second}
    assert [k for k in merged if k in base] == list(base)


# Binding


def rows(*, count: int, title: str = "x") -> None: ...


def crossing(width: int, *, depth: int = 1, row: Annotated[Callable[..., Any], Part("scan_order")] = rows) -> None: ...


def scalars(
    *,
    whole: int = 0,
    real: float = 0.0,
    choice: Literal["a", "b"] = "a",
    pair: tuple[float, float] = (0.0, 1.0),
    maybe: int | None = 1,
    names: list[str] = [],  # noqa: B006
    rates: dict[str, float] = {},  # noqa: B006
    flag: bool = False,
    anything: Any = None,
) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Inner:
    lr: float
    order: Annotated[Callable[..., Any], Part("scan_order")] | None = None


@dataclass(frozen=True, kw_only=True)
class Outer:
    inner: Inner
    other: Inner | None = None
    many: dict[str, Annotated[Callable[..., Any], Part("scan_order")]] = field(default_factory=dict)
    inners: dict[str, Inner] = field(default_factory=dict)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("whole", 3),
        ("real", 1e-4),
        ("choice", "b"),
        ("maybe", None),
        ("maybe", 4),
        ("names", ["x"]),
        ("rates", {"x": 0.5}),
        ("flag", True),
        ("anything", {"x": [1, None]}),
    ],
)
def test_a_value_of_its_type_is_passed_on(option: str, value: Any) -> None:
    bound, problems = bind({option: value}, scalars, "here")
    assert problems == []
    assert bound.options == {option: value}


def test_numbers_and_lists_become_what_the_signature_says() -> None:
    bound, problems = bind({"real": 3, "pair": [0.5, 1]}, scalars, "here")
    assert problems == []
    assert bound.options == {"real": 3.0, "pair": (0.5, 1.0)}
    assert type(bound.options["real"]) is float


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("whole", True, "expected int, received True (bool)"),
        ("whole", 2.5, "expected int, received 2.5 (float)"),
        ("whole", "many", "expected int, received 'many' (str)"),
        ("whole", None, "expected int, received None"),
        ("whole", [1], "expected int, received [1] (list)"),
        ("whole", "???", "expected int, received '???'"),
        ("real", True, "expected float, received True (bool)"),
        ("real", "x", "expected float, received 'x' (str)"),
        ("choice", "c", "expected one of 'a', 'b', received 'c' (str)"),
        ("pair", [0.5], "expected tuple[float, float], received [0.5] (list)"),
        ("pair", [1, 2, 3], "received [1, 2, 3] (list)"),
        ("pair", ["x", 1], "received ['x', 1] (list)"),
        ("maybe", "x", "expected int, received 'x' (str)"),
        ("maybe", True, "expected int, received True (bool)"),
        ("names", "x", "expected list[str], received 'x' (str)"),
        ("rates", {"x": "y"}, "expected dict[str, float]"),
        ("flag", "perhaps", "expected bool, received 'perhaps' (str)"),
    ],
)
def test_a_value_of_another_type_is_one_problem(option: str, value: Any, expected: str) -> None:
    _, (problem,) = bind({option: value}, scalars, "here")
    assert problem.path == f"here.{option}"
    assert expected in problem.message


def test_an_unknown_option_is_answered_with_the_nearest() -> None:
    _, (problem,) = bind({"count": 1, "tittle": "y"}, rows, "a.b")
    assert problem == ("a.b.tittle", "rows has no option 'tittle'. Did you mean 'title'? Allowed: count, title.")


def test_a_missing_option_is_a_problem_at_its_place() -> None:
    assert bind({}, rows, "a")[1] == [("a.count", "rows needs 'count' (int)")]
    assert bind({}, rows, "")[1] == [("count", "rows needs 'count' (int)")]


def test_what_the_library_passes_is_neither_needed_nor_allowed() -> None:
    assert bind({}, crossing, "a", ("width",))[1] == []
    _, (problem,) = bind({"width": 5}, crossing, "a", ("width",))
    assert problem.path == "a.width"
    assert "is not an option: it is passed by the model" in problem.message


@pytest.mark.parametrize("node", [None, "x", 5, [1]])
def test_options_are_a_mapping(node: Any) -> None:
    _, (problem,) = bind(node, rows, "a")
    assert problem == ("a", f"expected a mapping of options, received {node!r}")


@pytest.mark.parametrize("part", ["csm", {"name": "csm"}])
def test_a_part_is_bound_to_its_component(part: Any) -> None:
    bound, problems = bind({"row": part}, crossing, "a", ("width",))
    assert problems == []
    assert bound.options["row"].factory.__name__ == "csm"
    assert str(bound.options["row"]) == "scan_order 'csm' (ssmvl)"


@pytest.mark.parametrize(
    ("part", "path", "expected"),
    [
        ("cms", "a.row", "no scan_order named 'cms'. Did you mean 'csm'?"),
        ({"name": "csm", "x": 1}, "a.row.x", "csm has no option 'x'. Allowed: nothing."),
        ({"name": "csm", "grid": 1}, "a.row.grid", "is not an option: it is passed by the model"),
        ({"x": 1}, "a.row", "expected the name of a scan_order or {name: …, options}"),
        (None, "a.row", "expected the name of a scan_order or {name: …, options}"),
        (5, "a.row", "expected the name of a scan_order or {name: …, options}"),
        (["csm"], "a.row", "expected the name of a scan_order or {name: …, options}"),
        ({"name": 5}, "a.row", "expected the name of a scan_order or {name: …, options}"),
    ],
)
def test_a_wrong_part_is_one_problem_at_its_place(part: Any, path: str, expected: str) -> None:
    _, (problem,) = bind({"row": part}, crossing, "a", ("width",))
    assert problem.path == path
    assert expected in problem.message


def test_parts_of_parts_are_bound() -> None:
    def holder(*, connector: Annotated[Callable[..., Any], Part("connector")]) -> None: ...

    node = {"connector": {"name": "msc_advanced", "mixer": {"name": "mamba2", "d_stat": 5}, "scan_order": "cms"}}
    _, problems = bind(node, holder, "m")
    assert [problem.path for problem in problems] == ["m.connector.mixer.d_stat", "m.connector.scan_order"]
    bound, problems = bind(
        {"connector": {"name": "msc_advanced", "mixer": {"name": "mamba2", "d_state": 5}}}, holder, "m"
    )
    assert problems == []
    assert bound.options["connector"].options["mixer"].options == {"d_state": 5}


def test_dataclasses_and_mappings_of_parts_are_bound() -> None:
    node = {
        "inner": {"lr": 1, "order": "bsm"},
        "many": {"x": "csm", "y": {"name": "raster"}},
        "inners": {"z": {"lr": 2.0}},
    }
    bound, problems = bind(node, Outer, "o")
    assert problems == []
    outer = bound()
    assert (outer.inner.lr, outer.other, outer.inners["z"].lr) == (1.0, None, 2.0)
    assert outer.inner.order.factory.__name__ == "bsm"
    assert [part.factory.__name__ for part in outer.many.values()] == ["csm", "raster"]


def test_null_stands_for_an_optional_dataclass() -> None:
    bound, problems = bind({"inner": {"lr": 1}, "other": None}, Outer, "o")
    assert problems == []
    assert bound().other is None


def test_null_stands_for_an_optional_part() -> None:
    bound, problems = bind({"lr": 1, "order": None}, Inner, "o")
    assert problems == []
    assert bound().order is None


def test_problems_of_all_depths_are_reported_with_their_paths() -> None:
    node = {"inner": {"lr": "fast"}, "other": {"rl": 1, "lr": 2}, "many": {"x": "cms"}, "inners": {}, "extra": 1}
    _, problems = bind(node, Outer, "o")
    assert [problem.path for problem in problems] == ["o.inner.lr", "o.other.rl", "o.many.x", "o.inners", "o.extra"]


COMPONENTS = """
from __future__ import annotations
import ssmvl

def unreadable(a: NoSuchName = 1): ...
def mistyped(a: ssmvl.NoSuchName = 1): ...

@ssmvl.hookimpl
def ssmvl_register(register):
    register("scan_order", "unreadable", unreadable)
    register("scan_order", "mistyped", mistyped)
    register("scan_order", "builtin", dict)
    register("scan_order", "absent", "zz_no_such_module:x")
    register("scan_order", "lacking", "zz_parts:x")
    register("scan_order", "broken", "zz_broken:x")
"""


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("absent", "ModuleNotFoundError: No module named 'zz_no_such_module'"),
        ("lacking", "AttributeError: module 'zz_parts' has no attribute 'x'"),
        ("broken", "ZeroDivisionError: division by zero"),
        ("unreadable", "NoSuchName"),
        ("mistyped", "NoSuchName"),
        ("builtin", "the signature of dict cannot be read"),
    ],
)
def test_a_component_that_cannot_be_used_is_one_problem(
    install_plugin: Install, write: Write, name: str, expected: str
) -> None:
    write("1 / 0\n", "zz_broken.py")
    install_plugin("zz-parts", COMPONENTS)
    _, problems = bind({"row": name, "depth": "x"}, crossing, "a", ("width",))
    assert [problem.path for problem in problems] == ["a.row", "a.depth"]
    assert expected in problems[0].message


def test_a_bound_component_awaits_what_is_injected() -> None:
    def made(width: int, *, depth: int = 1) -> tuple[int, int]:
        return width, depth

    bound, _ = bind({"depth": 3}, made, "a", ("width",))
    assert bound(width=2) == (2, 3)
