"""A saved model out of a checkpoint that a run wrote: on one machine, without Composer and without its ranks."""

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
from ssmvl.training.checkpoints.newest import CHECKPOINT, corruption, damage, newest_whole
from ssmvl.training.checkpoints.stores import BucketStore
from ssmvl.training.stage_prompts import prompts_of_stages, recipe_after

GIVE_RECIPE = "give it with --recipe: the run folder, such as runs/NAME, or a recipe (in Python recipe=)"


def find_checkpoint(name: str | Path, trust_pickle: bool = False) -> tuple[Path, list[str]]:
    """The checkpoint that a user means; nothing is changed.

    Args:
        name: a checkpoint, of one file or a folder of shards; or a stage's folder of checkpoints, for the newest
            that is whole.
        trust_pickle: see `ssmvl.training.checkpoints.composer_files.read_index`.

    Returns:
        The checkpoint, and what is wrong with newer ones.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = user_path(name)
    if path.is_dir() and not CHECKPOINT.fullmatch(path.name) and not (path / METADATA_FILE).is_file():
        try:
            newest, passed = newest_whole(path, trust_pickle)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error})") from error
        if newest is None:
            if (path / ABOUT_FILE).is_file():
                raise CheckpointError(f"{path} is a saved model already: ssmvl.load reads it")
            what = "no whole checkpoint:\n  " + "\n  ".join(passed.values()) if passed else "no checkpoint of a run"
            stages = "runs/NAME/STAGE/checkpoints (in a bucket s3://BUCKET/FOLDER/NAME/STAGE)"
            allowed = f"name a stage's folder, such as {stages}, or one in it, such as ep0-ba500"
            raise CheckpointError(f"{path} holds {what}\n{allowed}" if passed else f"{path} holds {what}; {allowed}")
        return newest, list(passed.values())
    if not path.exists():
        advice = " on this machine; of buckets s3:// is read, copy it here first" if is_remote(str(name)) else ""
        raise CheckpointError(f"{name}: no such file or folder{advice}")
    if path.suffix == ".safetensors":
        raise CheckpointError(f"{path} holds weights that need no export: ssmvl.load reads the folder of a saved model")
    if why := damage(path, trust_pickle):
        raise CheckpointError(f"{path} {why}")
    return path, []


def export(
    checkpoint: str | Path, out: str | Path, recipe: str | Path | Recipe | None = None, trust_pickle: bool = False
) -> tuple[str, list[str]]:
    """Save the model of a checkpoint as a folder that `ssmvl.load` reads.

    Args:
        checkpoint: see `find_checkpoint`; or the URL of either in S3 (or what `S3_ENDPOINT_URL` names), as a run
            named it. The one that is read is fetched to where temporary files lie (`TMPDIR`), and removed again.
        out: the folder; empty, or not there yet.
        recipe: of the run; by default the one in the run folder that the checkpoint lies in. A URL needs it.
        trust_pickle: whether the index of a sharded checkpoint, which is a pickle, is read whatever it holds: that may
            run any code. Without it, what holds more than names, sizes and places of tensors is refused.

    Returns:
        The checkpoint that was read, and what is wrong with newer ones.

    Raises:
        CheckpointError: there is none, it is damaged or refused, no recipe was found, the model of the recipe has other
            tensors, or `out` is not empty or cannot be written.
        RecipeError: every mistake of the recipe.
        RunError: the bucket cannot be reached, or there is no room for what is fetched.
        MissingDependencyError: boto3, which a bucket needs, is not installed.
    """
    _require_free(out)
    if str(checkpoint).startswith("s3://"):
        if recipe is None:
            raise CheckpointError(f"{checkpoint} does not lie in a run folder, so its recipe is unknown; {GIVE_RECIPE}")
        made = Blueprint.of(recipe)  # before much is fetched
        _ = made.processor
        with _fetched(str(checkpoint), trust_pickle) as (path, name, passed):
            tensors = _tensors(path, made, trust_pickle)
            _save(out, tensors, _trained(made, name))
        return name, passed
    path, passed = find_checkpoint(checkpoint, trust_pickle)
    made = Blueprint.of(_recipe_of(path) if recipe is None else recipe)
    tensors = _tensors(path, made, trust_pickle)
    require_same_model(_run_recipe(path), made)
    _save(out, tensors, _trained(made, str(path.absolute())))
    return str(path), passed


def _trained(blueprint: Blueprint, checkpoint: str) -> Blueprint:
    """The recipe with the prompt of the stage whose folder a checkpoint lies in."""
    recipe = blueprint.recipe
    folders = [name for name in checkpoint.split("/")[-3:-1] if name in (recipe.data.get("stages") or {})]
    if not folders and (prompts := prompts_of_stages(recipe)):
        unknown = f"{checkpoint} is not in a stage's folder, so its prompt is unknown and model.prompt is saved"
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


def _tensors(path: Path, made: Blueprint, trust_pickle: bool) -> dict[str, Tensor]:
    """What the model is saved with, of a checkpoint that has that and nothing else."""
    if why := corruption(path):
        raise CheckpointError(f"{path} {why}")
    tensors = model_tensors(path, trust_pickle)
    NATIVE_LAYOUT.check(made.model, tensors, f"{path}, with the recipe {made.recipe.source},")
    return {name: tensors[name] for name in NATIVE_LAYOUT.sources(made.model)}


@contextmanager
def _fetched(url: str, trust_pickle: bool) -> Iterator[tuple[Path, str, list[str]]]:
    """A checkpoint of a bucket on this machine, its URL, and what is wrong with newer ones."""
    parent, _, last = url.rstrip("/").rpartition("/")
    stage, name = (parent, last) if CHECKPOINT.fullmatch(last) else (url.rstrip("/"), "")
    store = BucketStore(stage)
    with store.outline(name) as outline:
        try:
            path, passed = find_checkpoint(outline / name, trust_pickle)
            store.fetch(path)
            find_checkpoint(path, trust_pickle)  # a run may have written or removed it meanwhile
            yield path, f"{stage}/{path.name}", [text.replace(str(outline), stage) for text in passed]
        except CheckpointError as error:
            raise CheckpointError(str(error).replace(str(outline), stage)) from error


def _require_free(out: str | Path) -> None:
    try:
        taken = sorted(path.name for path in user_path(out).iterdir())
    except (FileNotFoundError, NotADirectoryError):  # a file in the way is told where the folder is written
        return
    except OSError as error:
        raise CheckpointError(f"{out} cannot be read ({error})") from error
    if taken:
        what = f"{out} holds {short(', '.join(taken))}"
        raise CheckpointError(f"{what}; nothing there is replaced: name a folder that is empty or not there yet")


def _run_recipe(checkpoint: Path) -> Path:
    """Where a run folder has its recipe: beside the folder of the stage whose `checkpoints` it lies in."""
    places = checkpoint.absolute().parents
    return places[min(2, len(places) - 1)] / "recipe.yaml"


def _recipe_of(checkpoint: Path) -> Path:
    path = _run_recipe(checkpoint)
    if not path.is_file():
        what = f"{checkpoint} does not lie in a run folder ({path} is not there)"
        raise CheckpointError(f"{what}, so its recipe is unknown; {GIVE_RECIPE}")
    return path
