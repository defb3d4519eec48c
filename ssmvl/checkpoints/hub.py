"""Resolve paths and Hub ids. This is the only module that downloads from the Hub."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download

from ssmvl.errors import CheckpointError, short

# An owner/model id, as opposed to the relative path of a file.
ID = re.compile(r"[\w.-]+/[\w.-]+(?<!\.json)(?<!\.yaml)(?<!\.safetensors)(?<!\.bin)(?<!\.pt)(?<!\.pth)(?<!\.ckpt)")
HUB_FILE = "hf-hub:"  # prefix of owner/model/FILE: a single file on the Hub


def hub_file(repo: str, name: str) -> Path:
    """Return the local path of a file on the Hub, which is downloaded unless it is cached.

    Args:
        repo: `owner/model`.
        name: name of the file.

    Raises:
        CheckpointError: the file cannot be downloaded.
    """
    try:
        return Path(hf_hub_download(repo, name))
    except (OSError, ValueError) as error:  # errors of the Hub are OSErrors, a malformed id gives a ValueError
        reason = short(" ".join(str(error).split()))
        raise CheckpointError(
            f"{name} of {repo} cannot be downloaded from the Hub ({type(error).__name__}: {reason}); "
            "without a network, download it on another machine and write weights: local-dir:DIRECTORY"
        ) from error


def user_path(name: str | Path) -> Path:
    """Expand `~` in a user's path. Calling `exists` on the result raises no error.

    Raises:
        CheckpointError: the name cannot be a path, its user is unknown, or its directory is not readable.
    """
    try:
        path = Path(name).expanduser()
        path.exists()
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{short(str(name))}: is not a valid path ({short(str(error))})") from error
    return path


def local(name: str | Path, *patterns: str) -> Path:
    """Return the local path of a file, a directory or a Hub model, which is downloaded unless it is cached.

    Args:
        name: a path, or, as a string, `owner/model` or `hf-hub:owner/model/FILE`.
        patterns: names of the files to download, e.g. `*.safetensors`.

    Raises:
        CheckpointError: the path does not exist, and the Hub has no such model or cannot be reached.
    """
    if str(name).startswith(HUB_FILE):
        repo, _, file = str(name).removeprefix(HUB_FILE).rpartition("/")
        return hub_file(repo, file)
    path = user_path(name)
    if path.exists():
        return path
    if isinstance(name, Path) or not ID.fullmatch(name) or path.parent.is_dir():
        list_siblings = path.parent.is_dir() and path.suffix == ".safetensors"
        siblings = sorted(child.name for child in path.parent.iterdir()) if list_siblings else []
        contents = f" ({path.parent} contains {short(', '.join(siblings))})" if siblings else ""
        raise CheckpointError(f"{name}: no such file or directory{contents}, and not a Hub model id (owner/model)")
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except (OSError, ValueError) as error:
        reason = short(" ".join(str(error).split()) or type(error).__name__)
        raise CheckpointError(
            f"{name}: no such file or directory, and it cannot be downloaded from the Hub ({reason}); "
            "give the path of a directory that contains its files"
        ) from error
