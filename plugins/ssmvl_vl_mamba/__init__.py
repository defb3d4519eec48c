"""VL-Mamba as a plugin: its connectors, built from public blocks of ssmvl."""

from ssmvl import hookimpl
from ssmvl.registry import Register


@hookimpl
def ssmvl_register(register: Register) -> None:
    """Register the components of VL-Mamba."""
    register("connector", "vlmamba_mlp", "ssmvl_vl_mamba.connectors:vlmamba_mlp")
    register("connector", "vss_mlp", "ssmvl_vl_mamba.connectors:vss_mlp")
    register("connector", "vss_l2", "ssmvl_vl_mamba.connectors:vss_l2")
