"""`ssmvl show`: merged recipes, their costs, and drawings of scan orders."""

from __future__ import annotations

import re
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


def test_a_scan_order_is_drawn_on_the_default_grid(capsys: Capture) -> None:
    assert main(["show", "--scan", "csm"]) == 0
    shown = capsys.readouterr().out
    assert [f"path {k} of 4" in shown for k in (1, 2, 3, 4)] == [True] * 4
    assert "  ●→   1→   2→   3→   4→   5↷ " in shown
    assert "\x1b" not in shown


@pytest.mark.parametrize(("grid", "last"), [("2x3", " 5■"), ("1x2x3", " 5■"), ("2x3x5", " 29■"), ("100x100", " ■")])
def test_a_scan_order_is_drawn_on_the_given_grid(grid: str, last: str, capsys: Capture) -> None:
    assert main(["show", "--scan", "raster", "--grid", grid]) == 0
    shown = capsys.readouterr().out
    assert last in shown
    assert ("map 2" in shown) is (grid == "2x3x5")


@pytest.mark.parametrize(
    "grid", ["", "6", "1x2x3x4", "0x4x6", "4x0", "-1x4x6", "ax2", "1x4x", "2.5x2", "²x2", "101x100", "9x99999999999"]
)
def test_an_invalid_grid_is_rejected_with_the_allowed_ones(grid: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as exited:
        main(["show", "--scan", "csm", f"--grid={grid}"])
    assert exited.value.code == 2
    shown = capsys.readouterr().err
    assert "usage: ssmvl show" in shown
    assert "argument --grid: must be MAPSxROWSxCOLUMNS or ROWSxCOLUMNS" in shown
    assert f"at most 10,000 cells, received {grid!r}" in shown


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], "one of the arguments recipe --scan is required"),
        (["quickstart", "--scan", "csm"], "not allowed with argument"),
        (["--scan", "csm", "seed=3"], "not allowed with argument"),
        (["quickstart", "--grid", "2x3"], "--grid and --png need --scan"),
        (["quickstart", "--png", "x.png"], "--grid and --png need --scan"),
        (["--scan", "csm", "--params"], "--params needs a recipe"),
        (["quickstart", "--params", "--grid", "2x3"], "--grid and --png need --scan"),
        (["--params", "quickstart"], "one of the arguments recipe --scan is required"),
    ],
)
def test_recipe_and_scan_order_are_exclusive(argv: list[str], expected: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as exited:
        main(["show", *argv])
    assert exited.value.code == 2
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
def test_a_user_error_is_printed_without_traceback_and_exits_with_2(
    argv: list[str], expected: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["show", *argv]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ")
    assert expected in shown.err
    assert shown.out == ""


def test_the_png_is_written_in_addition_to_the_text(capsys: Capture, tmp_path: Path) -> None:
    assert main(["show", "--scan", "bsm", "--grid", "2x2", "--png", str(tmp_path / "x.png")]) == 0
    assert "path 2 of 2" in capsys.readouterr().out
    with Image.open(tmp_path / "x.png") as image:
        assert len(image.convert("RGB").getcolors(1 << 20)) > 10


def test_help_imports_neither_torch_nor_rich() -> None:
    code = (
        "import sys, ssmvl.cli\ntry: ssmvl.cli.main(['show', '--help'])\nfinally: print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--scan NAME" in done.stdout
    assert not {"torch", "rich", "matplotlib"} & set(done.stderr.split())


def table(shown: str, first: str) -> dict[str, list[str]]:
    """Return the rows below the heading that starts with `first`: name -> cells."""
    lines = shown.partition(f" {first} ")[2].partition("\n\n")[0].splitlines()[1:]
    return {cells[0]: cells[1:] for cells in (re.split(r" {2,}", line.strip()) for line in lines)}


def test_params_shows_shapes_and_costs(capsys: Capture) -> None:
    assert main(["show", "quickstart", "--params"]) == 0
    shown = capsys.readouterr().out
    shapes, costs = table(shown, "axes"), table(shown, "parameters")
    assert shown.startswith("One image and 64 supervised text positions.\n")
    assert shapes["image"] == ["(I, 3, S, S)", "1 × 3 × 48 × 48"]
    assert shapes["connector"] == ["(I, M, D)", "1 × 9 × 128"]
    assert shapes["language.layers"] == ["(B, T, D)", "1 × 73 × 128"]
    assert shapes["language.head"] == ["(n, V)", "64 × 352"]
    assert costs["language.embedding"] == ["45,056", "2.4%", "90.11 kB", "180.22 kB", "0"]
    assert costs["language.head"] == ["0", "0.0%", "0 bytes", "0 bytes", "5.77 M"]
    assert costs["total"][:4] == ["1,849,526", "100.0%", "3.70 MB", "7.40 MB"]
    assert costs.keys() - {"total"} == shapes.keys() - {"image"}
    assert max(map(len, shown.splitlines())) <= 80
    text = " ".join(shown.split())
    assert "encoders.fine has 134,155 parameters that this forward does not use." in text
    assert "language.head shares 45,056 parameters with a part above (tied); they are counted once." in text
    assert "Element-wise work is not counted" in text


@pytest.mark.parametrize("argv", [["seed=3", "--params"], ["--params", "seed=3"]])
def test_params_takes_overrides_before_and_after_it(argv: list[str], capsys: Capture) -> None:
    smaller = ["model.connector.num_layers=1" if word == "seed=3" else word for word in argv]
    shown = []
    for words in (argv, smaller):
        assert main(["show", "quickstart", *words]) == 0
        shown.append(table(capsys.readouterr().out, "parameters")["connector"][0])
    assert int(shown[1].replace(",", "")) < int(shown[0].replace(",", ""))


def test_params_reports_an_error_in_the_recipe(capsys: Capture) -> None:
    assert main(["show", "quickstart", "--params", "model.connector.nosuch=1"]) == 2
    shown = capsys.readouterr()
    assert "model.connector.nosuch: connector 'msc_advanced'" in shown.err
    assert shown.out == ""
