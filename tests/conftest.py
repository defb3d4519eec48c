"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hub import hub as hub
from s3 import bucket as bucket
from s3 import delete as delete
from s3 import objects as objects
from s3 import put as put
from s3 import s3_server as s3_server

from ssmvl.plugins import components


def pytest_configure(config: pytest.Config) -> None:
    """Use one thread per pytest worker and its subprocesses, so that they do not compete for cores."""
    if hasattr(config, "workerinput"):
        torch.set_num_threads(1)
        os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run training tests first, so that workers that finish early can take over short tests."""
    items.sort(key=lambda item: not item.nodeid.startswith(("tests/test_docs.py", "tests/training/")))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def install_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """`install_plugin("name", code)` creates a distribution `name` 1.0 whose entry point is a module with that code."""
    monkeypatch.syspath_prepend(str(tmp_path))
    modules: list[str] = []

    def install(name: str, code: str) -> None:
        module = name.replace("-", "_")
        (tmp_path / f"{module}.py").write_text(code)
        info = tmp_path / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[ssmvl]\n{name} = {module}\n")
        modules.append(module)
        components.cache_clear()

    yield install
    components.cache_clear()
    for module in modules:
        sys.modules.pop(module, None)
