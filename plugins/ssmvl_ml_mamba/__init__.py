"""ML-Mamba (arXiv 2407.19832) as a plugin: its connectors, out of public blocks of ssmvl."""

from ssmvl import hookimpl
from ssmvl.registry import Register


@hookimpl
def ssmvl_register(register: Register) -> None:
    """Register the components of ML-Mamba."""
    register("connector", "msc_basic", "ssmvl_ml_mamba.connectors:msc_basic")
    register("connector", "msc_advanced", "ssmvl_ml_mamba.connectors:msc_advanced")
