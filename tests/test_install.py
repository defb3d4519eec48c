"""Normal and editable installations, each in its own virtual environment. Run by scripts/campaign."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CODE = "import ssmvl; print(ssmvl.build_model('quickstart', weights='recipe')); print(ssmvl.__file__)"
pytestmark = pytest.mark.slow


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """A new virtual environment that sees the packages of the current one, except ssmvl."""
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    (packages,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (packages / "zz_parent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return tmp_path / "venv" / "bin"


@pytest.mark.parametrize("editable", [False, True])
def test_recipes_weights_and_plugins_are_found_from_any_directory(
    environment: Path, tmp_path: Path, editable: bool
) -> None:
    target = ["-e", str(ROOT)] if editable else [str(ROOT)]
    subprocess.run([environment / "python", "-m", "pip", "install", "-q", "--no-deps", *target], check=True)

    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False)

    built = run(str(environment / "python"), "-c", CODE)
    assert built.returncode == 0, built.stderr
    assert "msc_" not in built.stdout
    assert "ScanConnector" in built.stdout
    assert built.stdout.splitlines()[-1].startswith(str(ROOT) if editable else str(environment.parent))
    listed = run(str(environment / "ssmvl"), "list", "connector")
    assert "msc_advanced" in listed.stdout
    (tmp_path / "mine.yaml").write_text("base: quickstart\nmodel: {conector: mlp}\n")
    launched = run(str(environment / "python"), "mine.yaml")
    assert (launched.returncode, "model.conector: ModelParts has no option" in launched.stderr) == (2, True)
