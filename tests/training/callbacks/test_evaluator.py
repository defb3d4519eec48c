"""Evaluation during a stage: same results on one rank and on two sharded ranks, and no effect on training."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable
from pathlib import Path

import pytest
from PIL import Image
from ranks import two_ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ssmvl
from ssmvl.data.shards import ensure_shards
from ssmvl.errors import DataError, RecipeError
from ssmvl.evaluation.results import Row
from ssmvl.evaluation.runner import Answered
from ssmvl.model import vlm
from ssmvl.training.callbacks import evaluator

pytestmark = pytest.mark.filterwarnings("default")  # Composer, streaming and torch.distributed warn by themselves
ONE_STAGE = (
    "stages.align=null",
    "stages.order=null",
    "stages.finetune.checkpoint=4ba",
    "stages.finetune.optimizer.lr=1e-4",
    "evaluation=null",
)
ASKED = (
    "stages.finetune.evaluation.data={name: digit_scenes, test_size: 15}",
    "stages.finetune.evaluation.interval=2ba",
    "stages.finetune.evaluation.batch=3",
    "stages.finetune.evaluation.max_new_tokens=5",
)


def logged(run: str) -> dict[str, list[float]]:
    events = EventAccumulator(f"runs/{run}/tensorboard/{run}-finetune")
    events.Reload()
    names = [name for name in events.Tags()["scalars"] if name.startswith(("loss/train/total", "evaluation/"))]
    return {name: [event.value for event in events.Scalars(name)] for name in names}


@pytest.mark.long
def test_two_sharded_ranks_give_the_results_of_one(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[list[Answered]] = []
    results = evaluator.results

    def record(answered: Iterable[Answered]) -> dict[str, Row]:
        answers.append(list(answered))
        return results(answers[-1])

    def train(run: str, *options: str) -> None:
        answers.clear()
        ssmvl.train(tiny, f"run={run}", *ONE_STAGE, *options)
        Path(f"{run}.json").write_text(json.dumps(answers))

    monkeypatch.setattr(evaluator, "results", record)
    monkeypatch.setattr(vlm, "CHUNK", 4)  # inputs of unequal lengths take unequal numbers of chunks
    two_ranks(lambda: train("two", *ASKED), tiny.parent)
    train("one", *ASKED)
    train("none")
    assert Path("one.json").read_text() == Path("two.json").read_text()
    evaluations = json.loads(Path("one.json").read_text())
    assert [len(answered) for answered in evaluations] == [15, 15]
    assert len({len(answer[3]) for answer in evaluations[-1]}) > 1
    one, two, none = logged("one"), logged("two"), logged("none")
    assert {"evaluation/loss", "evaluation/accuracy/counting", "evaluation/blind/reading"} <= one.keys() == two.keys()
    assert one["evaluation/loss"][1] < one["evaluation/loss"][0]
    for name, values in one.items():
        assert two[name] == pytest.approx(values, rel=1e-5), name
    assert one["loss/train/total"] == none["loss/train/total"]


def test_invalid_evaluation_options_are_reported_before_training(tiny: Path) -> None:
    data = "{name: mix, streams: {a: {data: {name: digit_scenes}, proportion: 1}}}"
    with pytest.raises(RecipeError, match=r"stages\.finetune\.evaluation\.data\.streams\.a\.proportion"):
        ssmvl.train(tiny, f"stages.finetune.evaluation.data={data}")
    with pytest.raises(RecipeError, match=r"stages\.finetune\.evaluation\.interval.*'soon'"):
        ssmvl.train(tiny, *ASKED, "stages.finetune.evaluation.interval=soon")


def test_the_end_of_an_epoch_does_not_repeat_the_evaluation_of_its_last_step(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    evaluations: list[int] = []
    results = evaluator.results
    monkeypatch.setattr(evaluator, "results", lambda answered: evaluations.append(1) or results(answered))
    ssmvl.train(
        tiny, *ONE_STAGE, *ASKED, "stages.finetune.data.train_size=32", "stages.finetune.evaluation.interval=4ba"
    )
    assert len(evaluations) == 1  # an epoch has four steps
    line = r"^evaluation after step 4: loss \d\.\d{4}, accuracy: .*counting \d+\.\d%"
    assert re.search(line, capfd.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize("where", ["evaluation", "stages.finetune.evaluation"])
def test_an_unusable_record_is_named_before_training(tiny: Path, where: str, capfd: pytest.CaptureFixture[str]) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (9, 9)).save(buffer, "PNG")
    talk = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "the longest of all"}]
    good = {"id": "x16", "conversation": talk, "images": [buffer.getvalue()], "type": ""}
    sets = {"bad": [good, {**good, "id": "x17", "images": [b"damaged"]}], "good": [good]}
    for name, records in sets.items():
        ensure_shards(Path("d", name, "test"), lambda records=records: records, total=len(records))
    bad, fine = (f"{where}={{data: {{name: shards, folder: d/{name}}}, max_new_tokens: 2}}" for name in sets)
    with pytest.raises(DataError, match=r"the evaluation set's sample 'x17' cannot be used: .*cannot be decoded"):
        ssmvl.train(tiny, *ONE_STAGE, bad)
    assert "started" not in capfd.readouterr().out
    ssmvl.train(tiny, *ONE_STAGE, fine, "stages.finetune.duration=1ba")
    note = f"{where}: 1 of 1 answers are longer than max_new_tokens=2; they always count as wrong"
    assert note in capfd.readouterr().out
