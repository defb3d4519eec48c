"""`ssmvl export`: without Composer and streaming, with one line for what it did or what is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from training.made_checkpoints import run_of, state, write_file, write_shards

from ssmvl.cli import main

pytestmark = pytest.mark.filterwarnings("default")  # torch warns where it saves shards of one rank
Capture = pytest.CaptureFixture[str]
ALONE = "import sys\nsys.modules.update(composer=None, streaming=None)\nfrom ssmvl.cli import main\nsys.exit(main())"


@pytest.mark.long
def test_it_needs_no_composer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.chdir(tmp_path)
    _, tensors = run_of("quickstart")
    checkpoints = Path("runs/quickstart/align/checkpoints")
    whole = write_shards(checkpoints / "ep0-ba4", state(tensors))
    (checkpoints / "ep0-ba5").mkdir()
    command = [sys.executable, "-c", ALONE, "export", str(checkpoints), "--out", "out"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    passed, said = done.stdout.splitlines()
    assert passed.startswith(f"passed over a checkpoint: {checkpoints / 'ep0-ba5'} cannot be read (FileNotFoundError")
    assert said == f"out holds the model of {whole}"
    write_file(Path("moved.pt"), state(tensors))
    assert main(["export", "moved.pt", "--out", "out2", "--recipe", "runs/quickstart"]) == 0
    assert capsys.readouterr().out == "out2 holds the model of moved.pt\n"


class Runs:
    def __reduce__(self) -> object:
        return os.makedirs, ("ran", 0o777, True)


def test_the_flag_is_the_only_way_to_run_a_pickle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    _, tensors = run_of("quickstart")
    write_shards(Path("elsewhere"), state(tensors), lambda index: setattr(index, "planner_data", Runs()))
    command = ["export", "elsewhere", "--out", "out", "--recipe", "quickstart"]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: elsewhere")
    assert "--trust-pickle" in said
    assert not Path("ran").exists()
    assert main([*command, "--trust-pickle"]) == 0
    assert Path("ran").is_dir()


@pytest.mark.parametrize("argv", [[], ["a.pt"], ["--out", "out"], ["a.pt", "b.pt", "--out", "out"]])
def test_a_wrong_command_line_leaves_with_2(argv: list[str], capsys: Capture) -> None:
    with pytest.raises(SystemExit) as left:
        main(["export", *argv])
    assert left.value.code == 2
    assert "usage: ssmvl" in capsys.readouterr().err


def test_what_is_not_there_leaves_with_2(tmp_path: Path, capsys: Capture) -> None:
    assert main(["export", str(tmp_path / "none.pt"), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'none.pt'}: no such file or folder\n"
