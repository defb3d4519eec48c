"""Which implementations of the ops this machine has. The torch path is always there."""

from __future__ import annotations

import importlib


def find_backends() -> dict[str, str]:
    """Each backend and why it is not used; an empty reason means that it is.

    mamba-ssm raises ImportError, OSError or RuntimeError where its extensions or a GPU are missing.
    """
    found = {"torch": ""}
    for module in ("mamba_ssm", "causal_conv1d"):
        try:
            importlib.import_module(module)
            found[module] = "installed, but no op uses it yet"
        except (ImportError, OSError, RuntimeError) as error:
            found[module] = f"not found ({type(error).__name__}: {error})"
    return found
