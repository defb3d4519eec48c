"""Where the recipes that come with the package lie, and how YAML is read. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ssmvl.errors import Problem, RecipeError


def shipped_folders() -> list[Path]:
    """Folders of recipes: beside the package in an installation, in the checkout where there is one."""
    package, checkout = Path(__file__).parent, Path(__file__).parents[1]
    return [package / "_recipes", *([checkout / "recipes"] if (checkout / "pyproject.toml").is_file() else [])]


def read_yaml(path: Path) -> Any:
    """What a YAML file says, as plain data: `1e-4` is a float, interpolations stay as they are.

    Raises:
        RecipeError: it cannot be read, or a key stands twice in one mapping.
    """
    try:
        return OmegaConf.to_container(OmegaConf.load(path))
    except (YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise RecipeError([Problem("", f"cannot be read: {error}")], str(path)) from error
