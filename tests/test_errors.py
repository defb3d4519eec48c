from __future__ import annotations

import builtins
import re

import pytest

from ssmvl import errors
from ssmvl.errors import Problem, RecipeError, SsmvlError, nearest

DOCUMENTED = dict(re.findall(r"[├└]── (\w+) +\((\w+)\)", errors.__doc__ or ""))


@pytest.mark.parametrize("name", DOCUMENTED)
def test_each_error_is_an_ssmvl_error_and_the_documented_builtin(name: str) -> None:
    assert getattr(errors, name).__bases__ == (SsmvlError, getattr(builtins, DOCUMENTED[name]))


def test_the_tree_documents_every_error() -> None:
    defined = {n for n, c in vars(errors).items() if isinstance(c, type) and issubclass(c, SsmvlError)}
    assert defined == {*DOCUMENTED, "SsmvlError"}


def test_a_plugin_warning_is_a_user_warning() -> None:
    assert errors.PluginWarning.__bases__ == (UserWarning,)


def test_a_recipe_error_lists_every_problem_under_its_source() -> None:
    error = RecipeError([Problem("a.b", "is wrong"), Problem("", "so is this")], "x.yaml")
    assert str(error) == "x.yaml: 2 problems\n  a.b: is wrong\n  so is this"
    assert error.problems == (("a.b", "is wrong"), ("", "so is this"))


def test_a_single_problem_is_counted_in_the_singular() -> None:
    assert str(RecipeError([Problem("a", "b")])).startswith("recipe: 1 problem\n")


@pytest.mark.parametrize(
    ("name", "allowed", "text"),
    [
        ("mamba", ["mlp", "mamba2"], " Did you mean 'mamba2'? Allowed: mamba2, mlp."),
        ("zzz", ["mlp", "mamba2"], " Allowed: mamba2, mlp."),
        ("x", [], " Allowed: nothing."),
    ],
)
def test_nearest_suggests_a_close_name_and_lists_the_allowed_ones(name: str, allowed: list[str], text: str) -> None:
    assert nearest(name, allowed) == text
