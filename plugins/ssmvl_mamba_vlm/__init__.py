"""MambaVLM as a plugin: its scan orders and projector, built from public blocks of ssmvl."""

from ssmvl import hookimpl
from ssmvl.registry import Register


@hookimpl
def ssmvl_register(register: Register) -> None:
    """Register the components of MambaVLM."""
    register("scan_order", "cross_cat", "ssmvl_mamba_vlm.scans:cross_cat")
    register("scan_order", "cross_stitch", "ssmvl_mamba_vlm.scans:cross_stitch")
    register("connector", "mamba_projector", "ssmvl_mamba_vlm.connectors:MambaProjector")
