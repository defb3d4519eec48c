"""The stages of a run under Composer: build, shard, resume, train, leave a model; then ask it the test questions."""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from composer import DataSpec, Time, Trainer
from composer.algorithms import GradientClipping
from composer.callbacks import LRMonitor, MemoryMonitor, RuntimeEstimator, SpeedMonitor
from composer.loggers import TensorboardLogger
from composer.optim import ComposerScheduler, CosineAnnealingScheduler, CosineAnnealingWithWarmupScheduler
from composer.profiler import Profiler, cyclic_schedule
from composer.utils import dist, get_device, reproducibility
from composer.utils.parallelism import FSDP2Config
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from ssmvl import evaluation
from ssmvl.anatomy import StepFlops
from ssmvl.assistant import load
from ssmvl.batch import num_samples, num_tokens, split_batch
from ssmvl.build import build_model, build_processor
from ssmvl.checkpoints.layouts import SAME
from ssmvl.data.shared_memory import clean_stale_segments
from ssmvl.data.streams import read_records, train_loader
from ssmvl.data.workers import cores
from ssmvl.errors import ContractError, Problem, RecipeError, RunError
from ssmvl.loading import open_weights
from ssmvl.recipe import Recipe
from ssmvl.saved import ABOUT_FILE, save_folder
from ssmvl.training.accuracy import WINDOW, AnswerAccuracy
from ssmvl.training.agreement import every_rank, first_rank, patient
from ssmvl.training.checkpoints import BucketStore, FolderStore, OldCheckpoints, Store
from ssmvl.training.composer_classes import composer_class
from ssmvl.training.composer_model import ComposerVLM, UnusedParameters, adamw
from ssmvl.training.damaged import DamagedSamples
from ssmvl.training.evaluating import StageEvaluator
from ssmvl.training.folder import RunFolder
from ssmvl.training.progress import ProgressBar
from ssmvl.training.report import report
from ssmvl.training.spikes import LossGuard
from ssmvl.training.stages import Plan, is_under
from ssmvl.training.watching import Norms, Pace

WAIT = 600.0  # seconds that ranks wait for each other while they train, as torch has it for GPUs


class Session:
    """One process of a run, on any number of ranks.

    Args:
        recipe: merged.
        plan: the same, bound.
    """

    def __init__(self, recipe: Recipe, plan: Plan) -> None:
        self.recipe, self.plan = recipe, plan
        self.folder = RunFolder(Path("runs") / plan.run, list(plan.stages), plan.checkpoints)
        self.rank, self.world = dist.get_global_rank(), dist.get_world_size()

    def run(self) -> Path:
        """Every stage that is asked for and not finished, then the evaluation; returns the run folder."""
        self._check_batches()
        if "OMP_NUM_THREADS" not in os.environ:  # the launcher sets none, and ranks would fight over the cores
            torch.set_num_threads(max(1, cores() // dist.get_local_world_size()))
        if self.world > 1:
            dist.initialize_dist(get_device(None), timeout=WAIT)
        if dist.get_local_rank() == 0:
            clean_stale_segments()
        finished = first_rank(self._prepare)
        for name in self._asked():
            if name in finished:
                left = self.folder.model(name)
                self._say(f"stage {name}: finished before, {left}; run=NAME trains it anew in another folder")
            else:
                self._train(name)
        if self._evaluation is not None:
            self._evaluate(self._evaluation, self.folder.root / "model")
        return self.folder.root

    def _asked(self) -> list[str]:
        """The stages of this launch."""
        return self.folder.stages if self.plan.stage is None else [self.plan.stage]

    @property
    def _evaluation(self) -> evaluation.Evaluation | None:
        """What follows the last stage, where this launch comes to it."""
        last = self.folder.stages[-1:]
        return self.plan.evaluation if last and self._asked()[-1:] == last else None

    def _start(self, name: str) -> str | Path:
        """What `build_model` starts a stage from."""
        before = self.folder.stages[: self.folder.stages.index(name)]
        return self.plan.stages[name].init_from or (self.folder.model(before[-1]) if before else "recipe")

    def _prepare(self) -> list[str]:
        """The stages that are finished; finds what the others will read, and makes the run folder this run's."""
        self.folder.require_no_other(self.recipe)
        finished = [name for name in self.plan.stages if (self.folder.model(name) / ABOUT_FILE).is_file()]
        self._find_inputs([name for name in self._asked() if name not in finished])
        self.folder.claim(self.recipe)  # last: a run that finds no data leaves its name free
        return finished

    def _find_inputs(self, names: Sequence[str]) -> None:
        """Find or fetch what these stages read, before one is trained: a wrong path costs seconds."""
        model = build_model(self.recipe, device="meta")
        build_processor(self.recipe, model)
        for stage in (self.plan.stages[name] for name in names):
            stage.data(split="train")
            if stage.evaluation is not None:
                stage.evaluation.data(split="test")
        for name in names:
            start = self._start(name)
            if isinstance(start, Path):
                if name == self.plan.stage and not (start / ABOUT_FILE).is_file():
                    advice = f"train that stage first, or give stages.{name}.init_from"
                    raise RunError(f"stage {name} starts from what the one before left, {start} is not there; {advice}")
            elif start != "recipe":
                open_weights(start, "model").check(model)
        if self._evaluation is not None:
            self._evaluation.data(split="test")

    def _train(self, name: str) -> None:
        found, passed = first_rank(lambda: self._store(name).newest())
        for text in passed:
            self._say(f"stage {name}: passes over a checkpoint: {text}")
        trainer = self.trainer(name, found)
        step = trainer.state.timestamp.batch.value
        how = f"resumed at step {step}" if step else "started"
        self._say(f"stage {name}: {how}, trains {', '.join(self.plan.stages[name].train)}")
        if trainer.state.timestamp < trainer.state.max_duration:
            trainer.fit()
        vlm = trainer.state.model.module if hasattr(trainer.state.model, "module") else trainer.state.model
        tensors: dict[str, Any] = get_model_state_dict(
            vlm.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
        )
        if self.rank == 0:
            tensors = {key: tensors[key] for key in SAME.sources(vlm.model)}  # FSDP2 gives tied ones twice
            save_folder(self.folder.model(name), tensors, self.recipe, trainer.state.train_dataloader.dataset.processor)
            self._store(name).remove_old(self.plan.stages[name].keep)
        trainer.close()
        dist.barrier(patient())

    def _store(self, name: str) -> Store:
        """Where a stage's checkpoints are."""
        place = self.folder.checkpoints(name)
        return FolderStore(place) if isinstance(place, Path) else BucketStore(place)

    def trainer(self, name: str, checkpoint: str | None = None) -> Trainer:
        """A stage under Composer: model built or received, sharded, and resumed from a checkpoint if there is one.

        A checkpoint is read as it was written: one of shards by sharded ranks, were it one alone, one file by others.
        """
        stage, start = self.plan.stages[name], self._start(name)
        sharded = self.world > 1 and stage.sharding == "fsdp2"
        if checkpoint is not None:
            sharded = not checkpoint.endswith(".pt")
        store = self._store(name)
        reproducibility.seed_all(self.plan.seed)
        if self.rank == 0 or not sharded:
            model = build_model(self.recipe, weights=start)
        else:  # Composer shards and sends what rank 0 built
            model = build_model(self.recipe, device="meta")
        dist.barrier(patient())  # the first rank may be fetching weights
        processor = build_processor(self.recipe, model)
        prompt = stage.prompt() if stage.prompt is not None else processor.prompt
        processor = replace(processor, prompt=prompt, max_text_tokens=stage.max_text_tokens)
        data = every_rank(lambda: stage.data(split="train"))
        gc.collect()  # the stage before may have filled the same cache, which streaming lets one loader do at a time
        batch = stage.batch // self.world
        loader = train_loader(data, processor, batch=batch, seed=self.plan.seed, loader=stage.loader)
        asked = []
        if stage.evaluation is not None:
            records = self._records(stage.evaluation)
            asked.append(StageEvaluator(stage.evaluation, records, processor, self.recipe))
        summed = self.world if sharded and not torch.cuda.is_available() else 1
        vlm = ComposerVLM(model, stage.train, stage.packed, summed, stage.activation_checkpointing)
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        encoders = any(is_under(name, "encoders") for name in trained)
        with suppress(ContractError):  # a foreign part that cannot run on meta
            vlm.log_flops(StepFlops(build_model(self.recipe, device="meta"), trained))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Composer's own deprecations; nothing a user could act on
            return Trainer(
                model=vlm,
                train_dataloader=DataSpec(
                    loader,
                    split_batch=split_batch,
                    get_num_samples_in_batch=num_samples,
                    get_num_tokens_in_batch=num_tokens,
                ),
                optimizers=adamw(vlm, stage.optimizer),
                schedulers=_cosine(stage.warmup),
                algorithms=[GradientClipping("norm", 1.0), *([UnusedParameters()] if encoders else [])],
                max_duration=stage.duration,
                device_train_microbatch_size=stage.microbatch or batch,
                accumulate_train_batch_on_tokens=True,
                precision="amp_bf16" if torch.cuda.is_available() else "fp32",
                parallelism_config={"fsdp": FSDP2Config(mixed_precision="FULL")} if sharded else None,
                seed=self.plan.seed,
                run_name=f"{self.plan.run}-{name}",
                progress_bar=False,
                profiler=self._profiler(name) if stage.profile else None,
                callbacks=[
                    AnswerAccuracy(),
                    DamagedSamples(loader, self.folder.damaged(name)),
                    LossGuard(stage.loss_jump),
                    Pace(),
                    Norms(),
                    *asked,
                    OldCheckpoints(store, stage.keep),
                    LRMonitor(),
                    SpeedMonitor(window_size=WINDOW),
                    RuntimeEstimator(),
                    *([MemoryMonitor()] if torch.cuda.is_available() else []),
                    *[composer_class("callbacks", key)(**(o or {})) for key, o in stage.callbacks.items()],
                ],
                loggers=[
                    ProgressBar(name),
                    TensorboardLogger(str(self.folder.root / "tensorboard"), flush_interval=10),
                    *[composer_class("loggers", key)(**(o or {})) for key, o in stage.loggers.items()],
                ],
                save_folder=store.place,
                save_interval=stage.checkpoint,
                save_num_checkpoints_to_keep=store.local_copies,
                save_latest_filename=None,
                save_overwrite=True,  # a killed run may have left half a checkpoint of a later step
                load_path=checkpoint,
            )

    def _profiler(self, name: str) -> Profiler:
        """Of a few steps of each epoch, as one trace of each rank for chrome://tracing or Perfetto."""
        return Profiler(
            schedule=cyclic_schedule(skip_first=2, wait=0, warmup=1, active=3),
            trace_handlers=[],
            sys_prof_cpu=False,
            torch_prof_folder=str(self.folder.traces(name)),
            torch_prof_remote_file_name=None,
            torch_prof_overwrite=True,
        )

    def _evaluate(self, options: evaluation.Evaluation, model: Path) -> None:
        records = self._records(options)
        self._say(f"asking {len(records)} test questions")
        mine = evaluation.ask(load(model), records, range(self.rank, len(records), self.world), options)
        parts = dist.all_gather_object(mine, patient())
        if self.rank == 0:
            answered = [parts[place % self.world][place // self.world] for place in range(len(records))]
            report(self.folder, records, answered)

    def _records(self, options: evaluation.Evaluation) -> list[dict[str, Any]]:
        data = every_rank(lambda: options.data(split="test"))
        return every_rank(lambda: read_records(data))

    def _check_batches(self) -> None:
        problems = []
        for name, stage in self.plan.stages.items():
            if stage.batch % self.world:
                text = (
                    f"{stage.batch} samples cannot be shared by {self.world} ranks; choose a multiple of {self.world}"
                )
                problems.append(Problem(f"stages.{name}.batch", text))
            parts, nodes = stage.loader.num_canonical_nodes or 1, self.world // dist.get_local_world_size()
            if parts % nodes and nodes % parts:
                text = f"{parts} parts cannot be shared by {nodes} nodes; choose a multiple of {nodes}"
                problems.append(Problem(f"stages.{name}.loader.num_canonical_nodes", text))
        if problems:
            raise RecipeError(problems, self.recipe.source)

    def _say(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)


def _cosine(warmup: str) -> ComposerScheduler:
    """To zero at the end of the stage. Composer warns of each step of a warm-up that is none."""
    return CosineAnnealingWithWarmupScheduler(warmup) if Time.from_input(warmup).value else CosineAnnealingScheduler()
