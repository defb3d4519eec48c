"""Old import paths give the moved objects, with a warning that names the new path."""

from __future__ import annotations

import importlib
import sys

import pytest

from ssmvl import _moved


@pytest.mark.parametrize("old", _moved.MODULES)
def test_an_old_module_is_the_new_one(old: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, old, raising=False)
    new = _moved.MODULES[old]
    message = rf"^{old} has moved to {new}; the old path will be removed in"
    with pytest.warns(DeprecationWarning, match=message) as warned:
        module = importlib.import_module(old)
    assert module is importlib.import_module(new)
    assert module.__spec__.name == new
    assert len(warned) == 1


def test_the_warning_points_at_the_import(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ssmvl.text", "ssmvl.text.prompts"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.warns(DeprecationWarning, match="has moved to") as warned:
        from ssmvl.text.prompts import MambaPrompt
    assert {warning.filename for warning in warned} == {__file__}
    assert MambaPrompt.__module__ == "ssmvl.processing.prompts"


@pytest.mark.parametrize(("old", "new"), _moved.NAMES.items())
def test_an_old_name_is_the_new_object(old: str, new: str) -> None:
    (old_module, old_name), (new_module, new_name) = (path.rsplit(".", 1) for path in (old, new))
    with pytest.warns(DeprecationWarning, match=rf"^{old} has moved to {new};"):
        value = getattr(importlib.import_module(old_module), old_name)
    assert value is getattr(importlib.import_module(new_module), new_name)


def test_an_unknown_name_raises_the_usual_error() -> None:
    with pytest.raises(AttributeError, match=r"module 'ssmvl\.checkpoints' has no attribute 'nothing'"):
        _moved.moved_name("ssmvl.checkpoints", "nothing")
    with pytest.raises(ModuleNotFoundError, match=r"ssmvl\.nothing"):
        importlib.import_module("ssmvl.nothing")
