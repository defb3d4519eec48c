"""`ssmvl export`: works without Composer and streaming, and prints its result or error in one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from training.made_checkpoints import run_of, state, write_file, write_shards

from ssmvl.cli import main

pytestmark = pytest.mark.filterwarnings("default")  # torch warns when one rank saves shards
Capture = pytest.CaptureFixture[str]
ALONE = "import sys\nsys.modules.update(composer=None, streaming=None)\nfrom ssmvl.cli import main\nsys.exit(main())"


@pytest.mark.long
def test_it_works_without_composer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.chdir(tmp_path)
    _, tensors = run_of("quickstart")
    checkpoints = Path("runs/quickstart/align/checkpoints")
    complete = write_shards(checkpoints / "ep0-ba4", state(tensors))
    (checkpoints / "ep0-ba5").mkdir()
    command = [sys.executable, "-c", ALONE, "export", str(checkpoints), "--out", "out"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    skipped, saved = done.stdout.splitlines()
    assert skipped.startswith(f"skipping a checkpoint: {checkpoints / 'ep0-ba5'} cannot be read (FileNotFoundError")
    assert saved == f"saved the model of {complete} to out"
    write_file(Path("moved.pt"), state(tensors))
    assert main(["export", "moved.pt", "--out", "out2", "--recipe", "runs/quickstart"]) == 0
    assert capsys.readouterr().out == "saved the model of moved.pt to out2\n"


class ExecutesCode:
    def __reduce__(self) -> object:
        return os.makedirs, ("ran", 0o777, True)


def test_a_pickle_is_executed_only_with_the_flag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    _, tensors = run_of("quickstart")
    write_shards(Path("elsewhere"), state(tensors), lambda index: setattr(index, "planner_data", ExecutesCode()))
    command = ["export", "elsewhere", "--out", "out", "--recipe", "quickstart"]
    assert main(command) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("error: elsewhere")
    assert "--trust-pickle" in stderr
    assert not Path("ran").exists()
    assert main([*command, "--trust-pickle"]) == 0
    assert Path("ran").is_dir()


@pytest.mark.parametrize("argv", [[], ["a.pt"], ["--out", "out"], ["a.pt", "b.pt", "--out", "out"]])
def test_a_usage_error_exits_with_2(argv: list[str], capsys: Capture) -> None:
    with pytest.raises(SystemExit) as exited:
        main(["export", *argv])
    assert exited.value.code == 2
    assert "usage: ssmvl" in capsys.readouterr().err


def test_a_missing_checkpoint_exits_with_2(tmp_path: Path, capsys: Capture) -> None:
    assert main(["export", str(tmp_path / "none.pt"), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'none.pt'}: no such file or directory\n"
