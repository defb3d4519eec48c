"""Mistakes reported before torch is imported, and the description of a component."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ssmvl.cli import main
from ssmvl.errors import RecipeError
from ssmvl.recipes.merge import load_recipe
from ssmvl.training.run import main as run

Capture = pytest.CaptureFixture[str]
SCRIPT = """
import importlib.util, json, sys
from contextlib import redirect_stdout, redirect_stderr
from io import StringIO
from ssmvl.cli import main

found = []
for hidden, argv in json.loads(sys.argv[1]):
    find_spec = importlib.util.find_spec
    if hidden:
        import ssmvl.cli.common
        ssmvl.cli.common.find_spec = lambda name: None if name == hidden else find_spec(name)
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        code = main(argv)
    found.append((code, out.getvalue() + err.getvalue(), "torch" in sys.modules))
print(json.dumps(found))
"""
ANSWERS: list[tuple[str, list[str], int, str]] = [
    ("", ["check", "quikstart"], 2, "no recipe named 'quikstart'"),
    ("", ["check", "quickstart", "model.connector.scan_order=hilbrt"], 2, "no scan_order named 'hilbrt'"),
    ("", ["check", "quickstart", "model.language.mixer=mamba3"], 2, "no mixer named 'mamba3'"),
    ("", ["check", "quickstart", "stages.align.data=scenes"], 2, "no dataset named 'scenes'"),
    ("", ["check", "quickstart", "model.language.weights=/nowhere"], 2, "/nowhere: no such file or folder"),
    ("", ["plan", "quickstart", "model.fusion=chanel", "--gpus", "1", "--memory", "80"], 2, "Did you mean 'channel'?"),
    ("", ["show", "quickstart", "--params", "model.prompt=mambo"], 2, "Did you mean 'mamba'?"),
    ("", ["train", "quickstart", "stages.algin=null"], 2, "Did you mean 'align'?"),
    ("composer", ["train", "quickstart"], 2, "this needs composer: pip install 'ssmvl[train]'"),
    ("", ["train", "quickstart", "stage=align"], 0, "stage align: finished before, runs/quickstart/align/model"),
    ("", ["generate", "~nobody-of-that-name/x", "--prompt", "x"], 2, "~nobody-of-that-name/x: no such folder"),
    ("", ["check", "quickstart", f"model.language.weights=/{'x' * 300}"], 2, "no such file or folder"),
    ("", ["check", "quickstart", "evaluation.data=scenes"], 2, "no dataset named 'scenes'"),
    ("", ["generate", "/nowhere", "--prompt", "x"], 2, "/nowhere: no such folder"),
    ("", ["generate", ".", "--prompt", "x", "--image", "no.png"], 2, "no.png: no such image"),
    ("", ["data", "verify", "/nowhere"], 2, "/nowhere: no such folder"),
    ("", ["data", "inspect", "/nowhere"], 2, "/nowhere: no such folder"),
    ("", ["data", "convert", "no.json", "--out", "out"], 2, "no.json: no such source"),
    ("", ["export", "/no/checkpoint", "--out", "out"], 2, "/no/checkpoint: no such file or folder"),
]


def test_mistakes_are_told_before_torch_is_imported(tmp_path: Path) -> None:
    finished = tmp_path / "runs" / "quickstart" / "align" / "model"
    finished.mkdir(parents=True)
    (finished / "ssmvl.json").write_text("{}")
    (tmp_path / "runs" / "quickstart" / "recipe.yaml").write_text(load_recipe("quickstart").to_yaml())
    given = json.dumps([(hidden, argv) for hidden, argv, _, _ in ANSWERS])
    command = [sys.executable, "-c", SCRIPT, given]
    found = json.loads(subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout)
    for (_, argv, code, text), (found_code, said, torch) in zip(ANSWERS, found, strict=True):
        assert (found_code, torch) == (code, False), (argv, said)
        assert text in said, argv


def test_list_describes_a_component_and_a_part_of_a_recipe(capsys: Capture) -> None:
    assert main(["list", "connector", "msc_advanced"]) == 0
    said = capsys.readouterr().out
    for text in (
        "connector 'msc_advanced' (ssmvl 0.1.0 (ssmvl_ml_mamba))",
        "gives: ssmvl.interfaces.Connector; the library passes: in_width, out_width, grid",
        "a scan_order",
        "int, from 1 to 256",
        "V_out = MLP(SwiGLU(MSC(V_img)))",
    ):
        assert text in said
    for part, option in (
        ("stages", "microbatch"),
        ("loader", "workers"),
        ("optimizer", "betas"),
        ("evaluation", "max_"),
    ):
        assert main(["list", part]) == 0
        assert option in capsys.readouterr().out
    assert main(["list", "mixer", "mamba3"]) == 2
    assert "no mixer named 'mamba3'" in capsys.readouterr().err


@pytest.mark.parametrize("asked", [False, True])
def test_a_traceback_is_shown_to_those_who_ask(
    asked: bool, install_plugin: Callable[[str, str], None], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    register = "@ssmvl.hookimpl\ndef ssmvl_register(register): register('prompt', 'broken', broken)"
    install_plugin("zz-broken", f"import ssmvl\ndef broken():\n    return {{}}['missing']\n{register}")
    monkeypatch.setenv("SSMVL_TRACEBACK", "")  # restored afterwards
    assert main(["check", "quickstart", "model.prompt=broken", *(["--traceback"] if asked else [])]) == 2
    said = capsys.readouterr().err
    assert "model.prompt: prompt 'broken' (zz-broken 1.0 (zz_broken)) fails: KeyError: 'missing' (" in said
    assert "zz_broken.py, line 3)" in said
    assert ("Traceback (most recent call last)" in said) == asked
    assert ("return {}['missing']" in said) == asked
    monkeypatch.setenv("SSMVL_TRACEBACK", "1" if asked else "0")
    assert run(["quickstart", "model.prompt=broken"]) == 2
    assert ("return {}['missing']" in capsys.readouterr().err) == asked


def test_check_opens_the_data_if_asked(capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small = [f"stages.{stage}.data.train_size=64" for stage in ("align", "finetune")]
    command = ["check", "quickstart", *small, "evaluation.data={name: shards, folder: gone}"]
    assert main(command) == 0
    assert not (tmp_path / "data").exists()
    assert main([*command, "--data"]) == 2
    said = capsys.readouterr().err
    assert "1 problem" in said
    assert "evaluation.data: gone/test/index.json does not exist" in said
    assert (tmp_path / "data").exists()


def test_an_id_is_looked_up_in_the_hub_if_asked(hub: object, capsys: Capture, tmp_path: Path) -> None:
    command = ["check", "quickstart", "stages.finetune.init_from=nope/nope"]
    assert main(command) == 0
    assert (
        "stages.finetune.init_from: not checked, nope/nope is downloaded from the hub when training"
        in capsys.readouterr().out
    )
    from ssmvl.training.checked import check

    with pytest.raises(RecipeError, match=r"init_from: nope/nope: no such path here, and not a model on the hub"):
        check("quickstart", "stages.finetune.init_from=nope/nope", data=True)
