"""Cases of the suite `training`: overhead of Composer, callbacks and data over a bare loop; time to the first step."""

from __future__ import annotations

import io
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import chdir, redirect_stdout
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from ssmvl.benchmarks.model_cases import Row, compare
from ssmvl.errors import BackendError, RunError
from ssmvl.recipes.merge import Recipe, load_recipe

START = 15.0  # limit in seconds from a run's command to its first step
SKIPPED = 2  # first steps after a start, which are not timed
ONE_STAGE = ("stages.align=null", "stages.order=null", "evaluation=null", "stages.finetune.checkpoint=1000000ba")


class TrainingSize(NamedTuple):
    """The recipe to train, its number of samples, and the steps per measurement."""

    recipe: str = "quickstart"
    samples: int = 6400
    steps: int = 25


def training_cases(size: TrainingSize) -> Iterator[Row]:
    """Yield every row; runs on one rank, in a temporary directory."""
    if torch.cuda.is_available():
        raise BackendError("the suite training runs on a CPU, but CUDA is available; set CUDA_VISIBLE_DEVICES= (empty)")
    with TemporaryDirectory(prefix="ssmvl-bench-") as name, chdir(name):
        data = f"stages.finetune.data.train_size={size.samples}"
        recipe = load_recipe(size.recipe, *ONE_STAGE, data)
        with_worker = load_recipe(size.recipe, *ONE_STAGE, data, "stages.finetune.loader.workers=1", "run=worker")
        threads = torch.get_num_threads()
        rows = [_overhead("run / bare loop", recipe, size)]
        if threads > 1:
            torch.set_num_threads(threads - 1)  # for the bare loop too
            rows.append(_overhead("run, a core for data", with_worker, size))
            torch.set_num_threads(threads)
        rows += _counts(recipe)
        rows.append(_start(recipe))
    yield from rows  # back in the caller's directory


def _overhead(case: str, recipe: Recipe, size: TrainingSize) -> Row:
    """Steps per second of a run, relative to a loop over prepared batches: forward, backward, clipping, AdamW."""
    from composer import Callback, State

    from ssmvl.training.checked import check
    from ssmvl.training.composer_model import ComposerVLM
    from ssmvl.training.optimizer import make_optimizer
    from ssmvl.training.session import Session

    class Clock(Callback):
        """Records the time at which each step ended."""

        def __init__(self) -> None:
            self.ends: list[float] = []

        def batch_end(self, state: State, logger: Any) -> None:
            self.ends.append(time.perf_counter())

    checked = check(recipe)
    plan = checked.plan
    trainer = Session(checked).trainer("finetune")
    trainer.state.callbacks.append(clock := Clock())
    stage = plan.stages["finetune"]
    batches = list(islice(iter(trainer.state.train_dataloader), size.steps))
    torch.manual_seed(plan.seed)
    vlm = ComposerVLM(_model(recipe), stage.train, stage.packed).train()
    optimizer = make_optimizer(vlm, stage.optimizer)

    def run() -> float:
        clock.ends.clear()
        trainer.fit(duration=f"{size.steps}ba")
        return _rate(clock.ends)

    def bare() -> float:
        ends = []
        for batch in batches:
            vlm.loss(vlm(batch), batch).backward()
            torch.nn.utils.clip_grad_norm_(vlm.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            ends.append(time.perf_counter())
        return _rate(ends)

    with redirect_stdout(io.StringIO()):  # hide the progress bar
        row = compare(case, "steps/s", bare, run)
    trainer.close()
    return row


def _counts(recipe: Recipe) -> Iterator[Row]:
    """Count how often a stage binds its recipe and builds its model before its first step."""
    from ssmvl.model import blueprint
    from ssmvl.recipes.binding import bind
    from ssmvl.training.checked import check
    from ssmvl.training.session import Session

    built: list[str] = []

    def assemble(*arguments: Any) -> Any:
        built.append("models built on meta" if torch.empty(0).is_meta else "models built with values")
        return original(*arguments)

    original = blueprint.assemble
    with (
        patch.object(blueprint, "assemble", assemble),
        patch("ssmvl.training.checked.bind", wraps=bind) as bound,
        redirect_stdout(io.StringIO()),
    ):
        Session(check(recipe, weights=False)).trainer("finetune").close()
    yield Row("recipes bound", bound.call_count, "times")
    for case in ("models built on meta", "models built with values"):
        yield Row(case, built.count(case), "times")


def _start(recipe: Recipe) -> Row:
    """Seconds from the command to the end of the first step; the data already exist."""
    Path("recipe.yaml").write_text(recipe.to_yaml())
    command = [sys.executable, "recipe.yaml", "run=start", "stages.finetune.duration=1ba", "stages.finetune.warmup=0ba"]
    begin = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        output = [(time.perf_counter(), line) for line in process.stdout]
    for moment, line in output:
        if line.startswith("finetune 1/1"):
            return Row("start", moment - begin, "s", START, (moment - begin) / START)
    raise RunError(
        f"{' '.join(command)} ended with exit code {process.returncode} before its first step: {output[-1:]}"
    )


def _model(recipe: Recipe) -> Any:
    from ssmvl.model.build import build_model

    return build_model(recipe, weights="recipe")


def _rate(ends: list[float]) -> float:
    return (len(ends) - 1 - SKIPPED) / (ends[-1] - ends[SKIPPED])
