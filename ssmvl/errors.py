"""Exceptions that the library raises on purpose.

    SsmvlError
    ├── RecipeError               (ValueError)   a recipe is invalid; lists every problem
    ├── UnknownComponentError     (LookupError)  no component of this kind has this name
    ├── DuplicateComponentError   (LookupError)  two plugins register the same kind and name
    ├── ContractError             (ValueError)   a component violates the contract of its kind
    ├── ShapeError                (ValueError)   shapes, dtypes or sizes do not match
    ├── DataError                 (ValueError)   a sample, image or shard is unusable
    ├── CheckpointError           (ValueError)   weights or a saved model are unusable
    ├── RunError                  (RuntimeError) a run cannot start, continue or resume
    ├── BackendError              (RuntimeError) the requested backend does not support this call
    └── MissingDependencyError    (ImportError)  an optional package is not installed

    PluginWarning                 (UserWarning)  a plugin failed to load; everything else still works

A message states what is wrong, where, what was received, what is allowed and how to fix it. Each error is also a
builtin exception, so code that does not know this library can catch it.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import os
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

__all__ = [
    "SsmvlError",
    "Problem",
    "RecipeError",
    "UnknownComponentError",
    "DuplicateComponentError",
    "ContractError",
    "ShapeError",
    "DataError",
    "CheckpointError",
    "RunError",
    "BackendError",
    "MissingDependencyError",
    "PluginWarning",
    "nearest",
    "short",
    "foreign",
]


OURS = f"{Path(__file__).parent}{os.sep}"
PASS_THROUGH = ("<", contextlib.__file__, str(Path(importlib.__file__).parent))  # Python's own frames, never the cause


class SsmvlError(Exception):
    """Base class of all errors raised on purpose. The CLI prints them without a traceback and exits with code 2."""


class Problem(NamedTuple):
    """One mistake in a recipe: its YAML path and a message."""

    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" if self.path else self.message


class RecipeError(SsmvlError, ValueError):
    """A recipe is invalid. The message lists every problem.

    Args:
        problems: all mistakes, in the recipe's order.
        source: the recipe's file or name, shown in the first line of the message.
    """

    def __init__(self, problems: Sequence[Problem], source: str = "recipe") -> None:
        self.problems = tuple(problems)
        count = f"{len(problems)} problem" + ("s" if len(problems) != 1 else "")
        super().__init__("\n  ".join([f"{source}: {count}", *map(str, problems)]))


class UnknownComponentError(SsmvlError, LookupError):
    """No component of that kind and name is registered."""


class DuplicateComponentError(SsmvlError, LookupError):
    """Two plugins register the same kind and name."""


class ContractError(SsmvlError, ValueError):
    """A component violates the contract of its kind; see `ssmvl.interfaces`."""


class ShapeError(SsmvlError, ValueError):
    """Shapes, dtypes or sizes of inputs and options do not match."""


class DataError(SsmvlError, ValueError):
    """A sample, image or shard is unusable."""


class CheckpointError(SsmvlError, ValueError):
    """Weights or a saved model are unusable."""


class RunError(SsmvlError, RuntimeError):
    """A run cannot start, continue or resume."""


class BackendError(SsmvlError, RuntimeError):
    """The requested backend is unknown, is not installed, or does not support this call."""


class MissingDependencyError(SsmvlError, ImportError):
    """An optional package is not installed. The message names the extra that installs it."""


class PluginWarning(UserWarning):
    """A plugin failed to load; everything else still works."""


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Return " Did you mean 'x'? Allowed: …", the ending of every message about an unknown `name`."""
    allowed = sorted(allowed)
    close = difflib.get_close_matches(name, allowed, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"{hint} Allowed: {', '.join(allowed) or 'nothing'}."


def foreign(error: BaseException) -> str:
    """Describe an exception of third-party code as "KeyError: 'x' (FILE, line N)".

    The line is that of the innermost frame outside ssmvl, torch, importlib and contextlib. With `SSMVL_TRACEBACK=1`
    the full traceback is printed too.
    """
    if wants_traceback():
        traceback.print_exception(error)
    if isinstance(error, SsmvlError):
        return str(error)
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, SyntaxError):
        return f"SyntaxError: {error.msg} ({error.filename}, line {error.lineno})"
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        skipped = frame.filename.startswith((OURS, *PASS_THROUGH)) or f"{os.sep}torch{os.sep}" in frame.filename
        if not skipped:
            return f"{text} ({frame.filename}, line {frame.lineno})"
    return text


def wants_traceback() -> bool:
    """Return True if the user wants tracebacks (`--traceback` or `SSMVL_TRACEBACK=1`)."""
    return os.environ.get("SSMVL_TRACEBACK", "") not in ("", "0")


def short(text: str) -> str:
    """Shorten a text of more than 300 characters to its beginning and end, for use in a message."""
    return text if len(text) <= 300 else f"{text[:180]} … {text[-100:]}"
