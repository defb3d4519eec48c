"""Sources of an encoder's weights: a safetensors file, a Hub tag, or a downloaded directory."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ssmvl._moved import moved_name
from ssmvl.checkpoints.hub import HUB_FILE
from ssmvl.errors import CheckpointError, ContractError, nearest

__all__ = ["Trained", "parse_weights", "resolve_tag", "weights_path", "require_statistics", "similar"]

if not TYPE_CHECKING:
    __getattr__ = partial(moved_name, __name__)

FAILURES = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError)  # of third-party code
LOCAL_DIR, SUFFIX = "local-dir:", ".safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".tar", ".pkl", ".npz", ".npy")


class Source(NamedTuple):
    """The parsed `weights` option of an encoder: none, a file, a tag, or a directory."""

    kind: Literal["none", "file", "tag", "folder"]
    value: str = ""


class Trained(NamedTuple):
    """The settings with which a tag's weights were trained and that an encoder must share."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    quick: bool  # QuickGELU in place of GELU


def parse_weights(weights: str, tags: Collection[str], model: str) -> Source:
    """Parse the `weights` option, without checking that anything exists.

    Args:
        weights: `none`, a safetensors file, one of `tags`, or `local-dir:DIRECTORY`.
        tags: tags of the model's pretrained weights in its library.
        model: name of the model in its library, for messages.

    Raises:
        ContractError: `weights` is none of these.
    """
    if weights == "none":
        return Source("none")
    if weights.startswith(LOCAL_DIR) and weights != LOCAL_DIR:
        return Source("folder", weights.removeprefix(LOCAL_DIR))
    if weights.endswith(SUFFIX):
        return Source("file", weights)
    if weights.endswith(PICKLES):
        raise ContractError(
            f"weights {weights!r}: only *{SUFFIX} files are read, because a pickle can run arbitrary code; "
            f"save its tensors as safetensors"
        )
    if weights not in tags:
        raise ContractError(
            f"weights must be none, a *{SUFFIX} file, {LOCAL_DIR}DIRECTORY or a tag of {model!r}, received {weights!r}."
            + nearest(weights, tags)
        )
    return Source("tag", weights)


def resolve_tag(source: Source, tag: str, model: str, stem: str, trained: Mapping[str, Trained], quick: bool) -> str:
    """The tag that determines mean, std and activation; empty for the library's default.

    Args:
        source: the parsed `weights` option.
        tag: the tag in the `model` option, or "".
        model: the `model` option.
        stem: prefix of names with a tag, for messages.
        trained: settings of the model's pretrained weights, by tag.
        quick: True if the model uses QuickGELU.

    Raises:
        ContractError: two different tags are named, or a file is given without a tag and the tags' settings differ.
    """
    if source.kind == "tag":
        if tag not in ("", source.value):
            raise ContractError(f"model {model!r} and weights {source.value!r} name different tags; remove one")
        return source.value
    needs = {*trained.values()}
    if source.kind == "file" and not tag and (len(needs) > 1 or any(need.quick != quick for need in needs)):
        raise ContractError(
            f"the tags of {model!r} differ in mean, std or QuickGELU, and {source.value} does not state which it "
            f"needs, so answers could be silently wrong; add the tag that its training started from, "
            f"model: {stem}TAG with one of {', '.join(trained)}"
        )
    return tag


def weights_path(source: Source, hub: Callable[[], tuple[str, str]], file: str) -> str:
    """The `weights` attribute of an encoder. Opens no file.

    Args:
        source: the parsed `weights` option.
        hub: returns the repository of a tag and the file in it.
        file: name of the weights in a directory.
    """
    if source.kind == "folder":
        return f"{source.value}/{file}"
    return HUB_FILE + "/".join(hub()) if source.kind == "tag" else source.value or "none"


def similar(name: str, names: Collection[str]) -> str:
    """The names most similar to an unknown one, for messages; a library has too many models to list."""
    return ", ".join(difflib.get_close_matches(name, names, n=5, cutoff=0.4)) or "none"


def require_statistics(
    config: Mapping[str, Any],
    mean: Sequence[float],
    std: Sequence[float],
    stem: str,
    trained: Mapping[str, Trained],
) -> None:
    """Reject weights that were trained with another pixel normalization.

    Args:
        config: the part of a directory's config that may contain `mean` and `std`.
        mean: the encoder's.
        std: the encoder's.
        stem: prefix of names with a tag, for messages.
        trained: settings of the weights that fit the model, by tag.

    Raises:
        CheckpointError: mean or std differ; names the tags whose values match.
    """
    stated = tuple(config.get("mean", mean)), tuple(config.get("std", std))
    if stated != (tuple(mean), tuple(std)):
        tags = [tag for tag, need in trained.items() if (need.mean, need.std) == stated]
        hint = f"write model: {stem}TAG with one of {', '.join(tags)}" if tags else f"no tag {stem}TAG has these values"
        raise CheckpointError(
            f"the config next to it states mean {stated[0]} and std {stated[1]}, "
            f"but the encoder has {tuple(mean)} and {tuple(std)}; {hint}"
        )
