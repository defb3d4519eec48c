from __future__ import annotations

import subprocess
import sys

import pytest

import ssmvl


@pytest.mark.parametrize("name", ssmvl.__all__)
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(ssmvl, name) is not None


def test_every_lazy_name_is_public() -> None:
    assert set(ssmvl._HOME) <= set(ssmvl.__all__)


def test_an_unknown_attribute_is_an_attribute_error_that_names_it() -> None:
    with pytest.raises(AttributeError, match="'ssmvl' has no attribute 'no_such_name'"):
        ssmvl.no_such_name  # noqa: B018


def test_list_components_gives_all_or_one_kind() -> None:
    orders = ssmvl.list_components("scan_order")
    assert {entry.kind for entry in orders} == {"scan_order"}
    assert {entry.name for entry in orders} >= {"bsm", "csm", "raster"}
    assert set(orders) < set(ssmvl.list_components())


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = {"torch", "numpy", "omegaconf", "composer", "streaming", "transformers", "timm", "pluggy"}
    code = f"import sys, ssmvl; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
