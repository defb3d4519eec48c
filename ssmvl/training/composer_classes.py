"""Composer's callbacks and loggers: lookup by name and checks of options. Imports Composer only when used."""

from __future__ import annotations

import importlib
import inspect
import math
import re
from collections.abc import Collection, Mapping
from importlib import metadata
from importlib.util import find_spec
from typing import Any, Literal

from packaging.requirements import Requirement

from ssmvl.errors import Problem, nearest

LABEL = "evaluation"  # prefix of the metrics that a stage's evaluation logs
SHARES = ("accuracy", "blind", "swapped")
METRIC = re.compile(rf"evaluation/(loss|({'|'.join(SHARES)})/(?P<type>.+))")
PATIENCE = re.compile(r"\d+(ep|ba)?")
EXTRAS = {"WandBLogger": "wandb", "MLFlowLogger": "mlflow"}  # loggers whose packages are an extra of ssmvl
COMPARISONS = ("less", "lt", "greater", "gt")
STOPPERS = ("EarlyStopper", "ThresholdStopper")
REJECTED = {
    "CheckpointSaver": "a stage already has one; set its keys checkpoint and keep, and the recipe's checkpoints",
    "ActivationMonitor": "it cannot handle connectors, because one of their inputs is a Grid",
    "ExportForInferenceCallback": "it cannot trace a model that reads ragged batches; see ssmvl export",
    "Generate": "it needs a transformers model; see the stage's key evaluation",
    "ImageVisualizer": "it cannot read a ragged batch; see ssmvl data inspect --png",
    "LoadCheckpoint": "it would overwrite the weights of a resumed stage; see the stage's key init_from",
    "MLPerfCallback": "it runs in Composer's evaluation loop, which a stage does not use",
    "Logger": "it is not a log destination; use one, such as FileLogger",
    "LoggerDestination": "it is the base class of all loggers and logs nothing; use a subclass, such as FileLogger",
    "InMemoryLogger": "its logs are lost when training ends; use another logger, such as FileLogger",
    "MosaicMLLogger": "it logs to the MosaicML platform only",
}


def unknown_types(callbacks: Mapping[str, Any], types: Collection[str]) -> list[str]:
    """Return the monitored metrics whose question type is not in the evaluation set.

    Args:
        callbacks: options of a stage's callbacks, by class name.
        types: question types of the evaluation set.
    """
    monitored = [str((callbacks.get(name) or {}).get("monitor", "")) for name in STOPPERS]
    matches = [match for match in map(METRIC.fullmatch, monitored) if match]
    return [match.group() for match in matches if match["type"] not in (None, "all", *types)]


def composer_class(kind: Literal["callbacks", "loggers"], name: str) -> Any:
    """Return the class of this name in `composer.callbacks` or `composer.loggers`, or None."""
    return getattr(importlib.import_module(f"composer.{kind}"), name, None)


def check_composer(path: str, stage: dict[str, Any], notes: list[str]) -> list[Problem]:
    """Check the names and options of a stage's callbacks and loggers, if Composer is installed."""
    problems = []
    for kind in ("callbacks", "loggers"):
        entries = stage.get(kind)
        if not isinstance(entries, dict) or not entries:
            continue
        if find_spec("composer") is None:
            notes.append(f"{path}.{kind}: not checked, Composer is not installed")
            continue
        for name, options in entries.items():
            problems += _check_call(f"{path}.{kind}.{name}", kind, str(name), options or {}, stage)
    return problems


def _missing_packages(extra: str) -> str:
    """The requirements of an extra that are not met, with the installed versions; empty if all are."""
    unmet = []
    for requirement in map(Requirement, metadata.requires("ssmvl") or ()):
        if requirement.marker is None or not requirement.marker.evaluate({"extra": extra}):
            continue
        try:
            installed = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            unmet.append(f"{requirement.name}{requirement.specifier}")
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            unmet.append(f"{requirement.name}{requirement.specifier} ({installed} is installed)")
    return ", ".join(unmet)


def _check_call(path: str, kind: Any, name: str, options: Any, stage: dict[str, Any]) -> list[Problem]:
    if name in REJECTED:
        return [Problem(path, REJECTED[name])]
    if name in EXTRAS and (missing := _missing_packages(EXTRAS[name])):
        return [Problem(path, f"needs {missing}: pip install 'ssmvl[{EXTRAS[name]}]'")]
    cls = composer_class(kind, name)
    if not inspect.isclass(cls):
        classes = vars(importlib.import_module(f"composer.{kind}")).items()
        names = [n for n, c in classes if inspect.isclass(c) and n not in REJECTED]
        return [Problem(path, f"composer.{kind} has no class {name!r}.{nearest(name, names)}")]
    if not isinstance(options, dict):
        return [Problem(path, f"expected a mapping of options, received {options!r}")]
    signature = inspect.signature(cls)
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
    """Check the options of early stopping, which can monitor only metrics of the stage's evaluation."""
    problems = []
    if options["dataloader_label"] != LABEL:
        what = f"received {options['dataloader_label']!r}, allowed: {LABEL!r}; only the stage's evaluation has metrics"
        problems.append(Problem(f"{path}.dataloader_label", what))
    if not METRIC.fullmatch(str(options["monitor"])):
        shares = ", ".join(f"evaluation/{share}/TYPE" for share in SHARES)
        allowed = f"evaluation/loss, {shares}; TYPE is a question type, or all"
        problems.append(Problem(f"{path}.monitor", f"unknown metric {options['monitor']!r}; allowed: {allowed}"))
    if not PATIENCE.fullmatch(str(options.get("patience", "1ep"))):
        what = f"received {options['patience']!r}, allowed: epochs or batches, e.g. 2ep or 500ba"
        problems.append(Problem(f"{path}.patience", what))
    for key in ("threshold", "min_delta"):
        value = options.get(key, 0)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            problems.append(Problem(f"{path}.{key}", f"expected a finite number, received {value!r}"))
    if options.get("comp") not in (None, *COMPARISONS):
        allowed = ", ".join(COMPARISONS)
        problems.append(Problem(f"{path}.comp", f"received {options['comp']!r}, allowed: {allowed}"))
    if not stage.get("evaluation"):
        problems.append(Problem(path, "it needs the stage's key evaluation, whose metrics it monitors"))
    return problems
