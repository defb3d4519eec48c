"""Run every code block of the README and the docs as a reader would, each document in its own directory.

A block whose first line is `# path/of/a.file` is written to that file. Shell and Python blocks are run in order. Three
commands differ from a reader's: `composer` trains for a few steps on one rank, without the slow launcher;
`pip install -e` installs into a directory of the test, without a network; and `pytest` without arguments, which would
run these tests again, does nothing.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.docs
DOCUMENTS = [
    "README.md",
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")),
]
PLUGIN = ["plugins/ssmvl-hilbert/README.md"]
PROJECT = ["CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "benchmarks/README.md"]
LANGUAGES = {"bash", "python", "toml", "yaml", ""}  # no language: drawings and the output of commands
CUTS = [
    "stages.align.duration=2ba",
    "stages.align.warmup=0ba",
    "stages.align.data.train_size=128",
    "stages.finetune.duration=2ba",
    "stages.finetune.warmup=0ba",
    "stages.finetune.data.train_size=128",
    "evaluation.data.test_size=10",
]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
BIN = Path(sys.executable).parent
SHIMS = {
    "composer": f"""
[ "$1" = -n ] && exec "{BIN}/composer" "$@" {" ".join(CUTS)}
exec "{BIN}/python" "$@" {" ".join(CUTS)}
""",
    "pytest": f'[ $# -eq 0 ] || exec "{BIN}/python" -m pytest -q -n 0 -p no:cacheprovider "$@"',
    "pip": f"""
[ "$1 $2" = "install -e" ] || {{ echo "pip $*: not allowed here" >&2; exit 2; }}
case "$3" in .*) exit 0;; esac  # the library itself is installed
install="{BIN}/python -m pip install -q --no-index --no-deps --no-build-isolation"
exec $install --upgrade --target "$SITE" "./${{3%%[*}}"
""",
}


class Block(NamedTuple):
    line: int
    language: str
    code: str

    @property
    def file(self) -> str | None:
        match = re.match(r"# ([\w.-]+(?:/[\w.-]+)+|[\w-]+\.(?:py|toml|yaml))\n", self.code)
        return match[1] if match else None


def blocks(document: str) -> list[Block]:
    text = (ROOT / document).read_text()
    return [Block(text[: fence.start()].count("\n") + 1, fence[1], fence[2]) for fence in FENCE.finditer(text)]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A directory with the parts of a checkout that the documents use, and the three commands above."""
    for name in ("recipes", "plugins", "docs", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / ".bin").mkdir()
    for name, code in SHIMS.items():
        (tmp_path / ".bin" / name).write_text(f"#!/usr/bin/env bash\n{code}\n")
        (tmp_path / ".bin" / name).chmod(0o755)
    site = tmp_path / ".site"
    path = os.pathsep.join([str(tmp_path / ".bin"), str(BIN), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "SITE": str(site), "PYTHONPATH": str(site), "COLUMNS": "100"}


@pytest.mark.parametrize("document", [*DOCUMENTS, pytest.param(*PLUGIN, marks=pytest.mark.slow)])
def test_code_blocks_run(document: str, tmp_path: Path, environment: dict[str, str]) -> None:
    for block in blocks(document):
        where = f"{document}:{block.line}"
        assert block.language in LANGUAGES, where
        if block.file:
            target = tmp_path / block.file
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(block.code)
        elif block.language in ("bash", "python"):
            command = ["bash", "-euo", "pipefail", "-c"] if block.language == "bash" else [sys.executable, "-c"]
            process = subprocess.run(
                [*command, block.code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
            )
            output = f"{process.stdout[-2000:]}\n{process.stderr[-4000:]}"
            assert process.returncode == 0, f"{where}\n{block.code}\n{output}"


def test_blocks_are_found() -> None:
    all_blocks = [block for document in DOCUMENTS for block in blocks(document)]
    assert {block.language for block in all_blocks} >= {"bash", "python", "toml", "yaml"}
    assert any(block.file == "ssmvl-mine/pyproject.toml" for block in all_blocks)


@pytest.mark.parametrize("document", DOCUMENTS + PLUGIN + PROJECT)
def test_links_and_images_exist(document: str) -> None:
    text = FENCE.sub("", (ROOT / document).read_text())
    targets = [t for t in re.findall(r'\]\(([^)#\s]+)|src="([^"]+)"', text) for t in t if t]
    missing = [t for t in targets if not t.startswith("http") and not (ROOT / document).parent.joinpath(t).exists()]
    assert missing == []
