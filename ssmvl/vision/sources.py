"""Where an encoder's weights come from: a safetensors file, a tag in the hub, or a folder that was downloaded."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor

from ssmvl.checkpoints import read_tensors
from ssmvl.errors import CheckpointError, ContractError, nearest

LOCAL_DIR, SUFFIX = "local-dir:", ".safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".tar", ".pkl", ".npz", ".npy")


class Source(NamedTuple):
    """What the option `weights` of an encoder says: nothing, a file, a tag, or a folder."""

    kind: Literal["none", "file", "tag", "folder"]
    value: str = ""


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


def similar(name: str, names: Collection[str]) -> str:
    """The names most like an unknown one, for messages: a library has too many to list."""
    return ", ".join(difflib.get_close_matches(name, names, n=5, cutoff=0.4)) or "none"


def folder_file(folder: str, name: str) -> Path:
    """A file of a downloaded folder.

    Raises:
        CheckpointError: the folder or the file is not there.
    """
    path = Path(folder).expanduser() / name
    if not path.is_file():
        found = ", ".join(sorted(p.name for p in path.parent.iterdir())) if path.parent.is_dir() else "no such folder"
        raise CheckpointError(f"{path.parent} must hold {name}; pickles are not read. Found: {found or 'nothing'}")
    return path


def require_statistics(
    path: Path, config: Mapping[str, Any], mean: Sequence[float], std: Sequence[float], hint: str
) -> None:
    """Refuse weights that were trained on pixels normalised otherwise.

    Args:
        path: of the config, for messages.
        config: its part that may hold `mean` and `std`.
        mean: of the encoder.
        std: of the encoder.
        hint: how to name a model with other statistics.

    Raises:
        CheckpointError: they differ.
    """
    for name, own in (("mean", mean), ("std", std)):
        found = config.get(name, own)
        if list(found) != list(own):
            raise CheckpointError(f"{path}: {name} is {list(found)}, the encoder has {list(own)}; {hint}")


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
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError) as error:
        raise CheckpointError(f"{path}: does not fit the model ({type(error).__name__}: {error})") from error
