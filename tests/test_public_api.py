"""The public API: the names in `__all__`, their page docs/api.md, and the imports of plugins and documents."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import ssmvl

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "make_api_docs.py"
INTERNAL = "docs/architecture.md"  # describes private modules too
DOCS = {str(path.relative_to(ROOT)) for path in ROOT.glob("docs/*.md")} - {INTERNAL}
PAGES = ["README.md", "CONTRIBUTING.md", "plugins/ssmvl-hilbert/README.md", *sorted(DOCS)]
PUBLIC = set(re.findall(r"^## (\S+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE))


@pytest.mark.parametrize("name", ssmvl.__all__)
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(ssmvl, name) is not None


def test_every_lazy_name_is_public() -> None:
    assert set(ssmvl._HOME) <= set(ssmvl.__all__)


def test_an_unknown_attribute_raises_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'ssmvl' has no attribute 'no_such_name'"):
        ssmvl.no_such_name  # noqa: B018


def test_list_components_returns_all_kinds_or_one() -> None:
    orders = ssmvl.list_components("scan_order")
    assert {entry.kind for entry in orders} == {"scan_order"}
    assert {entry.name for entry in orders} >= {"bsm", "csm", "raster"}
    assert set(orders) < set(ssmvl.list_components())


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = {"torch", "numpy", "omegaconf", "composer", "streaming", "transformers", "timm", "pluggy"}
    code = f"import sys, ssmvl; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_the_page_matches_the_modules(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(SCRIPT), str(tmp_path / "api.md")], check=True)
    generated, committed = (tmp_path / "api.md").read_text(), (ROOT / "docs" / "api.md").read_text()
    assert committed == generated, "run python scripts/make_api_docs.py"


def test_import_linter_forbids_plugins_every_private_module() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (contract,) = (each for each in contracts if each["name"] == "plugins import the public API only")
    private = sorted(private_modules(ROOT / "ssmvl", "ssmvl"))
    assert contract["forbidden_modules"] == private, "list these modules in pyproject.toml, or declare an __all__"


def private_modules(folder: Path, package: str) -> Iterator[str]:
    """Yield modules without public names. A package without any is one entry: import-linter includes its modules."""
    for path in folder.iterdir():
        name = f"{package}.{path.stem}"
        public = any(module == name or module.startswith(f"{name}.") for module in PUBLIC)
        if (path / "__init__.py").is_file() and public:
            yield from private_modules(path, name)
        elif ((path / "__init__.py").is_file() or path.suffix == ".py") and path.stem != "__init__" and not public:
            yield name


def imports(code: str) -> Iterator[tuple[str, str]]:
    """Yield the module and name of each `from ssmvl… import name`."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and re.match(r"ssmvl(\.|$)", node.module or ""):
            yield from ((str(node.module), alias.name) for alias in node.names)


def is_public(module: str, name: str) -> bool:
    return f"{module}.{name}" in PUBLIC or (module in PUBLIC and name in importlib.import_module(module).__all__)


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("plugins/*/**/*.py")), ids=lambda path: f"{path.parent.name}/{path.name}"
)
def test_plugins_import_public_names_only(path: Path) -> None:
    assert [imported for imported in imports(path.read_text()) if not is_public(*imported)] == []


@pytest.mark.parametrize("page", PAGES)
def test_pages_mention_public_names_only(page: str) -> None:
    text = (ROOT / page).read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    imported = [pair for block in blocks for pair in imports(block)]
    dotted = re.findall(r"`(ssmvl(?:\.[a-z_]\w*)*)\.([A-Za-z_]\w*)[`(]", text)  # `ssmvl.ops.ssd.ssd`
    assert [pair for pair in [*imported, *dotted] if not is_public(*pair)] == []
