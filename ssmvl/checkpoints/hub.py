"""What a user calls a file: one on this machine, or a model's id in the hub. Nothing else of ssmvl fetches anything."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download

from ssmvl.errors import CheckpointError, short

ID = re.compile(
    r"[\w.-]+/[\w.-]+(?<!\.json)(?<!\.yaml)(?<!\.safetensors)(?<!\.bin)(?<!\.pt)(?<!\.pth)(?<!\.ckpt)"
)  # no file name


HUB_FILE = "hf-hub:"  # before owner/model/FILE: one file of the hub


def hub_file(repo: str, name: str) -> Path:
    """A file of an encoder in the hub: from the cache, or fetched now.

    Args:
        repo: `owner/model`.
        name: of the file.

    Raises:
        CheckpointError: it cannot be fetched.
    """
    try:
        return Path(hf_hub_download(repo, name))
    except (OSError, ValueError) as error:  # the hub's own errors are OSErrors, a malformed id is a ValueError
        reason = short(" ".join(str(error).split()))
        raise CheckpointError(
            f"{name} of {repo} cannot be fetched from the hub ({type(error).__name__}: {reason}); "
            "without a network download the folder elsewhere and write weights: local-dir:FOLDER"
        ) from error


def user_path(name: str | Path) -> Path:
    """A path that a user wrote, `~` resolved; whether something lies there can be asked without an error.

    Raises:
        CheckpointError: nothing can be called that, there is no such user, or its folder may not be read.
    """
    try:
        path = Path(name).expanduser()
        path.exists()
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{short(str(name))}: cannot be a path here ({short(str(error))})") from error
    return path


def local(name: str | Path, *patterns: str) -> Path:
    """A file or folder of that name, or the folder into which files of the hub's model of that name were fetched.

    Args:
        name: a path, or as a text `owner/model` or `hf-hub:owner/model/FILE`.
        patterns: of file names in the hub, e.g. `*.safetensors`.

    Raises:
        CheckpointError: there is no such path, and no such model in the hub or no way to reach it.
    """
    if str(name).startswith(HUB_FILE):
        repo, _, file = str(name).removeprefix(HUB_FILE).rpartition("/")
        return hub_file(repo, file)
    path = user_path(name)
    if path.exists():
        return path
    if isinstance(name, Path) or not ID.fullmatch(name) or path.parent.is_dir():
        wanted = path.parent.is_dir() and path.suffix == ".safetensors"
        here = sorted(child.name for child in path.parent.iterdir()) if wanted else []
        held = f" ({path.parent} holds {short(', '.join(here))})" if here else ""
        raise CheckpointError(
            f"{name}: no such file or folder{held}, and not a model of the hub, which is named owner/model"
        )
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except (OSError, ValueError) as error:
        reason = short(" ".join(str(error).split()) or type(error).__name__)
        raise CheckpointError(
            f"{name}: no such file or folder here, and it cannot be fetched from the hub ({reason}); "
            "give the path of a folder that holds its files"
        ) from error
