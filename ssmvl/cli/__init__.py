"""The command `ssmvl`. Each verb is a module that is imported when it is used."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import re
import sys
import traceback
import warnings
from collections.abc import Sequence

from ssmvl import __version__
from ssmvl.errors import PluginWarning, SsmvlError, wants_traceback

VERBS = {
    "train": "train a recipe on this machine (several ranks: composer -n 8 recipe.yaml)",
    "check": "find every mistake in a recipe without allocating a weight",
    "show": "print a merged recipe, or draw a scan order",
    "list": "list recipes, components and plugins",
    "plan": "estimate the memory and time of each stage on given GPUs",
    "data": "convert published datasets to shards; verify and inspect shards",
    "export": "export a training checkpoint as a saved model",
    "generate": "ask a trained model about images",
    "bench": "measure speed and memory relative to the limits of this machine",
    "doctor": "report versions, backends, plugins and stale shared memory",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. User errors are printed without a traceback; the exit code is 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names may be invalid text
    try:
        try:
            return _run(sys.argv[1:] if argv is None else argv)
        finally:
            sys.stdout.flush()  # at exit an error could no longer be caught
    except BrokenPipeError:  # the reader has closed the pipe: `ssmvl list | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the rest of the output must not fail again
        return 1


def _run(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="ssmvl", description="Vision-language models on state-space models.")
    parser.add_argument("--version", action="version", version=f"ssmvl {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, text in VERBS.items():
        sub = verbs.add_parser(verb, help=text, description=text)
        sub.add_argument("--traceback", action="store_true", help="show the traceback of an error")
        if verb in argv[:1]:  # only this verb is imported
            importlib.import_module(f"ssmvl.cli.{verb}").arguments(sub)
    arguments, late = parser.parse_known_args(argv)
    if late and not (hasattr(arguments, "overrides") and all(re.match(r"[\w.]+=", text) for text in late)):
        parser.error(f"unrecognized arguments: {' '.join(late)}")
    if late:  # overrides after an option, which argparse does not assign
        arguments.overrides += late
    if arguments.traceback:
        os.environ["SSMVL_TRACEBACK"] = "1"
    warnings.simplefilter("ignore", PluginWarning)  # `list`, `doctor` and failed lookups show them
    try:
        return int(importlib.import_module(f"ssmvl.cli.{arguments.verb}").run(arguments))
    except BrokenPipeError:
        raise
    except (SsmvlError, OSError, UnicodeError) as error:
        if wants_traceback():
            traceback.print_exception(error)
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
