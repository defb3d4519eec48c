"""Check the files that a recipe reads, pretrained weights and datasets, before training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from huggingface_hub import HfApi, snapshot_download

from ssmvl.checkpoints.hub import HUB_FILE, ID, user_path
from ssmvl.data.opening import open_data, require_batch
from ssmvl.data.shards import require_streaming
from ssmvl.errors import CheckpointError, DataError, MissingDependencyError, Problem, SsmvlError
from ssmvl.model.blueprint import Blueprint
from ssmvl.model.build import opened_weights
from ssmvl.model.loading import UNWRAP, open_part, parts_with_weights
from ssmvl.processing.processor import Processor
from ssmvl.processing.tokenizers import local_tokenizer
from ssmvl.training.schema import Plan


def weights_problems(blueprint: Blueprint, plan: Plan, *, ask_hub: bool, notes: list[str]) -> list[Problem]:
    """Return mistakes in the weight files that the stages start from.

    Args:
        blueprint: the blueprint of the model.
        plan: the recipe.
        ask_hub: whether to look up ids on the Hub; if not, a note says that they were not checked.
        notes: receives a line for each file that was not opened because it would have to be downloaded.
    """
    problems: list[Problem] = []
    for number, (stage, options) in enumerate(plan.stages.items()):
        start = options.init_from or ("none" if number else "recipe")
        if start == "recipe":
            parts = parts_with_weights(blueprint.model)
            sources = {f"model.{part}.weights": (part, weights) for part, weights in parts.items()}
        else:
            sources = {} if start == "none" else {f"stages.{stage}.init_from": ("", start)}
        for path, (part, name) in sources.items():
            if not _is_on_hub(name):
                try:
                    if part:
                        open_part(blueprint.model, part, verify=False).check(blueprint.model.get_submodule(part))
                    else:
                        opened_weights(blueprint, name, verify=False)
                except CheckpointError as error:
                    problems.append(Problem(path, str(error)))
            elif not ask_hub:
                repo = name.removeprefix(UNWRAP).removeprefix(HUB_FILE)
                notes.append(f"{path}: not checked, {repo} is downloaded from the hub when training starts")
            elif reason := _missing_on_hub(_repository(name)):
                problems.append(Problem(path, reason))
    tokenizer = blueprint.parts.tokenizer
    if ask_hub and local_tokenizer(tokenizer) is None and (reason := _missing_on_hub(tokenizer)):
        problems.append(Problem("model.tokenizer", reason))
    return problems


def _repository(name: str) -> str:
    """Return `owner/model` for an id, or for a single file on the Hub."""
    return "/".join(name.removeprefix(UNWRAP).removeprefix(HUB_FILE).split("/")[:2])


def _is_on_hub(name: str) -> bool:
    """Return True if a name is a Hub id, False if it is a local path."""
    name = name.removeprefix(UNWRAP)
    if name.startswith(HUB_FILE) or not ID.fullmatch(name):
        return name.startswith(HUB_FILE)
    path = user_path(name)
    return not path.exists() and not path.parent.is_dir()


def _missing_on_hub(repo: str) -> str:
    """Return the reason why a repository cannot be used; empty if it can be, or is in the Hub's cache."""
    try:
        snapshot_download(repo, local_files_only=True)
    except (OSError, ValueError):
        try:
            HfApi().model_info(repo)
        except (OSError, ValueError) as error:  # Hub errors are OSErrors, a malformed id is a ValueError
            return f"{repo} is neither a local path nor a model on the hub ({type(error).__name__})"
    return ""


def data_problems(plan: Plan, processors: Mapping[str, Processor]) -> list[Problem]:
    """Return mistakes in the datasets: shards are located, downloaded or written, and the first record is read.

    Args:
        plan: the recipe.
        processors: the processor of each stage, by name.
    """
    try:
        require_streaming()
    except MissingDependencyError as error:
        return [Problem("stages", str(error))]
    from ssmvl.data.streams import first_record

    problems = []
    for name, stage in plan.stages.items():
        path = f"stages.{name}.data"
        try:
            data = open_data(stage.data, "train")
            require_batch(data, stage.batch, f"stages.{name}.batch")
            record = first_record(data)
            with _named_in_errors(record):
                processors[name].encode(record["conversation"], record["images"], train=True)
        except SsmvlError as error:
            problems.append(Problem(path, str(error)))
    evaluations = {f"stages.{name}.evaluation": stage.evaluation for name, stage in plan.stages.items()}
    for path, evaluation in {**evaluations, "evaluation": plan.evaluation}.items():
        try:
            if evaluation is not None:
                first_record(open_data(evaluation.data, "test"))
        except SsmvlError as error:
            problems.append(Problem(f"{path}.data", str(error)))
    return problems


@contextmanager
def _named_in_errors(record: Mapping[str, Any]) -> Iterator[None]:
    try:
        yield
    except SsmvlError as error:
        raise DataError(f"record {record['id']!r}: {error}") from error
