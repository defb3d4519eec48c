"""Load a single-file checkpoint into sharded ranks: the first rank reads it, every rank receives its shards."""

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
    """Resume from a single file. Composer itself, set to write shards, would expect a directory of shards.

    Args:
        trainer: this rank's trainer of a sharded model.
        checkpoint: path or URL of a file written by an ssmvl run.
    """
    state = trainer.state
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "checkpoint")
        store, name = maybe_create_object_store_from_uri(checkpoint), parse_uri(checkpoint)[2]
        first_rank(lambda: _fetch(name, file, store))
        saved: dict[str, Any] = safe_torch_load(file, load_monolith_rank0_only=True)
    saved_state, (optimizer,) = saved["state"], state.optimizers
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(state.model, saved_state.pop("model") or {}, options=options)  # None except on the first rank
    moments = (saved_state.pop("optimizers") or {}).get(type(optimizer).__qualname__, {})
    set_optimizer_state_dict(state.model, optimizer, moments, options=options)
    saved_state.pop("run_name", None)  # the trainer keeps its own
    state.load_state_dict(saved_state, trainer.logger)
    if state.timestamp.batch_in_epoch == 0:  # as in Composer, for a dataset that resumes without replaying batches
        reproducibility.load_rng_state(saved["rng"])
    dist.barrier()


def _fetch(name: str, file: str, store: Any) -> None:
    try:
        get_file(name, file, store, progress_bar=False)
    except Exception as error:  # any disk or store error: `first_rank` tells the waiting ranks
        raise RunError(f"{name} cannot be read ({type(error).__name__}: {short(str(error))})") from error
