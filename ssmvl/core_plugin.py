"""What the core registers, and the table of all components. Nothing is imported until a component is used."""

from __future__ import annotations

import functools

from ssmvl.plugins import discover, hookimpl
from ssmvl.registry import Register, Registry

COMPONENTS = {
    ("scan_order", "raster"): "ssmvl.scans:raster",
    ("scan_order", "bsm"): "ssmvl.scans:bsm",
    ("scan_order", "csm"): "ssmvl.scans:csm",
    ("mixer", "mamba1"): "ssmvl.layers.mamba1:Mamba1Mixer",
    ("mixer", "mamba2"): "ssmvl.layers.mamba2:Mamba2Mixer",
    ("encoder", "timm"): "ssmvl.vision.encoders:timm_encoder",
    ("encoder", "open_clip"): "ssmvl.vision.open_clip_encoders:open_clip_encoder",
    ("encoder", "digit_vit"): "ssmvl.vision.digit_vit:digit_vit",
    ("fusion", "channel"): "ssmvl.vision.fusion:ChannelFusion",
    ("fusion", "sequence"): "ssmvl.vision.fusion:SequenceFusion",
    ("connector", "mlp"): "ssmvl.connectors.projectors:MlpConnector",
    ("language_model", "mamba1_lm"): "ssmvl.language.mamba_lm:Mamba1LM",
    ("language_model", "mamba2_lm"): "ssmvl.language.mamba_lm:MambaLM",
    ("checkpoint", "ssmvl"): "ssmvl.checkpoints.layouts:ssmvl_model",
    ("checkpoint", "state_spaces"): "ssmvl.language.layouts:state_spaces",
    ("checkpoint", "transformers_mamba"): "ssmvl.language.layouts:transformers_mamba",
    ("prompt", "mamba"): "ssmvl.text.prompts:MambaPrompt",
    ("prompt", "plain"): "ssmvl.text.prompts:PlainPrompt",
    ("prompt", "vicuna"): "ssmvl.text.prompts:VicunaPrompt",
    ("dataset", "digit_scenes"): "ssmvl.data.scenes:digit_scenes",
    ("dataset", "shards"): "ssmvl.data.shards:existing_shards",
    ("dataset", "mix"): "ssmvl.data.mix:mix",
}


class CorePlugin:
    """The core's own components, entering through the same hook as anybody's."""

    @hookimpl
    def ssmvl_register(self, register: Register) -> None:
        """Register the core's components."""
        for (kind, name), target in COMPONENTS.items():
            register(kind, name, target)


@functools.cache
def components() -> Registry:
    """All components of the core and of every installed plugin; found once per process."""
    return discover(CorePlugin())
