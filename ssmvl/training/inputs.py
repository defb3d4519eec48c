"""The files that a recipe reads: pretrained weights and datasets, opened before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from ssmvl.checkpoints.hub import HUB_FILE, ID
from ssmvl.data.opening import open_data
from ssmvl.data.shards import require_streaming
from ssmvl.errors import CheckpointError, MissingDependencyError, Problem, SsmvlError
from ssmvl.model.blueprint import Blueprint
from ssmvl.model.build import opened_weights
from ssmvl.model.loading import UNWRAP, open_part, parts_with_weights
from ssmvl.processing.processor import Processor
from ssmvl.training.schema import Plan


def weights_problems(blueprint: Blueprint, plan: Plan, *, ask_hub: bool, notes: list[str]) -> list[Problem]:
    """What is wrong with the files that the stages start from.

    Args:
        blueprint: of the model.
        plan: the recipe.
        ask_hub: whether ids are looked up in the hub; else a note says that they were not.
        notes: get a line for each file that was not opened, because it would have to be fetched.
    """
    problems: list[Problem] = []
    for number, (stage, options) in enumerate(plan.stages.items()):
        start = options.init_from or ("none" if number else "recipe")
        if start == "recipe":
            parts = parts_with_weights(blueprint.model)
            named = {f"model.{part}.weights": (part, weights) for part, weights in parts.items()}
        else:
            named = {} if start == "none" else {f"stages.{stage}.init_from": ("", start)}
        for path, (part, name) in named.items():
            if not _is_in_hub(name):
                try:
                    if part:
                        opened = open_part(blueprint.model, part, verify=False)
                        opened.check(blueprint.model.get_submodule(part))
                    else:
                        opened_weights(blueprint, name, verify=False)
                except CheckpointError as error:
                    problems.append(Problem(path, str(error)))
            elif not ask_hub:
                notes.append(f"{path}: not checked, training fetches {name.removeprefix(HUB_FILE)} from the hub")
            elif why := _not_in_hub("/".join(name.removeprefix(HUB_FILE).split("/")[:2])):
                problems.append(Problem(path, why))
    return problems


def _is_in_hub(name: str) -> bool:
    name = name.removeprefix(UNWRAP)
    path = Path(name).expanduser()
    return name.startswith(HUB_FILE) or bool(ID.fullmatch(name) and not path.exists() and not path.parent.is_dir())


def _not_in_hub(repo: str) -> str:
    """Why a repository cannot be used; empty if it can."""
    try:
        HfApi().model_info(repo)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        return f"{repo}: no such path here, and not a model that the hub gives ({type(error).__name__})"
    return ""


def data_problems(plan: Plan, processors: Mapping[str, Processor]) -> list[Problem]:
    """What is wrong with the datasets: shards are found, fetched or written, and the first record is read.

    Args:
        plan: the recipe.
        processors: of each stage.
    """
    try:
        require_streaming()
    except MissingDependencyError as error:
        return [Problem("stages", str(error))]
    from ssmvl.data.streams import first_record

    asked = {f"stages.{name}.data": (stage.data, "train") for name, stage in plan.stages.items()}
    asked |= {
        f"stages.{name}.evaluation.data": (stage.evaluation.data, "test")
        for name, stage in plan.stages.items()
        if stage.evaluation
    }
    if plan.evaluation:
        asked["evaluation.data"] = (plan.evaluation.data, "test")
    problems = []
    for path, (dataset, split) in asked.items():
        try:
            record = first_record(open_data(dataset, split))
            if split == "train":
                processors[path.split(".")[1]].encode(record["conversation"], record["images"], train=True)
        except SsmvlError as error:
            problems.append(Problem(path, str(error)))
    return problems
