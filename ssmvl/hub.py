"""What a user calls a file: one on this machine, or a model's id in the hub. Nothing else of ssmvl fetches anything."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from ssmvl.errors import CheckpointError

ID = re.compile(r"[\w.-]+/[\w.-]+(?<!\.json)(?<!\.yaml)(?<!\.safetensors)(?<!\.bin)(?<!\.pt)(?<!\.pth)")  # no file name


def local(name: str | Path, *patterns: str) -> Path:
    """A file or folder of that name, or the folder into which files of the hub's model of that name were fetched.

    Args:
        name: a path, or `owner/model`.
        patterns: of file names in the hub, e.g. `*.safetensors`.

    Raises:
        CheckpointError: there is no such path, and no such model in the hub or no way to reach it.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    if not ID.fullmatch(str(name)):
        raise CheckpointError(f"{name}: no such file or folder, and no model of the hub, which would be owner/model")
    try:
        return Path(snapshot_download(str(name), allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{name}: no such file or folder here, and it cannot be fetched from the hub ({reason}); "
            "give the path of a folder that holds its files"
        ) from error
