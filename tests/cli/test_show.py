from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from ssmvl.cli import main

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def plain_console(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "80")


def test_a_scan_order_is_drawn_over_the_default_grid(capsys: Capture) -> None:
    assert main(["show", "--scan", "csm"]) == 0
    shown = capsys.readouterr().out
    assert [f"path {k} of 4" in shown for k in (1, 2, 3, 4)] == [True] * 4
    assert "  ●→   1→   2→   3→   4→   5↷ " in shown
    assert "\x1b" not in shown


@pytest.mark.parametrize(("grid", "last"), [("2x3", " 5■"), ("1x2x3", " 5■"), ("2x3x5", " 29■"), ("100x100", " ■")])
def test_the_grid_is_the_one_asked_for(grid: str, last: str, capsys: Capture) -> None:
    assert main(["show", "--scan", "raster", "--grid", grid]) == 0
    shown = capsys.readouterr().out
    assert last in shown
    assert ("map 2" in shown) is (grid == "2x3x5")


@pytest.mark.parametrize(
    "grid", ["", "6", "1x2x3x4", "0x4x6", "4x0", "-1x4x6", "ax2", "1x4x", "2.5x2", "²x2", "101x100", "9x99999999999"]
)
def test_a_bad_grid_is_refused_with_what_is_allowed(grid: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as left:
        main(["show", "--scan", "csm", f"--grid={grid}"])
    assert left.value.code == 2
    shown = capsys.readouterr().err
    assert "usage: ssmvl show" in shown
    assert f"argument --grid: received {grid!r}, allowed is MAPSxROWSxCOLUMNS or ROWSxCOLUMNS" in shown
    assert "10,000 cells at most" in shown


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], "one of the arguments recipe --scan is required"),
        (["quickstart", "--scan", "csm"], "not allowed with argument"),
        (["--scan", "csm", "seed=3"], "not allowed with argument"),
        (["quickstart", "--grid", "2x3"], "--grid and --png belong to --scan"),
        (["quickstart", "--png", "x.png"], "--grid and --png belong to --scan"),
    ],
)
def test_a_recipe_or_a_scan_order_but_not_both(argv: list[str], expected: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as left:
        main(["show", *argv])
    assert left.value.code == 2
    shown = capsys.readouterr()
    assert "usage: ssmvl show" in shown.err
    assert expected in shown.err
    assert shown.out == ""


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--scan", "csn"], "Did you mean 'csm'?"),
        (["--scan", ""], "--scan: "),
        (["--scan", "csm", "--png", "nosuch/x.png"], "nosuch/x.png: cannot be written (No such file or directory)"),
        (["--scan", "csm", "--png", "/"], "/: cannot be written"),
    ],
)
def test_a_mistake_is_printed_without_a_traceback_and_gives_2(
    argv: list[str], expected: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["show", *argv]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ")
    assert expected in shown.err
    assert shown.out == ""


def test_the_png_is_written_beside_the_text(capsys: Capture, tmp_path: Path) -> None:
    assert main(["show", "--scan", "bsm", "--grid", "2x2", "--png", str(tmp_path / "x.png")]) == 0
    assert "path 2 of 2" in capsys.readouterr().out
    with Image.open(tmp_path / "x.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 10


def test_help_imports_neither_torch_nor_rich() -> None:
    code = (
        "import sys, ssmvl.cli\ntry: ssmvl.cli.main(['show', '--help'])\nfinally: print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--scan NAME" in done.stdout
    assert not {"torch", "rich", "matplotlib"} & set(done.stderr.split())
