"""The command `ssmvl`: one file per verb, imported when it is used."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
import traceback
import warnings
from collections.abc import Sequence

from ssmvl.errors import PluginWarning, SsmvlError, wants_traceback

VERBS = {
    "train": "train a recipe on this machine (several ranks: composer -n 8 recipe.yaml)",
    "check": "find every mistake in a recipe without allocating a weight",
    "show": "print a recipe with its overrides merged, or draw a scan order",
    "list": "list recipes and components, and plugins that failed",
    "plan": "estimate memory and time of each stage on given GPUs",
    "data": "convert published data sets to shards, verify and inspect them",
    "export": "save the model of a checkpoint that a run wrote",
    "generate": "ask a trained model about an image",
    "bench": "measure speed and memory, as shares of what the machine allows",
    "doctor": "report versions, backends, plugins and stale shared memory",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. A mistake of the user's is printed without a traceback and gives exit code 2."""
    try:
        try:
            return _run(sys.argv[1:] if argv is None else argv)
        finally:
            sys.stdout.flush()  # here, not when Python exits: there nobody can catch what follows
    except BrokenPipeError:  # the reader has seen enough: `ssmvl list | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left must not fail again
        return 1


def _run(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="ssmvl", description="Vision-language models on state-space models.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, text in VERBS.items():
        sub = verbs.add_parser(verb, help=text, description=text)
        sub.add_argument("--traceback", action="store_true", help="show where an error was raised")
        if verb in argv[:1]:  # only the verb that is used is imported
            importlib.import_module(f"ssmvl.cli.{verb}").arguments(sub)
    arguments, late = parser.parse_known_args(argv)
    if late and not (hasattr(arguments, "overrides") and all(re.match(r"[\w.]+=", text) for text in late)):
        parser.error(f"unrecognized arguments: {' '.join(late)}")
    if late:  # argparse gives what follows an option to no other argument
        arguments.overrides += late
    if arguments.traceback:
        os.environ["SSMVL_TRACEBACK"] = "1"
    warnings.simplefilter("ignore", PluginWarning)  # `list`, `doctor` and failing lookups show them
    try:
        return int(importlib.import_module(f"ssmvl.cli.{arguments.verb}").run(arguments))
    except SsmvlError as error:
        if wants_traceback():
            traceback.print_exception(error)
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
