"""A stage under Composer: its model, built or received and sharded, its data, and all that watches it."""

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
from ssmvl.training.optimizer import adamw, cosine_schedule, restore_options, start_moments
from ssmvl.training.run_folder import RunFolder
from ssmvl.training.schema import Stage


def stage_trainer(
    checked: Checked,
    folder: RunFolder,
    name: str,
    start: str | Path | StartingWeights,
    checkpoint: str | None = None,
) -> Trainer:
    """What trains a stage, on this rank; every rank calls it.

    Shards are read by sharded ranks only, were it one alone; one file by any: sharded ranks write shards then.

    Args:
        checked: the recipe of the run.
        folder: of the run.
        name: of the stage.
        start: what `build_model` takes as weights.
        checkpoint: what to go on from; the stage begins if None.

    Raises:
        SsmvlError: weights, data or the checkpoint cannot be used. On every rank.
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
    optimizer = adamw(vlm, stage.optimizer)
    asked = [dict(group) for group in optimizer.param_groups]
    clipping = GradientClipping()
    guard = LossGuard(clipping, stage.loss_jump, stage.max_skipped_steps, stage.checkpoint)
    callbacks = [Identity(checked.recipe), *_watchers(checked, folder, name, loader, guard)]
    callbacks.append(OldCheckpoints(store, stage.keep))
    callbacks += _named("callbacks", name, stage.callbacks)
    with warnings.catch_warnings(), resuming(checkpoint):
        warnings.simplefilter("ignore")  # Composer's own deprecations; nothing a user could act on
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
            schedulers=cosine_schedule(stage.warmup, stage.batch),
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
            save_folder=store.place,
            save_interval=stage.checkpoint,
            save_num_checkpoints_to_keep=store.local_copies,
            save_latest_filename=None,
            save_overwrite=True,  # a killed run may have left half a checkpoint of a later step
            load_path=None if single else checkpoint,
        )
        if single:
            load_single_file(trainer, single)
    if checkpoint is None:
        start_moments(optimizer)
    else:
        restore_options(trainer, asked)
        if not all_finite(vlm):
            advice = "remove it, and the run resumes from the one before"
            raise RunError(f"{checkpoint} holds weights that are not finite; {advice}")
    return trainer


def stage_store(folder: RunFolder, name: str) -> Store:
    """Where a stage's checkpoints are."""
    place = folder.checkpoints(name)
    return FolderStore(place) if isinstance(place, Path) else BucketStore(place)


def read_questions(options: Evaluation) -> list[dict[str, Any]]:
    """The records of an evaluation set, the same on every rank."""
    data = every_rank(lambda: open_data(options.data, "test"))
    return every_rank(lambda: read_records(data))


def _model(checked: Checked, stage: Stage, start: str | Path | StartingWeights, sharded: bool) -> ComposerVLM:
    if sharded and dist.get_global_rank() > 0:  # Composer shards and sends what the first rank built
        model = build_model(checked, device="meta")
    else:
        model = build_model(checked, weights=start)
    dist.barrier(patient())  # the first rank may be fetching weights
    summed = dist.get_world_size() if sharded and not torch.cuda.is_available() else 1
    vlm = ComposerVLM(model, stage.train, stage.packed, summed, stage.activation_checkpointing)
    with suppress(ContractError):  # a foreign part that cannot run on meta
        vlm.log_flops(StepFlops(checked.model, _trained(vlm)))
    return vlm


def _trained(vlm: ComposerVLM) -> list[str]:
    return [name for name, parameter in vlm.model.named_parameters() if parameter.requires_grad]


def _watchers(checked: Checked, folder: RunFolder, name: str, loader: TrainLoader, guard: LossGuard) -> list[Callback]:
    after = checked.after(name)
    processor: Processor = replace(loader.dataset.processor, prompt=after.parts.prompt())
    asked = checked.plan.stages[name].evaluation
    return [
        AnswerAccuracy(),
        DamagedSamples(loader, folder.damaged(name)),
        guard,
        Pace(),
        Norms(),
        *([] if asked is None else [StageEvaluator(asked, read_questions(asked), processor, after.recipe)]),
        LRMonitor(),
        SpeedMonitor(window_size=WINDOW),
        RuntimeEstimator(),
        *([MemoryMonitor()] if torch.cuda.is_available() else []),
    ]


def _named(kind: Literal["callbacks", "loggers"], stage: str, wanted: dict[str, Any]) -> list[Any]:
    made = []
    for name, options in wanted.items():
        try:
            made.append(composer_class(kind, name)(**(options or {})))
        except ImportError as error:
            raise MissingDependencyError(f"stages.{stage}.{kind}.{name}: {error}") from error
        except (TypeError, ValueError) as error:  # what its options are for is known to it alone
            given = ", ".join(options or ())  # without their values, of which one may be a password
            raise RunError(f"stages.{stage}.{kind}.{name}: {error}; its options are {given}") from error
    return made


def _profiler(folder: Path) -> Profiler:
    """Of a few steps of each epoch, as one trace of each rank for chrome://tracing or Perfetto."""
    return Profiler(
        schedule=cyclic_schedule(skip_first=2, wait=0, warmup=1, active=3),
        trace_handlers=[],
        sys_prof_cpu=False,
        torch_prof_folder=str(folder),
        torch_prof_remote_file_name=None,
        torch_prof_overwrite=True,
    )
