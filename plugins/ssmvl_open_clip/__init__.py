"""Vision towers of open_clip as a plugin: CLIP, SigLIP, SigLIP 2."""

from ssmvl import hookimpl
from ssmvl.registry import Register


@hookimpl
def ssmvl_register(register: Register) -> None:
    """Register the encoder."""
    register("encoder", "open_clip", "ssmvl_open_clip.encoders:open_clip_encoder")
