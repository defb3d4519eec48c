from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import ssmvl
from ssmvl.checkpoints import read_tensors
from ssmvl.errors import CheckpointError, DataError, MissingDependencyError, RecipeError, RunError
from ssmvl.processing.prompts import PlainPrompt, VicunaPrompt
from ssmvl.training import run
from ssmvl.training.checkpoints.export import export
from ssmvl.vision.digit_vit import SHIPPED

Composer = Callable[..., subprocess.Popen[str]]
HERE = Path(__file__).parent
pytestmark = pytest.mark.filterwarnings("default")  # Composer, streaming and torch.distributed emit warnings


def test_a_run_writes_its_files_and_resumes_where_it_was(tiny: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = ssmvl.train(tiny)
    assert folder == Path("runs/tiny")
    results = json.loads((folder / "results.json").read_text())
    assert set(results) == {"recognition", "counting", "presence", "spatial", "reading"}
    keys = {"accuracy", "interval", "blind", "swapped", "commonest", "n"}
    assert all(row.keys() == keys and row["n"] == 2 for row in results.values())
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in ("answers.png", "curves.png"))
    assert list((folder / "tensorboard").rglob("events.*"))
    assistant = ssmvl.load(folder)
    image = next(iter(assistant.processor.image_specs)).size
    assert image == 48
    assert len(assistant.generate(["Which digit is it?", "hi"], max_new_tokens=3)) == 2

    capfd.readouterr()
    assert ssmvl.train(tiny) == folder
    output = capfd.readouterr().out
    assert "stage align: already finished" in output
    assert "stage finetune: already finished" in output
    shutil.rmtree(folder / "model")  # as if killed after the last checkpoint, before the model was saved
    assert ssmvl.train(tiny) == folder
    assert "stage finetune: resumed at step 4," in capfd.readouterr().out
    assert ssmvl.load(folder).generate(["hi"], max_new_tokens=3) == assistant.generate(["hi"], max_new_tokens=3)
    with pytest.raises(RunError, match=r"(?s)run=NAME.*model\.connector\.scan_order: was 'bsm', is now 'csm'"):
        ssmvl.train(tiny, "model.connector.scan_order=csm")


def test_each_stage_starts_from_the_previous_model_and_trains_its_parts_only(tiny: Path) -> None:
    prompts = ("stages.align.prompt=plain", "stages.finetune.prompt=vicuna")
    folder = ssmvl.train(tiny, "stages.finetune.optimizer.lr=0.0", "stages.finetune.train=[language]", *prompts)
    assert type(ssmvl.load(folder).processor.prompt) is VicunaPrompt  # each has the prompt it was trained with
    assert type(ssmvl.load(folder / "align").processor.prompt) is PlainPrompt
    export(folder / "align/checkpoints", "exported")
    assert type(ssmvl.load("exported").processor.prompt) is PlainPrompt
    align, _ = read_tensors(folder / "align" / "model" / "model.safetensors")
    final, _ = read_tensors(folder / "model" / "model.safetensors")
    torch.manual_seed(0)
    fresh = ssmvl.build_model(tiny).state_dict()
    assert align.keys() == final.keys() == fresh.keys()
    for name, tensor in align.items():
        assert torch.equal(final[name], tensor), name
        if name.startswith("encoders.fine.vit."):
            shipped, _ = read_tensors(SHIPPED / "digit_vit_fine.safetensors")
            assert torch.equal(tensor, shipped[name.removeprefix("encoders.fine.vit.")])
    changed = {
        name for name, tensor in align.items() if name.startswith("connector") and not torch.equal(tensor, fresh[name])
    }
    assert changed == {name for name in align if name.startswith("connector")}


@pytest.mark.slow
def test_every_parameter_is_sharded(tiny: Path, composer: Composer) -> None:
    process = composer("-n", "2", str(HERE / "sharded_script.py"), "tiny.yaml", "report.json")
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    report = json.loads(Path("report.json").read_text())
    assert report["not_sharded"] == []
    assert report["sharded"] > 50
    assert report["equal_to_one_rank"]
    assert report["gradient_of_the_rank_with_images"] > 0


def test_a_file_in_the_way_of_the_run_folder_is_named(tiny: Path) -> None:
    Path("runs").mkdir()
    Path("runs/tiny").write_text("a file in the way")
    with pytest.raises(RunError, match="runs/tiny"):
        ssmvl.train(tiny)


@pytest.mark.slow
def test_a_yaml_file_that_is_not_a_recipe_ends_the_launcher(tiny: Path, composer: Composer) -> None:
    Path("other.yaml").write_text("[1, 2]")
    output, _ = (process := composer("other.yaml")).communicate(timeout=300)
    assert process.returncode == 2
    assert "a recipe must be a mapping with `model:` and `stages:`" in output
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "cannot be read"),
        ("[1, 2]", "a recipe must be a mapping with `model:` and `stages:`"),
        ("model: {}\nstages: {}", "encoders: ModelParts needs"),
    ],
)
def test_a_recipe_with_mistakes_gets_one_message(
    tiny: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    Path("other.yaml").write_text(text)
    assert run.main(["other.yaml"]) == 2
    assert message in capsys.readouterr().err


def test_the_launcher_takes_the_name_of_a_recipe(tmp_path: Path) -> None:
    """Composer's launcher starts `python -u NAME`; any other missing script stays Python's own error."""
    environment = {**os.environ, "LOCAL_WORLD_SIZE": "1"}
    for name, message in (("quikstart", "Did you mean 'quickstart'?"), ("other.py", "can't open file")):
        command = [sys.executable, "-u", name]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
        assert (done.returncode, message in done.stderr) == (2, True), done.stderr
    alone = subprocess.run([sys.executable], input="1 + 1", capture_output=True, text=True, env=environment, check=True)
    assert alone.stderr == "", "an interpreter without arguments starts as usual"


def test_the_module_reports_mistakes_like_the_launcher(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main([str(tiny), "stages.align.btch=3"]) == 2
    assert "stages.align.btch: Stage has no option 'btch'. Did you mean 'batch'?" in capsys.readouterr().err
    assert run.main([]) == 2


@pytest.mark.parametrize("module", ["composer", "streaming"])
def test_a_missing_package_is_named_with_its_extra(tiny: Path, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "find_spec", lambda name: None if name == module else object())
    with pytest.raises(MissingDependencyError, match=rf"training needs {module}: pip install 'ssmvl\[train\]'"):
        ssmvl.train(tiny)


def test_loading_a_directory_without_a_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no saved model"):
        ssmvl.load(tmp_path)


def test_fewer_samples_than_a_batch_are_rejected(tiny: Path) -> None:
    with pytest.raises(DataError, match="the data hold 7 samples, fewer than one batch of 8"):
        ssmvl.train(tiny, "stages.align.data.train_size=7")


def test_bad_recipes_touch_no_run_folder(tiny: Path) -> None:
    with pytest.raises(RecipeError, match="no option 'lrr'"):
        ssmvl.train(tiny, "stages.align.optimizer.lrr=3")
    assert not Path("runs").exists()


def test_threads_that_wait_sleep_soon_unless_the_environment_says_otherwise() -> None:
    show = "import os, sys, ssmvl.training; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    for given, expected in (({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")):
        kept = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
        output = subprocess.check_output([sys.executable, "-c", show], text=True, env=kept | given)
        assert output.split() == [expected, "False"]  # torch would read it before it is set
