"""Entry point of a run: train the stages of a recipe in order, then evaluate.

`composer recipes/x.yaml`, `composer -m ssmvl.training.run recipes/x.yaml` and `ssmvl.train("x")` all start here.
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
SAVED = "Saved files are intact; run the same command again to resume from the latest complete checkpoint"
PR_SET_PDEATHSIG = 1  # from Linux's prctl.h
_print = threading.excepthook


def train(recipe: str | Path | Recipe | Checked, *overrides: str) -> Path:
    """Train every stage of a recipe, evaluate, and return the run folder. Called again, it resumes.

    Args:
        recipe: a name, a YAML file, a recipe, or the result of `ssmvl.check`.
        overrides: `"stages.finetune.batch=128"`, applied one by one.

    Raises:
        RecipeError: lists every mistake in the recipe.
        RunError: the run folder belongs to another recipe or cannot be written, or another rank was lost.
        MissingDependencyError: Composer or streaming is not installed.
        KeyboardInterrupt, SystemExit: after Ctrl-C or SIGTERM. During training a checkpoint is written first.
    """
    for module in ("composer", "streaming"):
        if find_spec(module) is None:
            raise MissingDependencyError(f"training needs {module}: pip install 'ssmvl[train]'")
    checked = check(recipe, *overrides, weights=False)  # the session opens weights, on its first rank
    from ssmvl.training.session import Session

    session = Session(checked)
    try:
        return session.run()
    except BaseException as error:  # torch's CheckpointException is not an Exception
        if why := _gone(session.folder, error):
            raise RunError(f"{why} was removed or moved during the run") from error
        if why := external_cause(error):
            raise RunError(f"{why}. {SAVED}") from error
        raise
    finally:
        session.folder.release()


def external_cause(error: BaseException) -> str | None:
    """The cause of an error outside our code, such as a full disk or a lost rank; None if there may be none."""
    if isinstance(error, CheckpointException):
        return next(filter(None, (external_cause(cause) for cause, _ in error.failures.values())), None)
    text = short(str(error).partition("\n")[0])
    if isinstance(error, SafetensorError) or (isinstance(error, OSError) and error.errno in DISK):
        return f"a file cannot be read or written: {text}"
    if isinstance(error, OutOfMemoryError):
        advice = "try a smaller microbatch or activation_checkpointing=true; `ssmvl plan` shows what fits"
        return f"the GPU is out of memory ({text}); {advice}"
    if type(error).__module__.partition(".")[0] in ("boto3", "botocore") or isinstance(error, _store_error()):
        return f"a checkpoint could not be uploaded ({short(' '.join(str(error).split()))})"
    if isinstance(error, DistNetworkError) and "EADDRINUSE" in str(error):
        port = os.environ.get("MASTER_PORT")
        return f"the ranks cannot connect, because another process uses port {port}; drop --master_port or change it"
    if isinstance(error, (DistBackendError, DistNetworkError)) or "gloo/transport" in text:
        return f"the connection to another rank was lost; see that rank's own message, if any ({text})"
    if isinstance(error, RuntimeError) and "inline_container" in text:  # torch's file writer
        return f"a checkpoint cannot be written; the disk may be full (torch: {text})"
    return None


def _gone(folder: RunFolder, error: BaseException) -> str | None:
    """The file or directory whose removal ended the run, if any."""
    if isinstance(error, (SsmvlError, KeyboardInterrupt, SystemExit)):
        return None
    if folder.vanished:
        return f"{folder.root}/recipe.yaml"
    saved = isinstance(error, AssertionError) and str(error) == "Expected file to have been saved."  # Composer's text
    return "a checkpoint that was just written" if saved else None


def _store_error() -> type[BaseException]:
    from composer.utils.object_store import ObjectStoreTransientError

    return ObjectStoreTransientError


def main(argv: Sequence[str]) -> int:
    """Train the recipe in `argv` with its overrides. User errors give one message and exit code 2."""
    _end_with_launcher()
    warnings.filterwarnings("ignore", "TypedStorage is deprecated")  # torch warns about its own saving of shards
    # TensorBoard's writer thread prints an error that its next call raises again.
    threading.excepthook = lambda args: None if args.exc_value and external_cause(args.exc_value) else _print(args)
    try:
        if not argv:
            raise SsmvlError("no recipe given; for example: composer recipes/quickstart.yaml")
        train(argv[0], *argv[1:])
    except SsmvlError as error:
        if wants_traceback():
            traceback.print_exception(error)
        print(f"error: {error}", file=sys.stderr, flush=True)
        logging.getLogger("composer").setLevel(logging.CRITICAL)  # closing at exit fails for the same reason
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # else the launcher's SIGTERM would replace exit code 2
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _end_with_launcher() -> None:
    """End this rank when its launcher is killed: a killed launcher cannot forward a signal."""
    if sys.platform == "linux" and "LOCAL_RANK" in os.environ:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
