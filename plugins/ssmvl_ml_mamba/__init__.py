"""ML-Mamba (arXiv 2407.19832) as a plugin: its connectors, prompt and checkpoints, built from public blocks."""

from ssmvl import hookimpl
from ssmvl.registry import Register


@hookimpl
def ssmvl_register(register: Register) -> None:
    """Register the components of ML-Mamba."""
    register("connector", "msc_basic", "ssmvl_ml_mamba.connectors:msc_basic")
    register("connector", "msc_advanced", "ssmvl_ml_mamba.connectors:msc_advanced")
    register("prompt", "zephyr", "ssmvl_ml_mamba.prompts:ZephyrPrompt")
    register("checkpoint", "ml_mamba_release", "ssmvl_ml_mamba.released_weights:ml_mamba_release")
    register("checkpoint", "cobra_release", "ssmvl_ml_mamba.released_weights:cobra_release")
