"""A checkpoint of one file read into sharded ranks: the first rank reads it, every rank gets its shards."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from composer import Trainer
from composer.utils import dist, maybe_create_object_store_from_uri, parse_uri, reproducibility
from composer.utils.checkpoint import safe_torch_load
from composer.utils.file_helpers import get_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict, set_optimizer_state_dict

from ssmvl.errors import RunError, short
from ssmvl.training.distributed import first_rank


def load_single_file(trainer: Trainer, checkpoint: str) -> None:
    """Resume from a checkpoint of one file where Composer, told to write shards, would expect a folder of them.

    Args:
        trainer: of sharded ranks.
        checkpoint: path or URL of a file that a run of ours wrote.
    """
    state = trainer.state
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "checkpoint")
        store, name = maybe_create_object_store_from_uri(checkpoint), parse_uri(checkpoint)[2]
        first_rank(lambda: _fetch(name, file, store))
        whole: dict[str, Any] = safe_torch_load(file, load_monolith_rank0_only=True)
    found, (optimizer,) = whole["state"], state.optimizers
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(state.model, found.pop("model") or {}, options=options)  # None on other ranks than the first
    moments = (found.pop("optimizers") or {}).get(type(optimizer).__qualname__, {})
    set_optimizer_state_dict(state.model, optimizer, moments, options=options)
    found.pop("run_name", None)  # Composer keeps the one that it was given
    state.load_state_dict(found, trainer.logger)
    if state.timestamp.batch_in_epoch == 0:  # as Composer does; within an epoch, the data are not read again
        reproducibility.load_rng_state(whole["rng"])
    dist.barrier()


def _fetch(name: str, file: str, store: Any) -> None:
    try:
        get_file(name, file, store, progress_bar=False)
    except Exception as error:  # of the disk, or of whatever store it is: the other ranks wait for this one
        raise RunError(f"{name} cannot be read ({type(error).__name__}: {short(str(error))})") from error
