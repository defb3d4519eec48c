"""`ssmvl data`: its options take effect, and errors exit with 2."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ssmvl.cli import main

Capture = pytest.CaptureFixture[str]


def source(folder: Path, count: int) -> Path:
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]
    path = folder / "made.json"
    path.write_text(json.dumps([{"id": str(number), "conversations": turns} for number in range(count)]))
    return path


@pytest.mark.parametrize("action", ["convert", "verify", "inspect"])
def test_help_of_every_action_imports_no_torch(action: str) -> None:
    code = (
        "import sys\nfrom ssmvl.cli import main\n"
        f"try:\n    main(['data', {action!r}, '--help'])\nexcept SystemExit as exit:\n    assert not exit.code\n"
        "print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f"usage: ssmvl data {action}" in done.stdout
    assert not set(done.stderr.split()) & {"torch", "numpy", "streaming", "transformers", "pyarrow"}


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["convert"],
        ["convert", "a.json"],
        ["convert", "--out", "out"],
        ["convert", "a.json", "--out", "out", "--workers", "0"],
        ["convert", "a.json", "--out", "out", "--max-side", "small"],
        ["verify"],
        ["inspect", "a", "--samples", "many"],
        ["inspect", "a", "--samples", "-1"],
    ],
)
def test_a_usage_error_exits_with_2(argv: list[str], capsys: Capture) -> None:
    with pytest.raises(SystemExit) as exited:
        main(["data", *argv])
    assert exited.value.code == 2
    assert "usage: ssmvl data" in capsys.readouterr().err


def test_convert_and_verify(tmp_path: Path, capsys: Capture) -> None:
    json_path, out = source(tmp_path, 20), tmp_path / "out"
    options = ["--split", "test", "--max-side", "20", "--workers", "2", "--images", str(tmp_path)]
    assert main(["data", "convert", str(json_path), "--out", str(out), *options]) == 0
    assert "20 samples in 1 shard," in capsys.readouterr().out
    settings = json.loads((out / "test" / "conversion.json").read_text())
    assert (settings["max_side"], settings["images"][0]) == (20, ["", str(tmp_path)])
    assert main(["data", "verify", str(out)]) == 0
    shard = out / "test" / "part-00000" / "shard.00000.mds"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    capsys.readouterr()
    assert main(["data", "verify", str(out / "test"), "--workers", "1"]) == 2
    assert "shard.00000.mds" in capsys.readouterr().out


def test_inspect(tmp_path: Path, capsys: Capture) -> None:
    assert main(["data", "convert", str(source(tmp_path, 20)), "--out", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    assert main(["data", "inspect", str(tmp_path / "out"), "--samples", "5"]) == 0
    assert "20" in capsys.readouterr().out


def test_a_missing_source_exits_with_2(tmp_path: Path, capsys: Capture) -> None:
    assert main(["data", "convert", str(tmp_path / "none.json"), "--out", str(tmp_path / "out")]) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("error: ")
    assert "none.json" in stderr


@pytest.mark.parametrize("option", ["--png", "--stage"])
def test_options_that_need_a_recipe_are_rejected_without_one(option: str, capsys: Capture) -> None:
    assert main(["data", "inspect", "anywhere", option, "x"]) == 2
    assert capsys.readouterr().err.strip().endswith("--png and --stage need a recipe; add --recipe NAME")
