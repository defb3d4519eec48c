"""A run: a recipe's stages one after another, each from files, then the evaluation.

`composer recipes/x.yaml`, `composer -m ssmvl.training.run recipes/x.yaml` and `ssmvl.train("x")` all end here.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from safetensors import SafetensorError
from torch import OutOfMemoryError
from torch.distributed import DistBackendError, DistNetworkError
from torch.distributed.checkpoint.api import CheckpointException

from ssmvl.errors import MissingDependencyError, RunError, SsmvlError, short, wants_traceback
from ssmvl.recipes.merge import Recipe
from ssmvl.training.checked import Checked, check
from ssmvl.training.run_folder import RunFolder

__all__ = ["train"]

DISK = {getattr(errno, name) for name in "ENOSPC EDQUOT EFBIG EROFS EACCES EPERM EIO ENOENT ENOTDIR ESTALE".split()}
SAVED = "What was saved stays, and the same command goes on at the newest checkpoint that is whole"
PR_SET_PDEATHSIG = 1  # of Linux's prctl
_print = threading.excepthook


def train(recipe: str | Path | Recipe | Checked, *overrides: str) -> Path:
    """Train every stage of a recipe, evaluate, and return the run folder. Started again, it goes on where it was.

    Args:
        recipe: a name, a YAML file, a recipe, or what `ssmvl.check` returns.
        overrides: `"stages.finetune.batch=128"`, applied one by one.

    Raises:
        RecipeError: every mistake of the recipe.
        RunError: the run folder belongs to another recipe or cannot be written, or another rank is lost.
        MissingDependencyError: Composer or streaming is not installed.
    """
    for module in ("composer", "streaming"):
        if find_spec(module) is None:
            raise MissingDependencyError(f"training needs {module}: pip install 'ssmvl[train]'")
    checked = check(recipe, *overrides, weights=False)  # the session opens them, on its first rank
    from ssmvl.training.session import Session

    session = Session(checked)
    try:
        return session.run()
    except BaseException as error:  # torch's CheckpointException is no Exception
        if why := _gone(session.folder, error):
            raise RunError(f"{why} is gone: somebody removed or moved it while the run was at work") from error
        if why := external_cause(error):
            raise RunError(f"{why}. {SAVED}") from error
        raise
    finally:
        session.folder.release()


def external_cause(error: BaseException) -> str | None:
    """What ended a run, if that is no mistake in its code: a disk, or another rank; None if it may be one."""
    if isinstance(error, CheckpointException):
        return next(filter(None, (external_cause(found) for found, _ in error.failures.values())), None)
    text = short(str(error).partition("\n")[0])
    if isinstance(error, SafetensorError) or (isinstance(error, OSError) and error.errno in DISK):
        return f"a file cannot be written or read: {text}"
    if isinstance(error, OutOfMemoryError):
        advice = "a smaller microbatch, or activation_checkpointing=true; `ssmvl plan` says what fits"
        return f"the GPU's memory is full ({text}); {advice}"
    if type(error).__module__.partition(".")[0] in ("boto3", "botocore") or isinstance(error, _store_error()):
        return f"a checkpoint could not be sent to its bucket ({short(' '.join(str(error).split()))})"
    if isinstance(error, DistNetworkError) and "EADDRINUSE" in str(error):
        port = os.environ.get("MASTER_PORT")
        return f"the ranks cannot meet: another process uses port {port}; leave --master_port out or give another"
    if isinstance(error, (DistBackendError, DistNetworkError)) or "gloo/transport" in text:
        return f"the connection to another rank is lost, whose message, if it left one, says why ({text})"
    if isinstance(error, RuntimeError) and "inline_container" in text:  # torch's name for what writes its files
        return f"a checkpoint cannot be written, which is so where a disk is full (torch: {text})"
    return None


def _gone(folder: RunFolder, error: BaseException) -> str | None:
    """What someone took away from a run, if that has ended it."""
    if isinstance(error, (SsmvlError, KeyboardInterrupt, SystemExit)):
        return None
    if folder.vanished:
        return f"{folder.root}/recipe.yaml"
    saved = isinstance(error, AssertionError) and str(error) == "Expected file to have been saved."  # says Composer
    return "a checkpoint that was just written" if saved else None


def _store_error() -> type[BaseException]:
    from composer.utils.object_store import ObjectStoreTransientError

    return ObjectStoreTransientError


def main(argv: Sequence[str]) -> int:
    """`argv` is the recipe and its overrides; a mistake is printed without a traceback and gives exit code 2."""
    _end_with_launcher()
    warnings.filterwarnings("ignore", "TypedStorage is deprecated")  # torch, of what itself does to save shards
    # TensorBoard writes in a thread, which prints what its next call raises.
    threading.excepthook = lambda said: None if said.exc_value and external_cause(said.exc_value) else _print(said)
    try:
        if not argv:
            raise SsmvlError("which recipe? composer recipes/quickstart.yaml")
        train(argv[0], *argv[1:])
    except SsmvlError as error:
        if wants_traceback():
            traceback.print_exception(error)
        print(f"error: {error}", file=sys.stderr, flush=True)
        logging.getLogger("composer").setLevel(logging.CRITICAL)  # what is closed at exit fails for the same reason
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # the launcher ends those that leave last: they leave with 2 too
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return 2
    return 0


def _end_with_launcher() -> None:
    """Have this rank end when its launcher is killed, which can pass nothing on then."""
    if sys.platform == "linux" and "LOCAL_RANK" in os.environ:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
