from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from ssmvl.recipes.binding import bind
from ssmvl.registry import Check, Part

Install = Callable[[str, str], None]


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
def test_a_value_of_the_right_type_is_bound(option: str, value: Any) -> None:
    bound, problems = bind({option: value}, scalars, "here")
    assert problems == []
    assert bound.options == {option: value}


def test_numbers_and_lists_are_converted_to_the_annotated_types() -> None:
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
def test_a_value_of_the_wrong_type_is_one_problem(option: str, value: Any, expected: str) -> None:
    _, (problem,) = bind({option: value}, scalars, "here")
    assert problem.path == f"here.{option}"
    assert expected in problem.message


def test_an_unknown_option_is_reported_with_the_nearest_name() -> None:
    _, (problem,) = bind({"count": 1, "tittle": "y"}, rows, "a.b")
    assert problem == ("a.b.tittle", "rows has no option 'tittle'. Did you mean 'title'? Allowed: count, title.")


def test_a_missing_option_is_reported_with_its_path() -> None:
    assert bind({}, rows, "a")[1] == [("a.count", "rows needs 'count' (int)")]
    assert bind({}, rows, "")[1] == [("count", "rows needs 'count' (int)")]


def test_a_type_is_described_without_pythons_internals() -> None:
    def rows(named: dict[str, Annotated[int, Check("an even number", lambda n: n % 2 == 0)]] | None) -> None: ...

    def columns(sizes: tuple[int, ...], of: Callable[[int], str]) -> None: ...

    expected = ["columns needs 'sizes' (tuple[int, ...])", "columns needs 'of' (collections.abc.Callable[[int], str])"]
    assert [problem.message for problem in bind({}, columns, "")[1]] == expected
    assert bind({}, rows, "")[1] == [("named", "rows needs 'named' (dict[str, int] | None)")]


def test_injected_arguments_are_neither_needed_nor_allowed() -> None:
    assert bind({}, crossing, "a", ("width",))[1] == []
    _, (problem,) = bind({"width": 5}, crossing, "a", ("width",))
    assert problem.path == "a.width"
    assert "is not an option: the library passes it" in problem.message


@pytest.mark.parametrize("node", [None, "x", 5, [1]])
def test_options_must_be_a_mapping(node: Any) -> None:
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
        ("cms", "a.row", "unknown scan_order 'cms'. Did you mean 'csm'?"),
        ({"name": "csm", "x": 1}, "a.row.x", "scan_order 'csm' (ssmvl) has no option 'x'. Allowed: nothing."),
        ({"name": "csm", "grid": 1}, "a.row.grid", "is not an option: the library passes it"),
        ({"x": 1}, "a.row", "expected the name of a scan_order or {name: …, options}"),
        (None, "a.row", "expected the name of a scan_order or {name: …, options}"),
        (5, "a.row", "expected the name of a scan_order or {name: …, options}"),
        (["csm"], "a.row", "expected the name of a scan_order or {name: …, options}"),
        ({"name": 5}, "a.row", "expected the name of a scan_order or {name: …, options}"),
    ],
)
def test_an_invalid_part_is_one_problem_with_its_path(part: Any, path: str, expected: str) -> None:
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


def test_an_optional_dataclass_may_be_null() -> None:
    bound, problems = bind({"inner": {"lr": 1}, "other": None}, Outer, "o")
    assert problems == []
    assert bound().other is None


def test_an_optional_part_may_be_null() -> None:
    bound, problems = bind({"lr": 1, "order": None}, Inner, "o")
    assert problems == []
    assert bound().order is None


def test_problems_at_all_depths_are_reported_with_their_paths() -> None:
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
        ("builtin", "cannot be read"),
    ],
)
def test_an_unusable_component_is_one_problem(
    install_plugin: Install, tmp_path: Path, name: str, expected: str
) -> None:
    (tmp_path / "zz_broken.py").write_text("1 / 0\n")
    install_plugin("zz-parts", COMPONENTS)
    _, problems = bind({"row": name, "depth": "x"}, crossing, "a", ("width",))
    assert [problem.path for problem in problems] == ["a.row", "a.depth"]
    assert expected in problems[0].message


def test_a_bound_component_is_called_with_the_injected_arguments() -> None:
    def factory(width: int, *, depth: int = 1) -> tuple[int, int]:
        return width, depth

    bound, _ = bind({"depth": 3}, factory, "a", ("width",))
    assert bound(width=2) == (2, 3)
