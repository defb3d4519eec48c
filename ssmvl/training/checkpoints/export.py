"""Export a run's checkpoint as a saved model, in one process (however many ranks wrote it) and without Composer."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from ssmvl.checkpoints.hub import user_path
from ssmvl.checkpoints.layouts import NATIVE_LAYOUT
from ssmvl.data.remote import is_remote
from ssmvl.errors import CheckpointError, RecipeError, short
from ssmvl.files import ABOUT_FILE
from ssmvl.model.blueprint import Blueprint
from ssmvl.model.build import require_same_model
from ssmvl.model.saved import save_folder
from ssmvl.recipes.binding import bind_part
from ssmvl.recipes.merge import Recipe
from ssmvl.training.checkpoints.composer_files import METADATA_FILE, model_tensors
from ssmvl.training.checkpoints.latest import CHECKPOINT, corruption, damage, latest_complete
from ssmvl.training.checkpoints.stores import BucketStore
from ssmvl.training.stage_prompts import prompts_of_stages, recipe_after

GIVE_RECIPE = "pass --recipe (in Python: recipe=) with the run folder, such as runs/NAME, or a recipe"


def find_checkpoint(name: str | Path, trust_pickle: bool = False) -> tuple[Path, list[str]]:
    """Resolve a user's path to a checkpoint. Writes nothing.

    Args:
        name: a checkpoint (a file or a directory of shards), or a stage's directory of checkpoints, for its latest
            complete one.
        trust_pickle: see `ssmvl.training.checkpoints.composer_files.read_index`.

    Returns:
        The checkpoint, and the problem of each newer, damaged one.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged.
    """
    path = user_path(name)
    if path.is_dir() and not CHECKPOINT.fullmatch(path.name) and not (path / METADATA_FILE).is_file():
        try:
            latest, skipped = latest_complete(path, trust_pickle)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error})") from error
        if latest is None:
            if (path / ABOUT_FILE).is_file():
                raise CheckpointError(f"{path} is already a saved model; load it with ssmvl.load")
            listed = "\n  ".join(skipped.values())
            what = f"no complete checkpoint:\n  {listed}" if skipped else "no checkpoint of a run"
            stages = "runs/NAME/STAGE/checkpoints (in a bucket: s3://BUCKET/DIR/NAME/STAGE)"
            one = "a checkpoint in it, such as ep0-ba500"
            allowed = f"pass the directory of a stage's checkpoints, such as {stages}, or {one}"
            raise CheckpointError(f"{path} holds {what}\n{allowed}" if skipped else f"{path} holds {what}; {allowed}")
        return latest, list(skipped.values())
    if not path.exists():
        advice = " on this machine; only s3:// URLs are read directly, so copy it here first"
        raise CheckpointError(f"{name}: no such file or directory{advice if is_remote(str(name)) else ''}")
    if path.suffix == ".safetensors":
        raise CheckpointError(f"{path} needs no export; load the directory of the saved model with ssmvl.load")
    if problem := damage(path, trust_pickle):
        raise CheckpointError(f"{path} {problem}")
    return path, []


def export(
    checkpoint: str | Path, out: str | Path, recipe: str | Path | Recipe | None = None, trust_pickle: bool = False
) -> tuple[str, list[str]]:
    """Save a checkpoint's model as a directory that `ssmvl.load` reads.

    Args:
        checkpoint: as in `find_checkpoint`, or the URL of either on S3 (or on `S3_ENDPOINT_URL`), such as
            `s3://BUCKET/DIR/NAME/STAGE`. A checkpoint at a URL is downloaded to a temporary directory (in `TMPDIR`)
            that is removed afterwards.
        out: the directory to write. It must be empty or new.
        recipe: the run's recipe or run folder. Default: the recipe in the checkpoint's run folder. Required for a URL.
        trust_pickle: if True, the index of a sharded checkpoint, which is a pickle, is read without restrictions and
            can execute arbitrary code. If False, an index that contains more than names, sizes and offsets is rejected.

    Returns:
        The path or URL of the exported checkpoint, and the problem of each newer, damaged one.

    Raises:
        CheckpointError: there is no checkpoint or no recipe, the checkpoint is damaged or rejected, its tensors are not
            those of the recipe's model, or `out` is not empty or cannot be written.
        RecipeError: the recipe has mistakes; lists all of them.
        RunError: the bucket cannot be reached, or there is no space for the download.
        MissingDependencyError: boto3, which buckets require, is not installed.
    """
    _require_empty(out)
    if str(checkpoint).startswith("s3://"):
        if recipe is None:
            raise CheckpointError(f"{checkpoint} is not in a run folder, so its recipe is unknown; {GIVE_RECIPE}")
        blueprint = Blueprint.of(recipe)  # find mistakes before the download
        _ = blueprint.processor
        with _downloaded(str(checkpoint), trust_pickle) as (path, name, skipped):
            tensors = _tensors(path, blueprint, trust_pickle)
            _save(out, tensors, _with_stage_prompt(blueprint, name))
        return name, skipped
    path, skipped = find_checkpoint(checkpoint, trust_pickle)
    blueprint = Blueprint.of(_recipe_of(path) if recipe is None else recipe)
    tensors = _tensors(path, blueprint, trust_pickle)
    require_same_model(_run_recipe(path), blueprint)
    _save(out, tensors, _with_stage_prompt(blueprint, str(path.absolute())))
    return str(path), skipped


def _with_stage_prompt(blueprint: Blueprint, checkpoint: str) -> Blueprint:
    """Return the blueprint with the prompt of the stage whose directory holds the checkpoint."""
    recipe = blueprint.recipe
    folders = [name for name in checkpoint.split("/")[-3:-1] if name in (recipe.data.get("stages") or {})]
    if not folders and (prompts := prompts_of_stages(recipe)):
        unknown = f"{checkpoint} is not in a stage's directory, so its training prompt is unknown; saving model.prompt"
        warnings.warn(f"{unknown}; {'; '.join(prompts)}", stacklevel=3)
    node = recipe_after(recipe, folders[-1]).data["model"]["prompt"] if folders else recipe.data["model"]["prompt"]
    if node == recipe.data["model"]["prompt"]:
        return blueprint
    prompt, problems = bind_part(node, "prompt", "model.prompt")
    if problems:
        raise RecipeError(problems, recipe.source)
    return blueprint.with_prompt(prompt)


def _save(out: str | Path, tensors: dict[str, Tensor], blueprint: Blueprint) -> None:
    save_folder(out, tensors, blueprint, blueprint.processor)


def _tensors(path: Path, blueprint: Blueprint, trust_pickle: bool) -> dict[str, Tensor]:
    """Return the tensors to save. The checkpoint must contain exactly the model's tensors."""
    if problem := corruption(path):
        raise CheckpointError(f"{path} {problem}")
    tensors = model_tensors(path, trust_pickle)
    NATIVE_LAYOUT.check(blueprint.model, tensors, f"{path}, with the recipe {blueprint.recipe.source},")
    return {name: tensors[name] for name in NATIVE_LAYOUT.sources(blueprint.model)}


@contextmanager
def _downloaded(url: str, trust_pickle: bool) -> Iterator[tuple[Path, str, list[str]]]:
    """Download a checkpoint from a bucket; yield its path, its URL, and the problem of each newer, damaged one."""
    parent, _, last = url.rstrip("/").rpartition("/")
    stage, name = (parent, last) if CHECKPOINT.fullmatch(last) else (url.rstrip("/"), "")
    store = BucketStore(stage)
    with store.outline(name) as outline:
        try:
            path, skipped = find_checkpoint(outline / name, trust_pickle)
            store.fetch(path)
            find_checkpoint(path, trust_pickle)  # a run may have overwritten or removed it in the meantime
            yield path, f"{stage}/{path.name}", [text.replace(str(outline), stage) for text in skipped]
        except CheckpointError as error:
            raise CheckpointError(str(error).replace(str(outline), stage)) from error


def _require_empty(out: str | Path) -> None:
    try:
        names = sorted(path.name for path in user_path(out).iterdir())
    except (FileNotFoundError, NotADirectoryError):  # `save_folder` raises an error if a file is in the way
        return
    except OSError as error:
        raise CheckpointError(f"{out} cannot be read ({error})") from error
    if names:
        what = f"{out} holds {short(', '.join(names))}"
        raise CheckpointError(f"{what}; nothing is overwritten: choose an empty or new directory")


def _run_recipe(checkpoint: Path) -> Path:
    """Return the path of the run's recipe, `RUN/recipe.yaml`, for a checkpoint `RUN/STAGE/checkpoints/NAME`."""
    parents = checkpoint.absolute().parents
    return parents[min(2, len(parents) - 1)] / "recipe.yaml"


def _recipe_of(checkpoint: Path) -> Path:
    path = _run_recipe(checkpoint)
    if not path.is_file():
        what = f"{checkpoint} is not in a run folder ({path} does not exist)"
        raise CheckpointError(f"{what}, so its recipe is unknown; {GIVE_RECIPE}")
    return path
