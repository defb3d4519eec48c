"""Errors reported before torch is imported, descriptions of components, and options of `ssmvl check`."""

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

results = []
for hidden, argv in json.loads(sys.argv[1]):
    find_spec = importlib.util.find_spec
    if hidden:
        import ssmvl.cli.common
        ssmvl.cli.common.find_spec = lambda name: None if name == hidden else find_spec(name)
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        code = main(argv)
    results.append((code, out.getvalue() + err.getvalue(), "torch" in sys.modules))
print(json.dumps(results))
"""
# (package to hide, arguments, exit code, part of the output)
CASES: list[tuple[str, list[str], int, str]] = [
    ("", ["check", "quikstart"], 2, "unknown recipe 'quikstart'"),
    ("", ["check", "quickstart", "model.connector.scan_order=hilbrt"], 2, "unknown scan_order 'hilbrt'"),
    ("", ["check", "quickstart", "model.language.mixer=mamba3"], 2, "unknown mixer 'mamba3'"),
    ("", ["check", "quickstart", "stages.align.data=scenes"], 2, "unknown dataset 'scenes'"),
    ("", ["check", "quickstart", "model.language.weights=/nowhere"], 2, "/nowhere: no such file or directory"),
    ("", ["plan", "quickstart", "model.fusion=chanel", "--gpus", "1", "--memory", "80"], 2, "Did you mean 'channel'?"),
    ("", ["show", "quickstart", "--params", "model.prompt=mambo"], 2, "Did you mean 'mamba'?"),
    ("", ["train", "quickstart", "stages.algin=null"], 2, "Did you mean 'align'?"),
    ("composer", ["train", "quickstart"], 2, "this command requires composer: pip install 'ssmvl[train]'"),
    ("", ["train", "quickstart", "stage=align"], 0, "stage align: already finished (runs/quickstart/align/model)"),
    ("", ["generate", "~unknown-user/x", "--prompt", "x"], 2, "~unknown-user/x: no such directory"),
    ("", ["check", "quickstart", f"model.language.weights=/{'x' * 300}"], 2, "no such file or directory"),
    ("", ["check", "quickstart", "evaluation.data=scenes"], 2, "unknown dataset 'scenes'"),
    ("", ["generate", "/nowhere", "--prompt", "x"], 2, "/nowhere: no such directory"),
    ("", ["generate", ".", "--prompt", "x", "--image", "no.png"], 2, "no.png: no such image"),
    ("", ["data", "verify", "/nowhere"], 2, "/nowhere: no such directory"),
    ("", ["data", "inspect", "/nowhere"], 2, "/nowhere: no such directory"),
    ("", ["data", "convert", "no.json", "--out", "out"], 2, "no.json: no such source"),
    ("", ["export", "/no/checkpoint", "--out", "out"], 2, "/no/checkpoint: no such file or directory"),
]


def test_errors_are_reported_before_torch_is_imported(tmp_path: Path) -> None:
    finished = tmp_path / "runs" / "quickstart" / "align" / "model"
    finished.mkdir(parents=True)
    (finished / "ssmvl.json").write_text("{}")
    (tmp_path / "runs" / "quickstart" / "recipe.yaml").write_text(load_recipe("quickstart").to_yaml())
    launches = json.dumps([(hidden, argv) for hidden, argv, _, _ in CASES])
    command = [sys.executable, "-c", SCRIPT, launches]
    results = json.loads(subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout)
    for (_, argv, expected_code, text), (code, output, torch) in zip(CASES, results, strict=True):
        assert (code, torch) == (expected_code, False), (argv, output)
        assert text in output, argv


def test_list_describes_a_component_and_a_part_of_a_recipe(capsys: Capture) -> None:
    assert main(["list", "connector", "msc_advanced"]) == 0
    output = capsys.readouterr().out
    for text in (
        "connector 'msc_advanced' (ssmvl 0.1.0 (ssmvl_ml_mamba))",
        "returns: ssmvl.interfaces.Connector; the library passes: in_width, out_width, grid",
        "a scan_order",
        "int, from 1 to 256",
        "V_out = MLP(SwiGLU(MSC(V_img)))",
    ):
        assert text in output
    for part, option in (
        ("stages", "microbatch"),
        ("loader", "workers"),
        ("optimizer", "betas"),
        ("evaluation", "max_"),
    ):
        assert main(["list", part]) == 0
        assert option in capsys.readouterr().out
    assert main(["list", "mixer", "mamba3"]) == 2
    assert "unknown mixer 'mamba3'" in capsys.readouterr().err


@pytest.mark.parametrize("traceback", [False, True])
def test_a_traceback_is_shown_only_on_request(
    traceback: bool, install_plugin: Callable[[str, str], None], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    register = "@ssmvl.hookimpl\ndef ssmvl_register(register): register('prompt', 'broken', broken)"
    install_plugin("zz-broken", f"import ssmvl\ndef broken():\n    return {{}}['missing']\n{register}")
    monkeypatch.setenv("SSMVL_TRACEBACK", "")  # restored afterwards
    assert main(["check", "quickstart", "model.prompt=broken", *(["--traceback"] if traceback else [])]) == 2
    stderr = capsys.readouterr().err
    assert "model.prompt: prompt 'broken' (zz-broken 1.0 (zz_broken)) fails: KeyError: 'missing' (" in stderr
    assert "zz_broken.py, line 3)" in stderr
    assert ("Traceback (most recent call last)" in stderr) == traceback
    assert ("return {}['missing']" in stderr) == traceback
    monkeypatch.setenv("SSMVL_TRACEBACK", "1" if traceback else "0")
    assert run(["quickstart", "model.prompt=broken"]) == 2
    assert ("return {}['missing']" in capsys.readouterr().err) == traceback


def test_check_opens_the_data_with_the_flag(capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small = [f"stages.{stage}.data.train_size=64" for stage in ("align", "finetune")]
    command = ["check", "quickstart", *small, "evaluation.data={name: shards, folder: gone}"]
    assert main(command) == 0
    assert not (tmp_path / "data").exists()
    assert main([*command, "--data"]) == 2
    stderr = capsys.readouterr().err
    assert "1 problem" in stderr
    assert "evaluation.data: gone/test/index.json does not exist" in stderr
    assert (tmp_path / "data").exists()


def test_check_looks_up_an_id_on_the_hub_with_the_flag(hub: object, capsys: Capture, tmp_path: Path) -> None:
    command = ["check", "quickstart", "stages.finetune.init_from=nope/nope"]
    assert main(command) == 0
    assert (
        "stages.finetune.init_from: not checked, nope/nope is downloaded from the hub when training"
        in capsys.readouterr().out
    )
    from ssmvl.training.checked import check

    with pytest.raises(RecipeError, match=r"init_from: nope/nope is neither a local path nor a model on the hub"):
        check("quickstart", "stages.finetune.init_from=nope/nope", data=True)
