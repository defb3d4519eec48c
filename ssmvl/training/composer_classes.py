"""Composer's callbacks and loggers by name: found, and their options checked. Imports no Composer until asked."""

from __future__ import annotations

import importlib
import inspect
import math
import re
from collections.abc import Collection, Mapping
from importlib.util import find_spec
from typing import Any, Literal

from ssmvl.errors import Problem, nearest

LABEL = "evaluation"  # of the metrics that a stage's evaluation logs
SHARES = ("accuracy", "blind", "swapped")
METRIC = re.compile(rf"evaluation/(loss|({'|'.join(SHARES)})/(?P<type>.+))")
PATIENCE = re.compile(r"\d+(ep|ba)?")
COMPARISONS = ("less", "lt", "greater", "gt")
STOPPERS = ("EarlyStopper", "ThresholdStopper")
REFUSED = {
    "CheckpointSaver": "a stage has one; set its keys checkpoint and keep, and the recipe's checkpoints",
    "ActivationMonitor": "it cannot handle connectors, one of whose inputs is a Grid",
    "ExportForInferenceCallback": "it cannot trace a model that reads ragged batches; see ssmvl export",
    "Generate": "it needs a transformers model; see the stage's key evaluation",
    "ImageVisualizer": "it cannot read a ragged batch; see ssmvl data inspect --png",
    "LoadCheckpoint": "it would overwrite what a resumed stage has learned; see the stage's key init_from",
    "MLPerfCallback": "it acts in Composer's evaluation loop, which a stage does not have",
    "Logger": "it is not a destination of logs; name one, such as FileLogger",
    "LoggerDestination": "it is the base of all loggers and logs nothing; name one, such as FileLogger",
    "InMemoryLogger": "what it keeps is lost when training ends; name another, such as FileLogger",
    "MosaicMLLogger": "it logs to the MosaicML platform only",
}


def unknown_types(callbacks: Mapping[str, Any], types: Collection[str]) -> list[str]:
    """Monitored metrics of question types that an evaluation set does not have.

    Args:
        callbacks: of a stage, by class name, with their options.
        types: of the questions.
    """
    monitored = [str((callbacks.get(name) or {}).get("monitor", "")) for name in STOPPERS]
    matches = [match for match in map(METRIC.fullmatch, monitored) if match]
    return [match.group() for match in matches if match["type"] not in (None, "all", *types)]


def composer_class(kind: Literal["callbacks", "loggers"], name: str) -> Any:
    """The class of that name in `composer.callbacks` or `composer.loggers`, or None."""
    return getattr(importlib.import_module(f"composer.{kind}"), name, None)


def check_composer(path: str, stage: dict[str, Any], notes: list[str]) -> list[Problem]:
    """Names and options of the stage's callbacks and loggers, where Composer is there to say which there are."""
    problems = []
    for kind in ("callbacks", "loggers"):
        wanted = stage.get(kind)
        if not isinstance(wanted, dict) or not wanted:
            continue
        if find_spec("composer") is None:
            notes.append(f"{path}.{kind}: not checked, Composer is not installed")
            continue
        for name, options in wanted.items():
            problems += _check_call(f"{path}.{kind}.{name}", kind, str(name), options or {}, stage)
    return problems


def _check_call(path: str, kind: Any, name: str, options: Any, stage: dict[str, Any]) -> list[Problem]:
    if name in REFUSED:
        return [Problem(path, REFUSED[name])]
    found = composer_class(kind, name)
    if not inspect.isclass(found):
        classes = vars(importlib.import_module(f"composer.{kind}")).items()
        names = [n for n, c in classes if inspect.isclass(c) and n not in REFUSED]
        return [Problem(path, f"composer.{kind} has no class {name!r}.{nearest(name, names)}")]
    if not isinstance(options, dict):
        return [Problem(path, f"expected a mapping of options, received {options!r}")]
    signature = inspect.signature(found)
    kinds = {name: parameter.kind for name, parameter in signature.parameters.items()}
    if inspect.Parameter.VAR_KEYWORD not in kinds.values():
        allowed = [n for n, k in kinds.items() if k is not inspect.Parameter.VAR_POSITIONAL]
        unknown = [key for key in options if key not in allowed]
        if unknown:
            return [
                Problem(f"{path}.{key}", f"{name} has no option {key!r}.{nearest(key, allowed)}") for key in unknown
            ]
    try:
        signature.bind(**options)
    except TypeError as error:
        return [Problem(path, f"{name}: {error}")]
    return _check_stopper(path, options, stage) if name in STOPPERS else []


def _check_stopper(path: str, options: dict[str, Any], stage: dict[str, Any]) -> list[Problem]:
    """Check the options of early stopping; the only metrics are those of the stage's evaluation."""
    problems = []
    if options["dataloader_label"] != LABEL:
        what = (
            f"received {options['dataloader_label']!r}, allowed is {LABEL!r}: only the stage's evaluation has metrics"
        )
        problems.append(Problem(f"{path}.dataloader_label", what))
    if not METRIC.fullmatch(str(options["monitor"])):
        shares = ", ".join(f"evaluation/{share}/TYPE" for share in SHARES)
        allowed = f"evaluation/loss, {shares}; TYPE is a type of question, or all"
        problems.append(Problem(f"{path}.monitor", f"unknown metric {options['monitor']!r}; allowed: {allowed}"))
    if not PATIENCE.fullmatch(str(options.get("patience", "1ep"))):
        what = f"received {options['patience']!r}, allowed are epochs or batches, e.g. 2ep or 500ba"
        problems.append(Problem(f"{path}.patience", what))
    for key in ("threshold", "min_delta"):
        value = options.get(key, 0)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            problems.append(Problem(f"{path}.{key}", f"expected a finite number, received {value!r}"))
    if options.get("comp") not in (None, *COMPARISONS):
        allowed = ", ".join(COMPARISONS)
        problems.append(Problem(f"{path}.comp", f"received {options['comp']!r}, allowed are {allowed}"))
    if not stage.get("evaluation"):
        problems.append(Problem(path, "it needs the stage's key evaluation, whose metrics it watches"))
    return problems
