"""The stages of a run, one after another: found, trained, left as a model; then the test questions."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from composer import Trainer
from composer.utils import dist, get_device
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from ssmvl.checkpoints.layouts import NATIVE_LAYOUT
from ssmvl.data.opening import open_data, require_batch
from ssmvl.data.shared_memory import clean_stale_segments
from ssmvl.data.streams import read_records
from ssmvl.data.workers import cores
from ssmvl.errors import Problem, RecipeError, RunError
from ssmvl.evaluation.runner import Evaluation, ask, one_question_each, require_answerable
from ssmvl.files import ABOUT_FILE
from ssmvl.generation.assistant import load_saved
from ssmvl.model.blueprint import Blueprint
from ssmvl.model.build import opened_weights
from ssmvl.model.loading import StartingWeights
from ssmvl.model.saved import save_folder
from ssmvl.processing.processor import Processor
from ssmvl.training.checked import Checked
from ssmvl.training.checkpoints.pruning import remove_old
from ssmvl.training.composer_classes import unknown_types
from ssmvl.training.distributed import every_rank, first_rank, patient
from ssmvl.training.report import report
from ssmvl.training.run_folder import RunFolder
from ssmvl.training.trainer import read_questions, stage_store, stage_trainer

WAIT = 600.0  # seconds that ranks wait for each other while they train, as torch has it for GPUs


class Session:
    """One process of a run, on any number of ranks.

    Args:
        checked: the recipe.
    """

    def __init__(self, checked: Checked) -> None:
        self.checked, self.recipe, self.plan = checked, checked.recipe, checked.plan
        plan = self.plan
        self._opened: dict[str, StartingWeights] = {}  # by stage, the files it starts from; on the first rank
        self._finished: list[str] = []  # stages that an earlier launch trained
        self.folder = RunFolder(Path("runs") / plan.run, list(plan.stages), plan.checkpoints)
        self.rank, self.world = dist.get_global_rank(), dist.get_world_size()

    def run(self) -> Path:
        """Every stage that is asked for and not finished, then the evaluation; returns the run folder."""
        self.checked.require_shared_by(self.world)
        self._require_parts_for_nodes()
        if "OMP_NUM_THREADS" not in os.environ:  # the launcher sets none, and ranks would fight over the cores
            torch.set_num_threads(max(1, cores() // dist.get_local_world_size()))
        if self.world > 1:
            # Composer's handler is Python code, which does not run while this waits for ranks that will not come.
            handler = signal.signal(signal.SIGTERM, signal.SIG_DFL)
            try:
                dist.initialize_dist(get_device(None), timeout=WAIT)
            finally:
                signal.signal(signal.SIGTERM, handler)
        if dist.get_local_rank() == 0:
            clean_stale_segments()
        self._finished = first_rank(self.prepare)
        every_rank(self.folder.require_seen)
        for name in self._asked():
            if name in self._finished:
                self._say(self.folder.finished(name))
            else:
                self._train(name)
                gc.collect()  # of a trainer all parts know each other: its model would stay beside the next
        if self._evaluation is not None:
            self._evaluate(self._evaluation, self.folder.root / "model")
        return self.folder.root

    def _asked(self) -> list[str]:
        """The stages of this launch."""
        return self.folder.stages if self.plan.stage is None else [self.plan.stage]

    @property
    def _evaluation(self) -> Evaluation | None:
        """What follows the last stage, where this launch comes to it."""
        last = self.folder.stages[-1:]
        return self.plan.evaluation if last and self._asked()[-1:] == last else None

    def _last(self) -> Blueprint:
        """The recipe that the last stage's model is saved with, or was by an earlier launch."""
        name = self.folder.stages[-1]
        return Blueprint.of(self.folder.model(name)) if name in self._finished else self.checked.after(name)

    def _start(self, name: str) -> str | Path:
        """What `build_model` starts a stage from."""
        before = self.folder.stages[: self.folder.stages.index(name)]
        return self.plan.stages[name].init_from or (self.folder.model(before[-1]) if before else "recipe")

    def prepare(self) -> list[str]:
        """The stages that are finished; finds what the others will read, and makes the run folder this run's."""
        self.folder.require_no_other(self.recipe)
        finished = [name for name in self.plan.stages if (self.folder.model(name) / ABOUT_FILE).is_file()]
        self._finished = finished
        self._find_inputs([name for name in self._asked() if name not in finished])
        self.folder.claim(self.recipe)  # last: a run that finds no data leaves its name free
        for name in self._asked():
            counts = "it is finished and stays as it is" if name in finished else "this counts from now on"
            for text in self.folder.changes(self.recipe, name):
                self._say(f"unlike {self.folder.root / 'recipe.yaml'}, {text}; {counts}")
        return finished

    def _find_inputs(self, names: Sequence[str]) -> None:
        """Find or fetch what these stages read, before one is trained: a wrong path costs seconds."""
        processor = self.checked.processor
        for name in names:
            stage = self.plan.stages[name]
            require_batch(open_data(stage.data, "train"), stage.batch, f"stages.{name}.batch")
            if stage.evaluation is not None:
                where = f"stages.{name}.evaluation"
                prompt = self.checked.after(name).parts.prompt()
                asking = replace(stage.processor(processor), prompt=prompt)
                self._check_questions(where, stage.evaluation, asking, stage.callbacks)
        if self._evaluation is not None:
            prompt = self._last().parts.prompt()
            self._check_questions("evaluation", self._evaluation, replace(processor, prompt=prompt))
        for name in names:
            start = self._start(name)
            if isinstance(start, Path):
                if name == self.plan.stage and not (start / ABOUT_FILE).is_file():
                    advice = f"train that stage first, or give stages.{name}.init_from"
                    raise RunError(f"stage {name} starts from what the one before left, {start} is not there; {advice}")
            elif start != "none":
                self._opened[name] = opened_weights(self.checked, start)

    def _check_questions(
        self, where: str, options: Evaluation, processor: Processor, callbacks: Mapping[str, Any] = MappingProxyType({})
    ) -> None:
        records = read_records(open_data(options.data, "test"))
        types = sorted({str(record["type"]) for record in records})
        if unknown := unknown_types(callbacks, types):
            what = f"early stopping monitors {unknown[0]!r}, but the types of question are {', '.join(types)}"
            raise RecipeError([Problem(where, what)], self.recipe.source)
        if note := require_answerable(records, processor, options.max_new_tokens):
            self._say(f"{where}: {note}")

    def _train(self, name: str) -> None:
        found, passed = first_rank(lambda: stage_store(self.folder, name).newest())
        for text in passed:
            self._say(f"stage {name}: passes over a checkpoint: {text}")
        trainer = self.trainer(name, found)
        step = trainer.state.timestamp.batch.value
        how = f"resumed at step {step}" if step else "started"
        self._say(f"stage {name}: {how}, trains {', '.join(self.plan.stages[name].train)}")
        if trainer.state.timestamp < trainer.state.max_duration:
            trainer.fit()
        dist.barrier(patient())  # one may still be sending its last checkpoint
        vlm = trainer.state.model.module if hasattr(trainer.state.model, "module") else trainer.state.model
        tensors: dict[str, Any] = get_model_state_dict(
            vlm.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
        )
        if self.rank == 0:
            tensors = {key: tensors[key] for key in NATIVE_LAYOUT.sources(vlm.model)}  # FSDP2 gives tied ones twice
            after = self.checked.after(name)
            processor = replace(trainer.state.train_dataloader.dataset.processor, prompt=after.parts.prompt())
            save_folder(self.folder.model(name), tensors, after, processor)
            remove_old(stage_store(self.folder, name), self.plan.stages[name].keep)  # all have been sent by now
        self._say(f"stage {name}: finished, {self.folder.model(name)} holds its model")
        trainer.close()
        dist.barrier(patient())

    def trainer(self, name: str, checkpoint: str | None = None) -> Trainer:
        """A stage under Composer; see `stage_trainer`."""
        start = self._opened.pop(name) if name in self._opened else self._start(name)
        return stage_trainer(self.checked, self.folder, name, start, checkpoint)

    def _evaluate(self, options: Evaluation, model: Path) -> None:
        records = one_question_each(read_questions(options))
        self._say(f"asking {len(records)} test questions")
        assistant = load_saved(self._last(), model)
        mine = ask(assistant, records, range(self.rank, len(records), self.world), options)
        parts = dist.all_gather_object(mine, patient())
        if self.rank == 0:
            answered = [parts[place % self.world][place // self.world] for place in range(len(records))]
            report(self.folder, records, answered)

    def _require_parts_for_nodes(self) -> None:
        problems = []
        for name, stage in self.plan.stages.items():
            parts, nodes = stage.loader.num_canonical_nodes or 1, self.world // dist.get_local_world_size()
            if parts % nodes and nodes % parts:
                text = f"{parts} parts cannot be shared by {nodes} nodes; choose a multiple of {nodes}"
                problems.append(Problem(f"stages.{name}.loader.num_canonical_nodes", text))
        if problems:
            raise RecipeError(problems, self.recipe.source)

    def _say(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)
