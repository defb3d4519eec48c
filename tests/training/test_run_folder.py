from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ssmvl.errors import RunError
from ssmvl.recipes.merge import load_recipe
from ssmvl.training.run_folder import RunFolder

STAGES = ["align", "finetune"]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[RunFolder]:
    claimed = RunFolder(tmp_path / "runs" / "mine", STAGES)
    claimed.claim(load_recipe("quickstart"))
    yield claimed
    claimed.release()


def test_only_the_last_stage_saves_its_model_at_the_top(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, STAGES)
    assert folder.model("align") == tmp_path / "align" / "model"
    assert folder.model("finetune") == tmp_path / "model"
    assert folder.checkpoints("align") == tmp_path / "align" / "checkpoints"


def test_a_run_folder_that_is_only_checked_stays_free(tmp_path: Path) -> None:
    free = RunFolder(tmp_path / "runs" / "mine", STAGES)
    free.require_no_other(load_recipe("quickstart"))
    assert not free.root.exists()
    free.claim(load_recipe("quickstart"))
    free.release()
    with pytest.raises(RunError, match="seed: was 0, is now 1"):
        free.require_no_other(load_recipe("quickstart", "seed=1"))


def test_a_claimed_run_folder_holds_only_the_resolved_recipe(folder: RunFolder) -> None:
    assert load_recipe(folder.root / "recipe.yaml").data == load_recipe("quickstart").data
    assert {path.name for path in folder.root.iterdir()} == {"recipe.yaml", "align", "finetune", "tensorboard", ".lock"}
    assert all(folder.checkpoints(stage).is_dir() for stage in STAGES)


def test_the_same_recipe_can_claim_its_folder_again(folder: RunFolder) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.root.rglob("[!.]*")}
    folder.claim(load_recipe("quickstart"))
    assert {path: path.stat().st_mtime_ns for path in folder.root.rglob("[!.]*")} == before


@pytest.mark.parametrize(
    "override",
    ["stages.finetune.duration=7ba", "stages.align.optimizer.lr=1e-3", "evaluation.batch=7", "stages.align.batch=8"],
)
def test_duration_learning_rate_and_batches_may_change(folder: RunFolder, override: str) -> None:
    before = (folder.root / "recipe.yaml").read_text()
    folder.claim(load_recipe("quickstart", override))
    assert (folder.root / "recipe.yaml").read_text() == before, "the identity stays that of the first launch"


@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ("model.language.width=64", "model.language.width: was 128, is now 64"),
        ("model.connector.scan_order=csm", "model.connector.scan_order: was 'bsm', is now 'csm'"),
        ("model.language.d_state=16", "model.language.d_state: was None, is now 16"),
        ("stages.align.data.train_size=99", "stages.align.data.train_size: was '8_000', is now 99"),
        (
            "stages.finetune.train=[connector]",
            "stages.finetune.train: was ['connector', 'language'], is now ['connector']",
        ),
        ("seed=1", "seed: was 0, is now 1"),
        ("stages.third={data: digit_scenes, train: [language]}", "stages.third"),
    ],
)
def test_another_run_is_rejected_with_the_difference_and_the_fix(
    folder: RunFolder, override: str, difference: str
) -> None:
    before = (folder.root / "recipe.yaml").read_bytes()
    with pytest.raises(RunError) as caught:
        folder.claim(load_recipe("quickstart", override))
    assert difference in str(caught.value)
    assert "run=NAME" in str(caught.value)
    assert (folder.root / "recipe.yaml").read_bytes() == before


def test_every_difference_is_listed(folder: RunFolder) -> None:
    with pytest.raises(RunError) as caught:
        folder.claim(load_recipe("quickstart", "seed=1", "model.language.width=64"))
    assert len(str(caught.value).splitlines()) == 3


def test_encoders_in_another_order_are_another_model(tmp_path: Path) -> None:
    """Without `fusion.order`, channels are in the recipe's order of encoders."""
    pair = ["fine: {name: digit_vit, stem: fine}", "coarse: {name: digit_vit, stem: coarse}"]
    both = [
        load_recipe(
            "quickstart", "model.fusion.order=null", "model.encoders=null", f"model.encoders={{{', '.join(p)}}}"
        )
        for p in (pair, pair[::-1])
    ]
    folder = RunFolder(tmp_path, STAGES)
    folder.claim(both[0])
    with pytest.raises(RunError, match=r"model\.encoders"):
        folder.claim(both[1])


def test_stages_in_another_order_are_another_run(folder: RunFolder) -> None:
    with pytest.raises(RunError, match=r"stages"):
        folder.claim(load_recipe("quickstart", "stages.order=[finetune, align]"))


@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_run_folder_that_cannot_be_written_is_a_run_error(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunError, match=r"file.* cannot be written"):
        RunFolder(tmp_path / "file" / below, STAGES).claim(load_recipe("quickstart"))


def test_a_small_file_is_replaced_atomically(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, STAGES)
    folder.write("results.json", b"a long first text")
    folder.write("results.json", b"short")
    assert (tmp_path / "results.json").read_text() == "short"
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_a_file_that_cannot_be_replaced_leaves_no_partial_one(tmp_path: Path) -> None:
    (tmp_path / "results.json").mkdir()
    with pytest.raises(RunError, match=r"results\.json cannot be written"):
        RunFolder(tmp_path, STAGES).write("results.json", b"text")
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
