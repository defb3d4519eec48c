"""Where an encoder's weights come from: a safetensors file, a tag in the hub, or a folder that was downloaded."""

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


def resolve_tag(source: Source, tag: str, model: str, stem: str, trained: Mapping[str, Trained], quick: bool) -> str:
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


def weights_path(source: Source, hub: Callable[[], tuple[str, str]], file: str) -> str:
    """The `weights` attribute of an encoder; nothing is opened.

    Args:
        source: what the option says.
        hub: gives the repository of a tag, and the file there.
        file: name of the weights in a folder.
    """
    if source.kind == "folder":
        return f"{source.value}/{file}"
    return HUB_FILE + "/".join(hub()) if source.kind == "tag" else source.value or "none"


def similar(name: str, names: Collection[str]) -> str:
    """The names most like an unknown one, for messages: a library has too many to list."""
    return ", ".join(difflib.get_close_matches(name, names, n=5, cutoff=0.4)) or "none"


def require_statistics(
    config: Mapping[str, Any],
    mean: Sequence[float],
    std: Sequence[float],
    stem: str,
    trained: Mapping[str, Trained],
) -> None:
    """Refuse weights that were trained on pixels normalised otherwise.

    Args:
        config: the part of a folder's config that may hold `mean` and `std`.
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
            f"the config beside it says mean {found[0]} and std {found[1]}, "
            f"the encoder has {tuple(mean)} and {tuple(std)}; {hint}"
        )
