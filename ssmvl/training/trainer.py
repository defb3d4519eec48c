"""Composer's Trainer for a stage: model, data, optimizer, callbacks and loggers."""

from __future__ import annotations

import warnings
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from composer import Callback, DataSpec, Trainer
from composer.callbacks import LRMonitor, MemoryMonitor, RuntimeEstimator, SpeedMonitor
from composer.loggers import TensorboardLogger
from composer.profiler import Profiler, cyclic_schedule
from composer.utils import dist, reproducibility
from composer.utils.parallelism import FSDP2Config

from ssmvl.data.opening import open_data
from ssmvl.data.streams import TrainLoader, read_records, train_loader
from ssmvl.errors import ContractError, MissingDependencyError, RunError
from ssmvl.evaluation.runner import Evaluation
from ssmvl.model.build import build_model
from ssmvl.model.costs import StepFlops
from ssmvl.model.loading import StartingWeights
from ssmvl.processing.batch import num_samples, num_tokens, split_batch
from ssmvl.processing.processor import Processor
from ssmvl.training.callbacks.accuracy import WINDOW, AnswerAccuracy
from ssmvl.training.callbacks.damaged_samples import DamagedSamples
from ssmvl.training.callbacks.evaluator import StageEvaluator
from ssmvl.training.callbacks.interruption import Interruption
from ssmvl.training.callbacks.loss_guard import LossGuard
from ssmvl.training.callbacks.metrics import Norms, Pace
from ssmvl.training.callbacks.progress_bar import ProgressBar
from ssmvl.training.checked import Checked
from ssmvl.training.checkpoints.identity import Identity, resuming
from ssmvl.training.checkpoints.pruning import OldCheckpoints
from ssmvl.training.checkpoints.single_file import load_single_file
from ssmvl.training.checkpoints.stores import BucketStore, FolderStore, Store
from ssmvl.training.composer_classes import composer_class
from ssmvl.training.composer_model import ComposerVLM, UnusedParameters
from ssmvl.training.distributed import every_rank, patient
from ssmvl.training.freezing import is_under
from ssmvl.training.gradients import GradientClipping, all_finite
from ssmvl.training.optimizer import make_optimizer, rate_schedule, restore_options
from ssmvl.training.run_folder import RunFolder
from ssmvl.training.schema import Stage


def stage_trainer(
    checked: Checked,
    folder: RunFolder,
    name: str,
    start: str | Path | StartingWeights,
    checkpoint: str | None = None,
) -> Trainer:
    """Build the Trainer of a stage. Collective: every rank must call it.

    A sharded checkpoint needs sharded ranks, even a single one. A checkpoint in one file resumes on any ranks.

    Args:
        checked: the run's recipe.
        folder: the run folder.
        name: name of the stage.
        start: weights, as `build_model` takes them.
        checkpoint: the checkpoint to resume from; a fresh start if None.

    Raises:
        SsmvlError: weights, data or the checkpoint cannot be used. Raised on every rank.
    """
    plan = checked.plan
    stage, world = plan.stages[name], dist.get_world_size()
    joined = checkpoint is not None and checkpoint.endswith(".pt")
    sharded = (world > 1 and stage.sharding == "fsdp2") or (checkpoint is not None and not joined)
    reproducibility.seed_all(plan.seed)
    vlm = _model(checked, stage, start, sharded)
    processor = stage.processor(checked.processor)
    data = every_rank(lambda: open_data(stage.data, "train"))
    batch = stage.batch // world
    loader = train_loader(data, processor, batch=batch, seed=plan.seed, loader=stage.loader)
    encoders = any(is_under(one, "encoders") for one in _trained(vlm))
    store = stage_store(folder, name)
    optimizer = make_optimizer(vlm, stage.optimizer)
    asked = [dict(group) for group in optimizer.param_groups]
    clipping = GradientClipping(stage.clip_norm)
    interruption = Interruption(stage.checkpoint)
    guard = LossGuard(clipping, stage.loss_jump, stage.max_skipped_steps, interruption.due)
    callbacks = [Identity(checked.recipe, stage.optimizer.name), *_watchers(checked, folder, name, loader, guard)]
    callbacks.append(OldCheckpoints(store, stage.keep))
    callbacks += _named("callbacks", name, stage.callbacks)
    with warnings.catch_warnings(), resuming(checkpoint):
        warnings.simplefilter("ignore")  # Composer's own deprecations, which a user cannot fix
        fsdp = FSDP2Config(mixed_precision="FULL", state_dict_type="sharded")
        single = checkpoint if sharded and joined else None
        trainer = Trainer(
            model=vlm,
            train_dataloader=DataSpec(
                loader,
                split_batch=split_batch,
                get_num_samples_in_batch=num_samples,
                get_num_tokens_in_batch=num_tokens,
            ),
            optimizers=optimizer,
            schedulers=rate_schedule(stage.schedule, stage.warmup, stage.decay, stage.batch),
            algorithms=[clipping, *([UnusedParameters()] if encoders else [])],
            max_duration=stage.duration,
            device_train_microbatch_size=stage.microbatch or batch,
            accumulate_train_batch_on_tokens=True,
            precision="amp_bf16" if torch.cuda.is_available() else "fp32",
            parallelism_config={"fsdp": fsdp} if sharded else None,
            seed=plan.seed,
            run_name=f"{plan.run}-{name}",
            progress_bar=False,
            profiler=_profiler(folder.traces(name)) if stage.profile else None,
            callbacks=callbacks,
            loggers=[
                ProgressBar(name),
                TensorboardLogger(str(folder.root / "tensorboard"), flush_interval=10),
                *_named("loggers", name, stage.loggers),
            ],
            save_folder=store.location,
            save_interval=interruption.due,
            save_num_checkpoints_to_keep=store.local_copies,
            save_latest_filename=None,
            save_overwrite=True,  # a killed run may have left an incomplete checkpoint of a later step
            load_path=None if single else checkpoint,
        )
        if single:
            load_single_file(trainer, single)
    trainer.state.callbacks.append(interruption)  # after Composer's CheckpointSaver
    if checkpoint is not None:
        restore_options(trainer, asked)
        if not all_finite(vlm):
            advice = "remove it to resume from the previous one"
            raise RunError(f"{checkpoint} holds weights that are not finite; {advice}")
    return trainer


def stage_store(folder: RunFolder, name: str) -> Store:
    """The store of a stage's checkpoints."""
    location = folder.checkpoints(name)
    return FolderStore(location) if isinstance(location, Path) else BucketStore(location)


def read_questions(options: Evaluation) -> list[dict[str, Any]]:
    """The records of an evaluation set. Collective: every rank must call it and gets the same records."""
    data = every_rank(lambda: open_data(options.data, "test"))
    return every_rank(lambda: read_records(data))


def _model(checked: Checked, stage: Stage, start: str | Path | StartingWeights, sharded: bool) -> ComposerVLM:
    if sharded and dist.get_global_rank() > 0:  # Composer shards and sends the first rank's weights
        model = build_model(checked, device="meta")
    else:
        model = build_model(checked, weights=start)
    dist.barrier(patient())  # the first rank may be downloading weights
    summed = dist.get_world_size() if sharded and not torch.cuda.is_available() else 1
    vlm = ComposerVLM(model, stage.train, stage.packed, summed, stage.activation_checkpointing)
    with suppress(ContractError):  # a third-party part that cannot run on meta
        vlm.log_flops(StepFlops(checked.model, _trained(vlm)))
    return vlm


def _trained(vlm: ComposerVLM) -> list[str]:
    return [name for name, parameter in vlm.model.named_parameters() if parameter.requires_grad]


def _watchers(checked: Checked, folder: RunFolder, name: str, loader: TrainLoader, guard: LossGuard) -> list[Callback]:
    after = checked.after(name)
    processor: Processor = replace(loader.dataset.processor, prompt=after.parts.prompt())
    stage = checked.plan.stages[name]
    return [
        AnswerAccuracy(),
        DamagedSamples(loader, folder.damaged(name), stage.max_damaged),
        guard,
        Pace(),
        Norms(),
        *(
            [StageEvaluator(asked, read_questions(asked), processor, after.recipe)]
            if (asked := stage.evaluation)
            else []
        ),
        LRMonitor(),
        SpeedMonitor(window_size=WINDOW),
        RuntimeEstimator(),
        *([MemoryMonitor()] if torch.cuda.is_available() else []),
    ]


def _named(kind: Literal["callbacks", "loggers"], stage: str, wanted: dict[str, Any]) -> list[Any]:
    objects = []
    for name, options in wanted.items():
        try:
            objects.append(composer_class(kind, name)(**(options or {})))
        except ImportError as error:
            raise MissingDependencyError(f"stages.{stage}.{kind}.{name}: {error}") from error
        except (TypeError, ValueError) as error:  # only the class knows which values are valid
            given = ", ".join(options or ())  # without the values: one may be a password
            raise RunError(f"stages.{stage}.{kind}.{name}: {error}; its options are {given}") from error
    return objects


def _profiler(folder: Path) -> Profiler:
    """A profiler of a few steps per epoch. Each rank writes one trace for chrome://tracing or Perfetto."""
    return Profiler(
        schedule=cyclic_schedule(skip_first=2, wait=0, warmup=1, active=3),
        trace_handlers=[],
        sys_prof_cpu=False,
        torch_prof_folder=str(folder),
        torch_prof_remote_file_name=None,
        torch_prof_overwrite=True,
    )
