"""Where an encoder's weights come from: a safetensors file, a tag in the hub, or a folder that was downloaded."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from ssmvl.checkpoints import read_tensors
from ssmvl.checkpoints.foreign import read_json
from ssmvl.checkpoints.hub import hub_file, user_path
from ssmvl.checkpoints.modules import module_settings
from ssmvl.errors import CheckpointError, ContractError, nearest

__all__ = ["Trained", "parse_weights", "settled_tag", "weights_file", "require_statistics", "similar"]

WeightsFile = Callable[[], Path]
"""Gives the safetensors file of an encoder's weights; called when they are loaded, and only then may it fetch it."""

FAILURES = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError)  # of other people's code
LOCAL_DIR, SUFFIX = "local-dir:", ".safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".tar", ".pkl", ".npz", ".npy")


class Source(NamedTuple):
    """What the option `weights` of an encoder says: nothing, a file, a tag, or a folder."""

    kind: Literal["none", "file", "tag", "folder"]
    value: str = ""


class Trained(NamedTuple):
    """What an encoder must have in common with the one whose weights a tag names."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    quick: bool  # QuickGELU in place of GELU


def parse_weights(weights: str, tags: Collection[str], model: str) -> Source:
    """Tell apart what `weights` may be; nothing is looked for.

    Args:
        weights: `none`, a safetensors file, one of `tags`, or `local-dir:FOLDER`.
        tags: names of the pretrained weights that the model's library has for it.
        model: its name there, for messages.

    Raises:
        ContractError: it is none of these.
    """
    if weights == "none":
        return Source("none")
    if weights.startswith(LOCAL_DIR) and weights != LOCAL_DIR:
        return Source("folder", weights.removeprefix(LOCAL_DIR))
    if weights.endswith(SUFFIX):
        return Source("file", weights)
    if weights.endswith(PICKLES):
        raise ContractError(
            f"weights {weights!r}: only *{SUFFIX} is read, because reading a pickle can run any code; "
            f"save its tensors as safetensors"
        )
    if weights not in tags:
        raise ContractError(
            f"weights {weights!r} are neither none, a *{SUFFIX} file, {LOCAL_DIR}FOLDER nor a tag of {model!r}."
            + nearest(weights, tags)
        )
    return Source("tag", weights)


def settled_tag(source: Source, tag: str, model: str, stem: str, trained: Mapping[str, Trained], quick: bool) -> str:
    """The tag that decides mean, std and activation; empty for the library's default.

    Args:
        source: what `weights` says.
        tag: what `model` says.
        model: as written.
        stem: of the names with a tag, for messages.
        trained: the model's weights, by tag.
        quick: whether the model has QuickGELU.

    Raises:
        ContractError: two tags are named; or none, beside a file, and the tags differ in what they need.
    """
    if source.kind == "tag":
        if tag not in ("", source.value):
            raise ContractError(f"model {model!r} and weights {source.value!r} name two tags; write one")
        return source.value
    needs = {*trained.values()}
    if source.kind == "file" and not tag and (len(needs) > 1 or any(need.quick != quick for need in needs)):
        raise ContractError(
            f"the tags of {model!r} differ in mean, std or QuickGELU, and {source.value} does not say which it needs: "
            f"answers might be silently wrong; write the tag that its training started from, model: {stem}TAG with one "
            f"of {', '.join(trained)}"
        )
    return tag


def weights_file(
    source: Source,
    hub: Callable[[], tuple[str, str]],
    names: tuple[str, str],
    agrees: Callable[[Path, Mapping[str, Any]], None],
) -> WeightsFile | None:
    """What gives an encoder's weights when they are loaded; None for none. Nothing is looked for now.

    Args:
        source: what `weights` says.
        hub: gives the repository of its tag, and the file there.
        names: of the config and of the weights in a folder.
        agrees: raises CheckpointError if the config in a folder, given with its path, is not the encoder's.
    """
    if source.kind == "none":
        return None
    if source.kind == "file":
        return partial(user_path, source.value)
    return partial(_from_folder, source.value, names, agrees) if source.kind == "folder" else partial(hub_file, *hub())


def _from_folder(folder: str, names: tuple[str, str], agrees: Callable[[Path, Mapping[str, Any]], None]) -> Path:
    path = folder_file(folder, names[0])
    config = read_json(path)
    with adapting(path):
        agrees(path, config)
    return folder_file(folder, names[1])


def similar(name: str, names: Collection[str]) -> str:
    """The names most like an unknown one, for messages: a library has too many to list."""
    return ", ".join(difflib.get_close_matches(name, names, n=5, cutoff=0.4)) or "none"


def folder_file(folder: str, name: str) -> Path:
    """A file of a downloaded folder.

    Raises:
        CheckpointError: the folder or the file is not there.
    """
    path = user_path(folder) / name
    if not path.is_file():
        found = ", ".join(sorted(p.name for p in path.parent.iterdir())) if path.parent.is_dir() else "no such folder"
        raise CheckpointError(f"{path.parent} must hold {name}; pickles are not read. Found: {found or 'nothing'}")
    return path


def require_statistics(
    path: Path,
    config: Mapping[str, Any],
    mean: Sequence[float],
    std: Sequence[float],
    stem: str,
    trained: Mapping[str, Trained],
) -> None:
    """Refuse weights that were trained on pixels normalised otherwise.

    Args:
        path: of the config, for messages.
        config: its part that may hold `mean` and `std`.
        mean: of the encoder.
        std: of the encoder.
        stem: of the names with a tag, for messages.
        trained: the weights that go with the model, by tag.

    Raises:
        CheckpointError: they differ; names the tags that have theirs.
    """
    found = tuple(config.get("mean", mean)), tuple(config.get("std", std))
    if found != (tuple(mean), tuple(std)):
        tags = [tag for tag, need in trained.items() if (need.mean, need.std) == found]
        hint = f"write model: {stem}TAG with one of {', '.join(tags)}" if tags else f"no tag {stem}TAG has those"
        raise CheckpointError(
            f"{path}: mean is {found[0]} and std {found[1]}, the encoder has {tuple(mean)} and {tuple(std)}; {hint}"
        )


def require_settings(path: Path, theirs: nn.Module, own: nn.Module, what: str, ignored: Callable[[str], bool]) -> None:
    """Refuse weights of a model that computes otherwise with tensors of the same shapes.

    Args:
        path: of the config, for messages.
        theirs: built as the config says.
        own: built as the encoder is; both may be on `meta`.
        what: theirs, for messages.
        ignored: whether a module of that name, or a value in it, may differ.

    Raises:
        CheckpointError: they differ in the kind of a module or in a value that one keeps.
    """
    found, needed = module_settings(theirs), module_settings(own)
    for name in sorted(found.keys() | needed.keys()):
        if found.get(name) != needed.get(name) and not ignored(name):
            raise CheckpointError(
                f"{path}: its weights are those of {what}, whose {name} is {found.get(name)!r}; "
                f"the encoder has {needed.get(name)!r}"
            )


def read_under(path: Path, prefix: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file whose names start with `prefix`, without it.

    Raises:
        CheckpointError: the file is missing or damaged, or there are none.
    """
    tensors, _ = read_tensors(path)
    found = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    if not found:
        raise CheckpointError(f"{path}: holds no tensor named {prefix}*, but {', '.join(sorted(tensors)[:5])}, …")
    return found


@contextmanager
def adapting(path: Path) -> Iterator[None]:
    """Make a readable error of what fails while a file's contents are fitted to a model.

    Raises:
        CheckpointError: anything failed.
    """
    try:
        yield
    except CheckpointError:
        raise
    except FAILURES as error:
        raise CheckpointError(f"{path}: does not fit the model ({type(error).__name__}: {error})") from error
