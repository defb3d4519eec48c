"""Vision towers of open_clip: CLIP, SigLIP, SigLIP 2. No full-size text tower is built."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import open_clip
from open_clip.constants import HF_CONFIG_NAME, HF_SAFE_WEIGHTS_NAME
from open_clip.model import resize_pos_embed
from open_clip.timm_model import TimmModel
from open_clip.transform import PreprocessCfg
from open_clip.transformer import VisionTransformer
from torch import Tensor

from ssmvl.errors import CheckpointError, ContractError, nearest
from ssmvl.interfaces import Grid, Pixels, Resize
from ssmvl.vision.encoders import Encoder, VitEncoder
from ssmvl.vision.pretrained import Trained, parse_weights, require_statistics, resolve_tag, similar, weights_path

TOWER = "visual."  # name prefix in open_clip's files
# Vision config options without effect: positions are resampled, and the others affect initialization or training.
IGNORED_OPTIONS = ("image_size", "timm_model_pretrained", "patch_dropout", "timm_drop", "timm_drop_path")


class ClipEncoder(Encoder):
    """Patch features of open_clip's own VisionTransformer: second-to-last block, no final norm, class token dropped.

    Has the arguments of `Encoder`.

    Source: Prismatic VLMs (arXiv 2402.07865) §3: second-to-last layer.
    """

    part = "visual"
    visual: Any

    def layout(self, tower: Any) -> tuple[int, int, Grid]:
        """The number of blocks of a tower (0 if it is not a ViT), its width, and the grid of its patches."""
        if not isinstance(tower, VisionTransformer):
            return 0, 0, Grid(0, 0, 0)
        return len(tower.transformer.resblocks), tower.transformer.width, Grid(1, *tower.grid_size)

    def features(self, x: Tensor) -> Tensor:
        """Normalized (I, 3, S, S), I > 0 -> (I, N, D)."""
        (features,) = self.visual.forward_intermediates(
            x,
            indices=[len(self.visual.transformer.resblocks) - 2],
            stop_early=True,
            intermediates_only=True,
            output_fmt="NLC",
        )["image_intermediates"]
        return features

    def adapted(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """A file's tensors through open_clip's function, which expects the names of a whole model."""
        full = {TOWER + name: tensor for name, tensor in tensors.items()}
        resize_pos_embed(full, self)
        return {name.removeprefix(TOWER): tensor for name, tensor in full.items()}


def open_clip_encoder(
    model: str, *, image_size: Pixels | None = None, resize: Resize = "resize-naive", weights: str = "none"
) -> Encoder:
    """The vision tower of an open_clip model. Nothing is read or downloaded until weights are loaded.

    Args:
        model: open_clip's name, with or without a tag, e.g. `ViT-L-14-336-quickgelu` or `ViT-L-14:laion2b_s32b_b82k`;
            the tag determines mean and std; by default the model's first tag does.
        image_size: side in pixels; the model's own if None.
        resize: how images are resized to it; always bicubic, even if the tag names another interpolation.
        weights: `none`; a safetensors file of open_clip, of which only `visual.*` is used (`model` must then name the
            tag if the model's tags differ in mean, std or QuickGELU); an open_clip tag, downloaded from the Hub; or
            `local-dir:DIRECTORY`, a directory with `open_clip_config.json` and `open_clip_model.safetensors`.

    Raises:
        ContractError: open_clip does not know the model or tag, the tower is not a ViT or does not run on such images,
            the tag of a file is unknown, or the tag's weights and the model differ in QuickGELU.
    """
    name, _, tag = model.partition(":")
    if name not in open_clip.list_models():
        known = similar(name, open_clip.list_models())
        raise ContractError(f"unknown open_clip model {name!r}. Similar names: {known}")
    config = open_clip.get_model_config(name)
    quick, trained = config.get("quick_gelu", False), _tags(name)
    source = parse_weights(weights, trained, name)
    tag = resolve_tag(source, tag, model, f"{name}:", trained, quick)
    if tag and tag not in trained:
        raise ContractError(f"unknown tag {tag!r} of open_clip model {name!r}.{nearest(tag, trained)}")
    if tag and trained[tag].quick != quick:
        right = name.removesuffix("-quickgelu") if quick else f"{name}-quickgelu"
        raise ContractError(
            f"the weights {tag!r} were trained with{'out' if quick else ''} QuickGELU, but {name!r} is built "
            f"with{'' if quick else 'out'} it, so answers would be silently wrong; write model: {right}"
        )
    default = PreprocessCfg()
    mean, std, _ = trained[tag or next(iter(trained))] if trained else (default.mean, default.std, quick)
    path = weights_path(source, partial(_hub, name, tag), HF_SAFE_WEIGHTS_NAME)
    agrees = partial(_check_config, name, mean, std) if source.kind == "folder" else None
    size = image_size or config["vision_cfg"]["image_size"]
    tower = _tower(config, size)
    if isinstance(tower, TimmModel):
        trunk = f"{TOWER}trunk."
        return VitEncoder(
            tower.trunk, size=size, mean=mean, std=std, resize=resize, weights=path, prefix=trunk, agrees=agrees
        )
    return ClipEncoder(tower, size=size, mean=mean, std=std, resize=resize, weights=path, prefix=TOWER, agrees=agrees)


def _tags(name: str) -> dict[str, Trained]:
    """The preprocessing and activation that open_clip's pretrained weights of a model need, by tag."""
    trained, default = {}, PreprocessCfg()
    for tag in open_clip.list_pretrained_tags_by_model(name):
        config = open_clip.get_pretrained_cfg(name, tag)
        mean, std = config.get("mean", default.mean), config.get("std", default.std)
        trained[tag] = Trained(tuple(mean), tuple(std), config.get("quick_gelu", False))
    return trained


def _tower(config: Mapping[str, Any], size: int) -> Any:
    """Build the vision tower of a model, along with a text tower of one token and width 1."""
    vision = {**config["vision_cfg"], "image_size": size}
    text = open_clip.CLIPTextCfg(context_length=1, vocab_size=1, width=1, heads=1, layers=1)
    tower = open_clip.CLIP(config["embed_dim"], vision, text, quick_gelu=config.get("quick_gelu", False)).visual
    if isinstance(tower, TimmModel):
        tower.set_input_size(size)  # because open_clip builds timm models at their own size
    return tower


def _hub(name: str, tag: str) -> tuple[str, str]:
    """The repository and the file of a tag."""
    config = open_clip.get_pretrained_cfg(name, tag)
    repo, slash, file = config["hf_hub"].rpartition("/")
    if not slash or file:  # only repositories without a file name contain open_clip's own safetensors
        raise ContractError(
            f"open_clip has {name}:{tag} only as a pickle, which is not read; see {config['hf_hub'] or config['url']}"
        )
    return repo, HF_SAFE_WEIGHTS_NAME


def _check_config(name: str, mean: Sequence[float], std: Sequence[float], config: Mapping[str, Any]) -> None:
    """Reject an open_clip directory whose config states that its weights are of another encoder."""
    if not config:
        raise CheckpointError(f"{HF_CONFIG_NAME} must be in the same directory and describe the model of the weights")
    stated = _vision_settings(config.get("model_cfg", config))
    own = _vision_settings(open_clip.get_model_config(name))
    wrong = [f"{key} is {stated[key]!r}, but {name} has {own[key]!r}" for key in own if stated[key] != own[key]]
    if wrong:
        raise CheckpointError(f"contains weights of another model: {'; '.join(wrong)}")
    fitting = {tag: need for tag, need in _tags(name).items() if need.quick == own["quick_gelu"]}
    require_statistics(config.get("preprocess_cfg", {}), mean, std, f"{name}:", fitting)


def _vision_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a model's config that affect the output of its vision tower."""
    vision = asdict(open_clip.CLIPVisionCfg(**config["vision_cfg"]))
    shared = {"embed_dim": config["embed_dim"], "quick_gelu": config.get("quick_gelu", False)}
    return shared | {f"vision_cfg.{key}": value for key, value in vision.items() if key not in IGNORED_OPTIONS}
