"""Run folders of earlier versions still load, answer, export and resume at the exact step.

`scripts/make_earlier_runs.py` made each archive in `earlier_runs/` with the code of its version. An archive holds a
finished run and one killed mid-stage, on one rank and on two, with the answers and losses of that version's code.
"""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from killed_script import ranks, record

import ssmvl
from ssmvl.checkpoints import read_tensors
from ssmvl.cli import main
from ssmvl.training import run

ARCHIVES = sorted(Path(__file__).with_name("earlier_runs").glob("*.tar.xz"))
pytestmark = pytest.mark.filterwarnings("default")  # Composer, streaming and torch.distributed emit warnings
on_any_ranks = pytest.mark.parametrize("number", [1, 2])


@pytest.fixture(scope="module", params=ARCHIVES, ids=lambda path: path.name)
def archive(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("earlier")
    with tarfile.open(request.param) as tar:
        tar.extractall(folder, filter="data")
    return folder


@pytest.fixture
def expected(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Results of the earlier version; the working directory holds a copy of its run folders."""
    shutil.copytree(archive, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return json.loads(Path("expected.json").read_text())


def assert_answers(folder: str, wanted: list[list[str]]) -> None:
    images, questions, answers = zip(*wanted, strict=True)
    assert len(set(answers)) > 2
    assert ssmvl.load(folder).generate(list(questions), list(images), max_new_tokens=8) == list(answers)


@on_any_ranks
def test_a_finished_run_gives_the_same_answers(expected: dict[str, Any], number: int, capsys: Any) -> None:
    folder = f"runs/finished{number}"
    wanted = expected["answers"][f"finished{number}"]
    assert_answers(folder, wanted)
    image, question, answer = wanted[0]
    assert main(["generate", folder, "--image", image, "--prompt", question]) == 0
    assert capsys.readouterr().out == f"{answer}\n"
    before = Path(folder, "model", "model.safetensors").stat()
    assert run.main([f"{folder}/recipe.yaml"]) == 0
    assert "stage finetune: already finished" in capsys.readouterr().out
    after = Path(folder, "model", "model.safetensors").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@on_any_ranks
def test_a_model_loads_its_weights(expected: dict[str, Any], number: int) -> None:
    folder = f"runs/finished{number}/model"
    model = ssmvl.build_model(folder, weights=folder)
    tensors, _ = read_tensors(f"{folder}/model.safetensors")
    state = model.state_dict()
    assert tensors.keys() == state.keys() - {"language.head.weight"}  # tied
    assert all(torch.equal(tensor, state[name]) for name, tensor in tensors.items())


@on_any_ranks
def test_a_checkpoint_is_exported(expected: dict[str, Any], number: int) -> None:
    assert main(["export", f"runs/killed{number}/finetune/checkpoints", "--out", "exported"]) == 0
    assert_answers("exported", expected["answers"][f"killed{number}"])


@on_any_ranks
def test_a_killed_run_resumes_at_the_exact_step(expected: dict[str, Any], number: int) -> None:
    name, folder = f"killed{number}", Path("output")
    folder.mkdir()

    def work() -> int:
        record(folder, {})
        return run.main([f"runs/{name}/recipe.yaml"])

    assert ranks(number, work, folder) == 0, (folder / "rank0.txt").read_text()
    text = (folder / "rank0.txt").read_text()
    assert "stage align: already finished" in text
    assert "stage finetune: resumed at step 80" in text
    parts = [
        [json.loads(line) for line in path.read_text().splitlines()] for path in sorted(folder.glob("rank*.jsonl"))
    ]
    steps = [[rows[0][1], [row[2] for row in rows], float.fromhex(rows[0][3])] for rows in zip(*parts, strict=True)]
    wanted = expected["resumed"][name]
    assert [step[:2] for step in steps] == [step[:2] for step in wanted]
    # Equal on the CPU that made them. Another CPU's rounding changes them by 2e-7, a lost optimizer state by 3e-2.
    assert [step[2] for step in steps] == pytest.approx([step[2] for step in wanted], rel=1e-5)
    resumed, _ = read_tensors(f"runs/{name}/model/model.safetensors")
    finished, _ = read_tensors(f"runs/finished{number}/model/model.safetensors")
    assert resumed.keys() == finished.keys()
    for tensor_name, tensor in resumed.items():
        torch.testing.assert_close(tensor, finished[tensor_name], atol=1e-4, rtol=1e-4, msg=tensor_name)
