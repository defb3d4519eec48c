"""A run binds its recipe once, builds one model on `meta`, and looks each component up once."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ssmvl
from ssmvl.checkpoints import read_tensors
from ssmvl.errors import DataError, RecipeError, RunError
from ssmvl.interfaces import Grid
from ssmvl.layers import paths
from ssmvl.model import blueprint
from ssmvl.recipes.binding import components_in
from ssmvl.registry import Registry
from ssmvl.training import checked, session
from ssmvl.training.checked import check
from ssmvl.training.planning.plan import stage_plans

pytestmark = pytest.mark.filterwarnings("default")  # Composer and streaming emit warnings
ONE_STAGE = ("stages.align=null", "evaluation=null")


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count binds, builds, lookups and other calls from now on, by name."""
    counts: Counter[str] = Counter()

    def count(module: Any, name: str, key: Any) -> None:
        call = getattr(module, name)

        def counting(*arguments: Any, **options: Any) -> Any:
            counts[key(*arguments)] += 1
            return call(*arguments, **options)

        monkeypatch.setattr(module, name, counting)

    count(checked, "bind", lambda *_: "bound")
    count(blueprint, "bind", lambda *_: "bound")
    count(blueprint, "assemble", lambda *_: f"built on {torch.empty(0).device.type}")
    count(blueprint, "load_tokenizer", lambda *_: "tokenizer read")
    count(paths, "path_table", lambda *_: "scan order evaluated")
    count(Registry, "find", lambda _, kind, name: f"{kind} {name}")
    return counts


def test_a_run_of_two_stages_and_an_evaluation(tiny: Path, counted: Counter[str]) -> None:
    ssmvl.train(tiny)
    counts = dict(counted)
    assert counts.pop("bound") == 1
    assert counts.pop("built on meta") == 1
    assert counts.pop("built on cpu") == 3  # for each stage and for the evaluation
    assert counts.pop("scan order evaluated") == 4  # once for each model
    assert counts.pop("tokenizer read") == 2  # the recipe's, and the saved one
    layouts = {name for name in counts if name.startswith("checkpoint ")}
    assert {counts.pop(name) for name in layouts} == {2}  # for the files that finetune and the evaluation start from
    plan = check(tiny).plan
    entries = [bound.entry for bound in components_in(plan) if bound.entry]
    assert Counter(counts) == Counter(f"{entry.kind} {entry.name}" for entry in entries)


def test_a_checked_recipe_is_accepted_in_place_of_a_recipe(tiny: Path, counted: Counter[str]) -> None:
    result = check(tiny, *ONE_STAGE)
    before = {name: parameter.requires_grad for name, parameter in result.model.named_parameters()}
    assert check(result) is result
    shapes = ssmvl.build_model(result, device="meta")
    assert shapes is not result.model
    model = ssmvl.build_model(result, weights="recipe")
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == {
        name: tensor.shape for name, tensor in result.model.state_dict().items()
    }
    for plan in stage_plans(result, 1).values():
        plan.memory()
    assert checked.stage_processor(result, None)[1] == "tiny, stage finetune,"
    assert ssmvl.train(result) == Path("runs/tiny")
    assert counted["bound"] == 1
    assert (counted["built on meta"], counted["built on cpu"]) == (2, 2)
    assert {name: parameter.requires_grad for name, parameter in result.model.named_parameters()} == before
    with pytest.raises(RecipeError, match="unknown stage 'nope'"):
        checked.stage_processor(result, "nope")


def test_no_block_sorts_a_scan_order_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ssmvl.build_model("quickstart")
    monkeypatch.setattr(torch, "argsort", None)
    features = torch.randn(1, model.grid.length, model.fusion.width)
    tokens: Tensor = model.connector(features, model.grid)
    assert tokens.shape[1] == model.tokens_per_image
    with pytest.raises(TypeError):  # the order of an unknown grid must be sorted
        model.connector(torch.randn(1, 4, model.fusion.width), Grid(1, 2, 2))


@pytest.mark.parametrize(
    ("callbacks", "last"),
    [
        # No loss improves by 100, so the first evaluation stays the best and training ends once patience is exceeded.
        (
            "{EarlyStopper: {monitor: evaluation/loss, dataloader_label: evaluation, patience: 1ba, min_delta: 100}}",
            3,
        ),
        ("{ThresholdStopper: {monitor: evaluation/loss, dataloader_label: evaluation, threshold: 1000}}", 1),
    ],
)
def test_early_stopping_sees_the_evaluation(
    tiny: Path, callbacks: str, last: int, capfd: pytest.CaptureFixture[str]
) -> None:
    evaluation = "stages.finetune.evaluation={data: {name: digit_scenes, test_size: 4}, interval: 1ba}"
    ssmvl.train(tiny, *ONE_STAGE, evaluation, f"stages.finetune.callbacks={callbacks}", "stages.finetune.duration=6ba")
    captured = capfd.readouterr()
    assert f"evaluation after step {last}:" in captured.out + captured.err
    assert f"evaluation after step {last + 1}:" not in captured.out + captured.err
    assert [path.name for path in Path("runs/tiny/finetune/checkpoints").glob(f"*ba{last}-*")]
    assert Path("runs/tiny/model/model.safetensors").is_file()
    shutil.rmtree("runs/tiny/model")  # as if killed before it was saved
    ssmvl.train(tiny, *ONE_STAGE, evaluation, f"stages.finetune.callbacks={callbacks}", "stages.finetune.duration=6ba")
    captured = capfd.readouterr()
    assert f"resumed at step {last}" in captured.out
    assert "evaluation after step" not in captured.out + captured.err
    assert Path("runs/tiny/model/model.safetensors").is_file()


def test_early_stopping_resumes_with_its_state(tiny: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = "monitor: evaluation/loss, dataloader_label: evaluation, patience: 1ba, min_delta: 100"
    evaluation = "stages.finetune.evaluation={data: {name: digit_scenes, test_size: 4}, interval: 1ba}"
    overrides = (*ONE_STAGE, evaluation, f"stages.finetune.callbacks={{EarlyStopper: {{{options}}}}}")
    ssmvl.train(tiny, *overrides, "stages.finetune.duration=2ba")
    shutil.rmtree("runs/tiny/model")
    ssmvl.train(tiny, *overrides, "stages.finetune.duration=6ba")  # the best loss is that of step 1, not of step 3
    captured = capfd.readouterr()
    assert "evaluation after step 3:" in captured.out + captured.err
    assert "evaluation after step 4:" not in captured.out + captured.err


def test_a_finished_run_is_evaluated_with_the_prompt_it_was_trained_with(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = (*ONE_STAGE[:1], "stages.finetune.prompt=vicuna")  # the model's is mamba
    ssmvl.train(tiny, *overrides)
    assistants: list[Any] = []
    ask = session.ask
    monkeypatch.setattr(session, "ask", lambda assistant, *rest: assistants.append(assistant) or ask(assistant, *rest))
    ssmvl.train(tiny, *overrides)
    assert [type(assistant.processor.prompt).__name__ for assistant in assistants] == ["VicunaPrompt"]
    with pytest.raises(RunError, match=r"stages\.finetune\.prompt: was \{'name': 'vicuna'\}, is now None"):
        ssmvl.train(tiny, *ONE_STAGE[:1])


def test_a_metric_that_the_evaluation_does_not_have_is_found_before_the_first_stage(tiny: Path) -> None:
    evaluation = "stages.finetune.evaluation={data: {name: digit_scenes, test_size: 4}, interval: 1ba}"
    for monitor in ("accuracy/cats", "blind/readin"):
        stopper = f"{{EarlyStopper: {{monitor: evaluation/{monitor}, dataloader_label: evaluation}}}}"
        with pytest.raises(RecipeError, match=f"monitors 'evaluation/{monitor}', but the question types are "):
            ssmvl.train(tiny, evaluation, f"stages.finetune.callbacks={stopper}")
    assert not Path("runs/tiny/align/model").exists()


def test_early_stopping_sees_the_accuracy_of_all_questions(tiny: Path, capfd: pytest.CaptureFixture[str]) -> None:
    evaluation = "stages.finetune.evaluation={data: {name: digit_scenes, test_size: 4}, interval: 1ba}"
    options = "monitor: evaluation/accuracy/all, dataloader_label: evaluation, threshold: -1"
    ssmvl.train(tiny, *ONE_STAGE, evaluation, f"stages.finetune.callbacks={{ThresholdStopper: {{{options}}}}}")
    captured = capfd.readouterr()
    assert "evaluation after step 1:" in captured.out + captured.err
    assert "evaluation after step 2:" not in captured.out + captured.err


def test_too_few_samples_for_a_batch_are_found_before_the_first_stage(tiny: Path) -> None:
    with pytest.raises(
        DataError, match=r"stages\.finetune\.batch: the data hold 64 samples, fewer than one batch of 128"
    ):
        ssmvl.train(tiny, "stages.finetune.batch=128")
    assert not Path("runs/tiny/align/model").exists()


def test_a_stage_that_trains_its_encoders_resumes(tiny: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Layers of a ViT after its features get no gradient, and once had no state in a checkpoint."""
    overrides = (*ONE_STAGE, "stages.finetune.train=[encoders, connector, language]")
    ssmvl.train(tiny, *overrides)
    expected, _ = read_tensors("runs/tiny/model/model.safetensors")
    shutil.rmtree("runs/tiny/model")
    Path("runs/tiny/finetune/checkpoints/ep0-ba4-rank0.pt").unlink()
    capfd.readouterr()
    ssmvl.train(tiny, *overrides)
    assert "resumed at step 3" in capfd.readouterr().out
    resumed, _ = read_tensors("runs/tiny/model/model.safetensors")
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in expected.items())
