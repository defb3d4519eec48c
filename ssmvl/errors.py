"""Every exception the library raises on purpose.

    SsmvlError
    ├── RecipeError               (ValueError)   a recipe, or its options, cannot be used; lists every problem
    ├── UnknownComponentError     (LookupError)  no component of that kind and name
    ├── DuplicateComponentError   (LookupError)  two plugins offer the same kind and name
    ├── ContractError             (ValueError)   a component does not keep the contract of its kind
    ├── ShapeError                (ValueError)   inputs do not fit together
    ├── DataError                 (ValueError)   a sample, image or shard cannot be used
    ├── CheckpointError           (ValueError)   weights or a saved folder cannot be used
    ├── RunError                  (RuntimeError) a run folder cannot be used for this run
    ├── BackendError              (RuntimeError) the backend asked for cannot do this call
    └── MissingDependencyError    (ImportError)  an optional package is not installed

    PluginWarning                 (UserWarning)  a plugin could not be loaded; everything else works

A message says what was wrong, where, what was received, what is allowed and what to do. Each error is also a
builtin, so code that knows nothing of this library can catch it.
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
ELSEWHERE = ("<", contextlib.__file__, str(Path(importlib.__file__).parent))  # they pass errors on


class SsmvlError(Exception):
    """Base of every error raised on purpose; the CLI prints it without a traceback and exits with 2."""


class Problem(NamedTuple):
    """One mistake in a recipe: its YAML path and what is wrong there."""

    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" if self.path else self.message


class RecipeError(SsmvlError, ValueError):
    """All problems found in one recipe.

    Args:
        problems: every mistake, in the order of the recipe.
        source: the recipe's file or name, for the first line of the message.
    """

    def __init__(self, problems: Sequence[Problem], source: str = "recipe") -> None:
        self.problems = tuple(problems)
        count = f"{len(problems)} problem" + ("s" if len(problems) != 1 else "")
        super().__init__("\n  ".join([f"{source}: {count}", *map(str, problems)]))


class UnknownComponentError(SsmvlError, LookupError):
    """No component of that kind and name is registered."""


class DuplicateComponentError(SsmvlError, LookupError):
    """Two plugins offer the same kind and name."""


class ContractError(SsmvlError, ValueError):
    """A component does not keep the contract of its kind."""


class ShapeError(SsmvlError, ValueError):
    """Inputs do not fit together."""


class DataError(SsmvlError, ValueError):
    """A sample, an image or a shard cannot be used."""


class CheckpointError(SsmvlError, ValueError):
    """Weights or a saved folder cannot be used."""


class RunError(SsmvlError, RuntimeError):
    """A run folder cannot be used for this run."""


class BackendError(SsmvlError, RuntimeError):
    """The backend asked for does not exist, is not installed, or cannot do this call."""


class MissingDependencyError(SsmvlError, ImportError):
    """An optional package is not installed; the message names the extra that brings it."""


class PluginWarning(UserWarning):
    """A plugin could not be loaded; everything else works."""


def nearest(name: str, allowed: Iterable[str]) -> str:
    """The text " Did you mean 'x'? Allowed: …" for an unknown `name`, shared by every such message."""
    allowed = sorted(allowed)
    close = difflib.get_close_matches(name, allowed, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"{hint} Allowed: {', '.join(allowed) or 'nothing'}."


def foreign(error: BaseException) -> str:
    """The text "KeyError: 'x' (FILE, line N)" for an exception of foreign code, shared by every such message.

    The line is the last one that is not ours, torch's or Python's. `SSMVL_TRACEBACK=1` prints the traceback too.
    """
    if wants_traceback():
        traceback.print_exception(error)
    if isinstance(error, SsmvlError):
        return str(error)
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, SyntaxError):
        return f"SyntaxError: {error.msg} ({error.filename}, line {error.lineno})"
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        passes_on = frame.filename.startswith((OURS, *ELSEWHERE)) or f"{os.sep}torch{os.sep}" in frame.filename
        if not passes_on:
            return f"{text} ({frame.filename}, line {frame.lineno})"
    return text


def wants_traceback() -> bool:
    """True if the user asked for tracebacks (`--traceback` or `SSMVL_TRACEBACK=1`)."""
    return os.environ.get("SSMVL_TRACEBACK", "") not in ("", "0")


def short(text: str) -> str:
    """A text for a message: of one beyond 300 letters, its beginning and its end."""
    return text if len(text) <= 300 else f"{text[:180]} … {text[-100:]}"
