"""Session: one rank of a run. It trains the stages in order, saves their models and asks the test questions."""

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
from ssmvl.training.callbacks.interruption import Interruption
from ssmvl.training.checked import Checked
from ssmvl.training.checkpoints.pruning import remove_old
from ssmvl.training.composer_classes import unknown_types
from ssmvl.training.distributed import every_rank, first_rank, patient
from ssmvl.training.report import report
from ssmvl.training.run_folder import RunFolder
from ssmvl.training.trainer import read_questions, stage_store, stage_trainer

WAIT = 600.0  # seconds that ranks wait for each other during training; torch's default on GPUs


class Session:
    """One rank of a run.

    Args:
        checked: the recipe.
    """

    def __init__(self, checked: Checked) -> None:
        self.checked, self.recipe, self.plan = checked, checked.recipe, checked.plan
        plan = self.plan
        self._opened: dict[str, StartingWeights] = {}  # pretrained weights by stage; first rank only
        self._finished: list[str] = []  # stages that an earlier launch finished
        self.folder = RunFolder(Path("runs") / plan.run, list(plan.stages), plan.checkpoints)
        self.rank, self.world = dist.get_global_rank(), dist.get_world_size()

    def run(self) -> Path:
        """Train the requested stages that are not finished, then evaluate. Return the run folder."""
        self.checked.require_shared_by(self.world)
        self._require_parts_for_nodes()
        if "OMP_NUM_THREADS" not in os.environ:  # else every rank would use all cores
            torch.set_num_threads(max(1, cores() // dist.get_local_world_size()))
        if self.world > 1:
            # Composer's handler is Python code, which cannot run while this call waits for missing ranks.
            handler = signal.signal(signal.SIGTERM, signal.SIG_DFL)
            try:
                dist.initialize_dist(get_device(None), timeout=WAIT)
            finally:
                signal.signal(signal.SIGTERM, handler)
        if dist.get_local_rank() == 0:
            clean_stale_segments()
        self._finished = first_rank(self.prepare)
        every_rank(self.folder.require_seen)
        for name in self._requested():
            if name in self._finished:
                self._say(self.folder.finished(name))
            else:
                self._train(name)
                gc.collect()  # the trainer's reference cycles would keep its model in memory during the next stage
        if self._evaluation is not None:
            self._evaluate(self._evaluation, self.folder.root / "model")
        return self.folder.root

    def _requested(self) -> list[str]:
        """The stages of this launch."""
        return self.folder.stages if self.plan.stage is None else [self.plan.stage]

    @property
    def _evaluation(self) -> Evaluation | None:
        """The evaluation, if this launch includes the last stage."""
        last = self.folder.stages[-1:]
        return self.plan.evaluation if last and self._requested()[-1:] == last else None

    def _last(self) -> Blueprint:
        """The blueprint that the last stage's model is saved with, by this launch or an earlier one."""
        name = self.folder.stages[-1]
        return Blueprint.of(self.folder.model(name)) if name in self._finished else self.checked.after(name)

    def _start(self, name: str) -> str | Path:
        """The weights that a stage starts from, in a form that `build_model` accepts."""
        previous = self.folder.stages[: self.folder.stages.index(name)]
        return self.plan.stages[name].init_from or (self.folder.model(previous[-1]) if previous else "recipe")

    def prepare(self) -> list[str]:
        """Claim the run folder and find the inputs of unfinished stages. Return the finished stages."""
        self.folder.require_no_other(self.recipe)
        finished = [name for name in self.folder.stages if self.folder.is_finished(name)]
        extended = [n for n in self._requested() if n in finished and self.folder.is_extended(self.recipe, n)]
        finished = [name for name in finished if name not in extended]
        self._finished = finished
        self._find_inputs([name for name in self._requested() if name not in finished])
        self.folder.claim(self.recipe)  # after the inputs, so that a run without data leaves its name free
        for name in extended:  # after the claim, because a store removes parts of incomplete checkpoints
            self._require_extensible(name)
        for name in (name for name in self._requested() if name not in finished):
            for text in self.folder.changes(self.recipe, name):
                self._say(f"changed since the first launch: {text}")
        return finished

    def _require_extensible(self, name: str) -> None:
        """Check that a finished stage has a checkpoint to resume from, and that no later stage has used its model."""
        why = ""
        if stage_store(self.folder, name).latest()[0] is None:
            why = "none of its checkpoints is left"
        for later in self.folder.stages[self.folder.stages.index(name) + 1 :]:
            if self.folder.is_finished(later) or stage_store(self.folder, later).latest()[0] is not None:
                why = f"stage {later} has started from its model"
        if why:
            raise RunError(f"stage {name} is finished and cannot be extended: {why}; start a new run with run=NAME")

    def _find_inputs(self, names: Sequence[str]) -> None:
        """Open the data and weights of these stages before any training, so that a wrong path costs only seconds."""
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
                    advice = f"train that stage first, or set stages.{name}.init_from"
                    what = f"stage {name} starts from the previous stage's model, but {start} does not exist"
                    raise RunError(f"{what}; {advice}")
            elif start != "none":
                self._opened[name] = opened_weights(self.checked, start)

    def _check_questions(
        self, where: str, options: Evaluation, processor: Processor, callbacks: Mapping[str, Any] = MappingProxyType({})
    ) -> None:
        records = read_records(open_data(options.data, "test"))
        types = sorted({str(record["type"]) for record in records})
        if unknown := unknown_types(callbacks, types):
            what = f"early stopping monitors {unknown[0]!r}, but the question types are {', '.join(types)}"
            raise RecipeError([Problem(where, what)], self.recipe.source)
        if note := require_answerable(records, processor, options.max_new_tokens):
            self._say(f"{where}: {note}")

    def _train(self, name: str) -> None:
        checkpoint, skipped = first_rank(lambda: stage_store(self.folder, name).latest())
        for text in skipped:
            self._say(f"stage {name}: skipping a checkpoint: {text}")
        trainer = self.trainer(name, checkpoint)
        step = trainer.state.timestamp.batch.value
        how = f"resumed at step {step}" if step else "started"
        self._say(f"stage {name}: {how}, training {', '.join(self.plan.stages[name].train)}")
        if trainer.state.timestamp < trainer.state.max_duration:
            self._fit(trainer, name)
        dist.barrier(patient())  # another rank may still be uploading its last checkpoint
        vlm = trainer.state.model.module if hasattr(trainer.state.model, "module") else trainer.state.model
        tensors: dict[str, Any] = get_model_state_dict(
            vlm.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
        )
        if self.rank == 0:
            tensors = {key: tensors[key] for key in NATIVE_LAYOUT.sources(vlm.model)}  # FSDP2 lists tied tensors twice
            after = self.checked.after(name)
            processor = replace(trainer.state.train_dataloader.dataset.processor, prompt=after.parts.prompt())
            save_folder(self.folder.model(name), tensors, after, processor)
            remove_old(stage_store(self.folder, name), self.plan.stages[name].keep)  # all uploads are complete
        self._say(f"stage {name}: finished; its model is saved in {self.folder.model(name)}")
        trainer.close()
        dist.barrier(patient())

    def _fit(self, trainer: Trainer, name: str) -> None:
        """Train; after a signal, print how to resume."""
        try:
            trainer.fit()
        except (KeyboardInterrupt, SystemExit):
            trainer.close()  # waits until the checkpoint is uploaded
            step = trainer.state.timestamp.batch.value
            self._say(f"stage {name}: interrupted after step {step}. Run the same command again to resume.")
            raise
        except Exception as error:
            (interruption,) = (one for one in trainer.state.callbacks if isinstance(one, Interruption))
            if interruption.received == signal.SIGTERM:  # the launcher ends this rank because another one failed
                raise SystemExit(128 + signal.SIGTERM) from error
            raise

    def trainer(self, name: str, checkpoint: str | None = None) -> Trainer:
        """Composer's Trainer for a stage; see `stage_trainer`."""
        start = self._opened.pop(name) if name in self._opened else self._start(name)
        return stage_trainer(self.checked, self.folder, name, start, checkpoint)

    def _evaluate(self, options: Evaluation, model: Path) -> None:
        records = one_question_each(read_questions(options))
        self._say(f"asking {len(records)} test questions")
        assistant = load_saved(self._last(), model)
        share = ask(assistant, records, range(self.rank, len(records), self.world), options)
        shares = dist.all_gather_object(share, patient())
        if self.rank == 0:
            answered = [shares[index % self.world][index // self.world] for index in range(len(records))]
            report(self.folder, records, answered)

    def _require_parts_for_nodes(self) -> None:
        problems = []
        for name, stage in self.plan.stages.items():
            parts, nodes = stage.loader.num_canonical_nodes or 1, self.world // dist.get_local_world_size()
            if parts % nodes and nodes % parts:
                text = f"{parts} parts cannot be split evenly across {nodes} nodes; choose a multiple of {nodes}"
                problems.append(Problem(f"stages.{name}.loader.num_canonical_nodes", text))
        if problems:
            raise RecipeError(problems, self.recipe.source)

    def _say(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)
