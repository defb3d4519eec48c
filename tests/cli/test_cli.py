"""The command `ssmvl`: help, usage errors, `list`, `doctor`, and options passed on to the library."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ssmvl
from ssmvl.cli import VERBS, main
from ssmvl.recipes.merge import load_recipe

Install = Callable[[str, str], None]
Capture = pytest.CaptureFixture[str]

PLUGIN = "import ssmvl\n@ssmvl.hookimpl\ndef ssmvl_register(register):\n    register('mixer', 'shared', dict)\n"


def loaded_modules(*argv: str) -> set[str]:
    code = (
        "import sys\nfrom ssmvl.cli import main\n"
        f"try:\n    main({list(argv)!r})\nexcept SystemExit as exit:\n    assert not exit.code\n"
        "print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


@pytest.mark.parametrize(("argv", "light"), [(["--help"], True), (["list"], False), (["list", "mixer"], False)])
def test_help_and_list_import_nothing_heavy(argv: list[str], light: bool) -> None:
    heavy = {"torch", "numpy", "timm", "composer", "streaming", "transformers"}
    assert not loaded_modules(*argv) & (heavy | ({"omegaconf", "pluggy"} if light else set()))


def test_help_lists_every_verb(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as exited:
        main(["--help"])
    shown = capsys.readouterr().out
    assert exited.value.code == 0
    assert all(verb in shown for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as exited:
        main([verb, "--help"])
    assert exited.value.code == 0
    assert f"usage: ssmvl {verb}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["chekc"],
        ["check"],
        ["show"],
        ["list", "nothing"],
        ["show", "quickstart", "--seed=1"],
        ["generate", "x"],
        ["doctor", "--nosuch"],
    ],
)
def test_a_usage_error_exits_with_2(argv: list[str], capsys: Capture) -> None:
    with pytest.raises(SystemExit) as exited:
        main(argv)
    assert exited.value.code == 2
    assert "usage: ssmvl" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["check", "quickstrat"], "Did you mean 'quickstart'?"),
        (["check", "nosuch.yaml"], "nosuch.yaml does not exist"),
        (["show", "quickstart", "seed"], "'seed' is not an override"),
        (["show", "quickstart", "stagess.x=1"], "stagess: unknown part of a recipe"),
        (
            ["check", "quickstart", "model.connector.nosuch=1"],
            "model.connector.nosuch: connector 'msc_advanced' (ssmvl 0.1.0 (ssmvl_ml_mamba)) has no option",
        ),
        (
            ["train", "quickstart", "model.connector.nosuch=1"],
            "model.connector.nosuch: connector 'msc_advanced' (ssmvl 0.1.0 (ssmvl_ml_mamba)) has no option",
        ),
        (["generate", "nosuch", "--prompt", "x"], "nosuch: no such directory, and not a Hub model id"),
    ],
)
def test_a_user_error_is_printed_without_traceback_and_exits_with_2(
    argv: list[str], expected: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ")
    assert expected in shown.err
    assert shown.out == ""


@pytest.mark.parametrize("content", [b"- a\n", b"", b"\xff\xfe", b"a: [\n", b"base: 5\nmodel: {}\n"])
def test_a_file_that_is_not_a_recipe_exits_with_2(content: bytes, capsys: Capture, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(content)
    assert main(["check", str(path)]) == 2
    assert str(path) in capsys.readouterr().err


def test_check_reports_that_a_recipe_has_no_problem(capsys: Capture) -> None:
    assert main(["check", "quickstart", "seed=3"]) == 0
    assert capsys.readouterr().out.endswith("quickstart.yaml: no problem found\n")


def test_show_prints_the_merged_recipe(capsys: Capture, tmp_path: Path) -> None:
    assert main(["show", "quickstart", "model.connector.scan_order=csm", "seed=3"]) == 0
    again = tmp_path / "again.yaml"
    again.write_text(capsys.readouterr().out)
    assert load_recipe(again).data == load_recipe("quickstart", "model.connector.scan_order=csm", "seed=3").data


def test_list_shows_recipes_and_components_with_their_source(capsys: Capture) -> None:
    assert main(["list"]) == 0
    rows = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()]
    assert ["mixer", "mamba2", "ssmvl"] in rows
    assert ["recipe", "quickstart"] in rows
    assert any(row[:2] == ["connector", "msc_advanced"] and "ssmvl_ml_mamba" in row[2] for row in rows)


def test_a_name_that_is_not_a_string_disables_only_its_plugin(install_plugin: Install, capsys: Capture) -> None:
    register = "import ssmvl\n@ssmvl.hookimpl\ndef ssmvl_register(register): register('scan_order', {!r}, lambda g: g)"
    install_plugin("numbers-plugin", register.format(5))
    install_plugin("good-plugin", register.format("zigzag"))
    assert main(["list", "scan_order"]) == 0
    shown = capsys.readouterr().out
    assert "zigzag" in shown
    assert (
        "Plugin numbers-plugin 1.0 (numbers_plugin) could not be loaded (ValueError: the name of a scan_order" in shown
    )


def test_list_shows_one_kind(capsys: Capture) -> None:
    assert main(["list", "scan_order"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert {row[0] for row in rows} == {"scan_order"}
    assert {row[1] for row in rows} >= {"bsm", "csm", "raster"}


def test_list_shows_conflicts_and_failures_without_warnings(install_plugin: Install, capsys: Capture) -> None:
    install_plugin("mm-broken", "raise OSError('no luck')")
    install_plugin("zz-one", PLUGIN)
    install_plugin("zz-two", PLUGIN)
    assert main(["list"]) == 0
    shown = capsys.readouterr()
    assert "conflict: mixer 'shared' is registered by both zz-one 1.0 (zz_one) and zz-two 1.0 (zz_two)" in shown.out
    assert "Plugin mm-broken 1.0 (mm_broken) could not be loaded (OSError: no luck (" in shown.out
    assert shown.err == ""


@pytest.fixture
def no_stale_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssmvl.data.shared_memory.stale_segments", list)


@pytest.mark.usefixtures("no_stale_memory")
def test_doctor_reports_a_healthy_installation(capsys: Capture) -> None:
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert f"plugin          ssmvl {ssmvl.__version__} (ssmvl_ml_mamba)" in shown
    assert re.search(r"backend +ssd: auto = torch; not mamba_ssm: .+", shown)
    assert "nothing left behind by dead runs" in shown


@pytest.mark.usefixtures("no_stale_memory")
def test_doctor_reports_a_broken_plugin_and_exits_with_1(install_plugin: Install, capsys: Capture) -> None:
    install_plugin("mm-broken", "raise OSError('no luck')")
    assert main(["doctor"]) == 1
    assert "broken plugin   Plugin mm-broken 1.0 (mm_broken) could not be loaded (OSError: no luck (" in (
        capsys.readouterr().out
    )


@pytest.mark.usefixtures("no_stale_memory")
def test_doctor_reports_a_missing_package_and_exits_with_1(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssmvl.cli.doctor.PACKAGES", ("zz-no-such-package",))
    assert main(["doctor"]) == 1
    assert "zz-no-such-package MISSING" in capsys.readouterr().out


@pytest.mark.parametrize(("argv", "cleaned"), [(["doctor"], False), (["doctor", "--clean"], True)])
def test_doctor_removes_shared_memory_only_with_clean(
    argv: list[str], cleaned: bool, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    stale = [Path("/dev/shm/000000_locals")]
    monkeypatch.setattr("ssmvl.data.shared_memory.stale_segments", lambda: stale)
    monkeypatch.setattr("ssmvl.data.shared_memory.clean_stale_segments", lambda: calls.append("clean") or stale)
    main(argv)
    assert bool(calls) is cleaned
    assert f"1 files {'removed' if cleaned else 'left behind by dead runs'}" in capsys.readouterr().out


def test_generate_prints_the_answer(capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[Any] = []
    monkeypatch.chdir(tmp_path)
    Path("runs/x").mkdir(parents=True)
    Path("x.png").touch()
    Path("y.png").touch()

    class FakeAssistant:
        def generate(self, prompts: list[str], images: list[list[str]], *, max_new_tokens: int) -> list[str]:
            calls.append((prompts, images, max_new_tokens))
            return ["a digit"]

    monkeypatch.setattr("ssmvl.generation.assistant.load", lambda folder: calls.append(folder) or FakeAssistant())
    assert main(["generate", "runs/x", "--prompt", "What?", "--image", "x.png", "--max-new-tokens", "5"]) == 0
    assert capsys.readouterr().out == "a digit\n"
    assert calls == ["runs/x", (["What?"], [["x.png"]], 5)]
    assert main(["generate", "runs/x", "--prompt", "What?", "--image", "x.png", "--image", "y.png"]) == 0
    assert calls[2:] == ["runs/x", (["What?"], [["x.png", "y.png"]], 64)]
    assert main(["generate", "runs/x", "--prompt", "What?"]) == 0
    assert calls[4:] == ["runs/x", (["What?"], [[]], 64)]


@pytest.mark.parametrize("count", ["-3", "0", "1.5", "x"])
def test_generate_rejects_counts_that_are_not_positive(count: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["generate", "runs/x", "--prompt", "What?", "--max-new-tokens", count])
    assert f"must be an integer of at least 1, received '{count}'" in capsys.readouterr().err


def test_the_version_is_printed(capsys: Capture) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"ssmvl {ssmvl.__version__}\n"


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied", "data/train"), UnicodeError("no text")])
def test_an_unreadable_directory_gives_one_message(
    error: Exception, capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(path: Path) -> None:
        raise error

    monkeypatch.setattr(Path, "iterdir", fail)
    assert main(["data", "verify", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: {error}\n"


def test_train_passes_on_recipe_and_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr("ssmvl.training.run.train", lambda *arguments: calls.append(arguments))
    assert main(["train", "quickstart", "seed=1", "run=x"]) == 0
    assert calls == [(ssmvl.load_recipe("quickstart", "seed=1", "run=x"),)]


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("argv", [["list"], ["show", "quickstart"], ["show", "--scan", "csm"]])
def test_a_closed_pipe_causes_no_traceback(argv: list[str], unbuffered: str) -> None:
    """`ssmvl list | true`."""
    read, write = os.pipe()
    os.close(read)
    code = "import sys; from ssmvl.cli import main; sys.exit(main())"
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    command = [sys.executable, "-c", code, *argv]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, env=environment, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


def test_an_interrupt_causes_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ssmvl.recipes.merge.load_recipe", interrupted)
    assert main(["show", "quickstart"]) == 130
