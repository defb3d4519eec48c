"""Vision towers of open_clip: CLIP, SigLIP, SigLIP 2. No text tower is kept, none of full size is built."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
from open_clip.constants import HF_CONFIG_NAME, HF_SAFE_WEIGHTS_NAME
from open_clip.model import resize_pos_embed
from open_clip.timm_model import TimmModel
from open_clip.transform import PreprocessCfg
from open_clip.transformer import VisionTransformer
from torch import Tensor

from ssmvl.checkpoints import copy_into, read_json
from ssmvl.errors import CheckpointError, ContractError, nearest
from ssmvl.hub import hub_file
from ssmvl.interfaces import Count, Grid, Resize
from ssmvl.vision.encoders import Encoder, VitEncoder, WeightsFile
from ssmvl.vision.sources import (
    Source,
    adapting,
    folder_file,
    parse_weights,
    read_under,
    require_statistics,
    similar,
)

TOWER = "visual."  # of names in open_clip's files
FREE = ("image_size", "timm_model_pretrained")  # of a vision config: positions are resampled; how it was initialised


class ClipEncoder(Encoder):
    """Patch features of open_clip's own VisionTransformer: second-to-last block, no final norm, class token dropped.

    Args:
        visual: an open_clip `VisionTransformer` with at least two blocks.
        size: side of its input in pixels.
        mean: per channel, of pixels in 0…1.
        std: per channel, of pixels in 0…1.
        resize: how the loader brings an image to that size.
        file: gives the weights that `load_weights` reads; None to keep the initial ones.

    Raises:
        ContractError: `visual` is none, or its input is smaller than a patch.

    Source: Prismatic VLMs (arXiv 2402.07865) §3: second-to-last layer.
    """

    visual: Any

    def __init__(
        self,
        visual: Any,
        *,
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
        resize: Resize,
        file: WeightsFile | None,
    ) -> None:
        if not isinstance(visual, VisionTransformer) or len(visual.transformer.resblocks) < 2:
            raise ContractError(
                f"{type(visual).__name__} is no ViT of two blocks or more; features come from the last but one"
            )
        width, grid = visual.transformer.width, Grid(1, *visual.grid_size)
        super().__init__(width=width, grid=grid, size=size, mean=mean, std=std, resize=resize)
        self.visual = visual
        self._file = file

    def features(self, x: Tensor) -> Tensor:
        """Normalised (I, 3, S, S), I > 0 -> (I, N, D)."""
        (features,) = self.visual.forward_intermediates(
            x,
            indices=[len(self.visual.transformer.resblocks) - 2],
            stop_early=True,
            intermediates_only=True,
            output_fmt="NLC",
        )["image_intermediates"]
        return features

    def load_weights(self) -> None:
        """Load the weights that were named, strictly; positions are resampled as open_clip does, for another size.

        Raises:
            CheckpointError: they cannot be found or fetched, are damaged, or do not fit.
        """
        if self._file is None:
            return
        path = self._file()
        tensors = {TOWER + name: tensor for name, tensor in read_under(path, TOWER).items()}
        with adapting(path):
            resize_pos_embed(tensors, self)
        copy_into(self, tensors, str(path))


def open_clip_encoder(
    model: str, *, image_size: Count | None = None, resize: Resize = "resize-naive", weights: str = "none"
) -> Encoder:
    """The vision tower of one of open_clip's models. Nothing is read or fetched before `load_weights`.

    Args:
        model: open_clip's name, with or without a tag, e.g. `ViT-L-14-336-quickgelu` or `ViT-L-14:laion2b_s32b_b82k`;
            the tag decides mean and std, the model's first one if none is written.
        image_size: side in pixels; the model's own if None.
        resize: how an image is brought to that size.
        weights: `none`; a safetensors file of open_clip's, of which only `visual.*` is used; a tag of open_clip's,
            fetched from the hub; `local-dir:FOLDER`, a folder with `open_clip_config.json` and
            `open_clip_model.safetensors`.

    Raises:
        ContractError: open_clip has no such model or tag, its tower is no ViT, or the tag's weights and the model
            differ in QuickGELU.
    """
    name, _, tag = model.partition(":")
    if name not in open_clip.list_models():
        known = similar(name, open_clip.list_models())
        raise ContractError(f"open_clip has no model {name!r}; similar names there: {known}")
    config = open_clip.get_model_config(name)
    tags = open_clip.list_pretrained_tags_by_model(name)
    source = parse_weights(weights, tags, name)
    if source.kind == "tag":
        if tag not in ("", source.value):
            raise ContractError(f"model {model!r} and weights {weights!r} name two tags; write one")
        tag = source.value
    if tag and tag not in tags:
        raise ContractError(f"open_clip has no weights {tag!r} of {name!r}.{nearest(tag, tags)}")
    if tag:
        _require_activation(name, config, tag)
    pretrained = open_clip.get_pretrained_cfg(name, tag or next(iter(tags), ""))
    mean, std = (pretrained.get(key, getattr(PreprocessCfg(), key)) for key in ("mean", "std"))
    file = _file(source, name, pretrained, mean, std)
    size = image_size or config["vision_cfg"]["image_size"]
    tower = _tower(config, size)
    if isinstance(tower, TimmModel):
        return VitEncoder(tower.trunk, size=size, mean=mean, std=std, resize=resize, file=file, prefix=f"{TOWER}trunk.")
    return ClipEncoder(tower, size=size, mean=mean, std=std, resize=resize, file=file)


def _tower(config: Mapping[str, Any], size: int) -> Any:
    """The vision tower of a model, beside a text tower of one token and width 1."""
    vision = {**config["vision_cfg"], "image_size": size}
    text = open_clip.CLIPTextCfg(context_length=1, vocab_size=1, width=1, heads=1, layers=1)
    tower = open_clip.CLIP(config["embed_dim"], vision, text, quick_gelu=config.get("quick_gelu", False)).visual
    if isinstance(tower, TimmModel):
        tower.set_input_size(size)  # it leaves timm's model at its own size
    return tower


def _require_activation(name: str, config: Mapping[str, Any], tag: str) -> None:
    theirs = open_clip.get_pretrained_cfg(name, tag).get("quick_gelu", False)
    if theirs != config.get("quick_gelu", False):
        right = f"{name}-quickgelu" if theirs else name.removesuffix("-quickgelu")
        raise ContractError(
            f"the weights {tag!r} were trained with{'' if theirs else 'out'} QuickGELU, {name!r} is built "
            f"with{'out' if theirs else ''} it: answers would be silently wrong; write model: {right}"
        )


def _file(
    source: Source, name: str, pretrained: Mapping[str, Any], mean: Sequence[float], std: Sequence[float]
) -> WeightsFile | None:
    if source.kind == "file":
        return Path(source.value).expanduser
    if source.kind == "folder":
        return partial(_folder, source.value, name, mean, std)
    if source.kind == "tag":
        repo, slash, file = pretrained["hf_hub"].rpartition("/")
        if not slash or file:  # a repository without a file name holds open_clip's own safetensors
            raise ContractError(
                f"open_clip has {name}:{source.value} as a pickle only, which is not read; "
                f"see {pretrained['hf_hub'] or pretrained['url']}"
            )
        return partial(hub_file, repo, HF_SAFE_WEIGHTS_NAME)
    return None


def _folder(folder: str, name: str, mean: Sequence[float], std: Sequence[float]) -> Path:
    """The weights in a folder of open_clip's, once its config agrees with the encoder."""
    path = folder_file(folder, HF_CONFIG_NAME)
    config = read_json(path)
    with adapting(path):
        theirs, own = _what_counts(config.get("model_cfg", config)), _what_counts(open_clip.get_model_config(name))
        wrong = [f"{key} is {theirs[key]!r}, {name} has {own[key]!r}" for key in own if theirs[key] != own[key]]
        if wrong:
            raise CheckpointError(f"{path}: its weights are those of another model: {'; '.join(wrong)}")
        hint = f"write the tag of these weights too, model: {name}:TAG"
        require_statistics(path, config.get("preprocess_cfg", {}), mean, std, hint)
    return folder_file(folder, HF_SAFE_WEIGHTS_NAME)


def _what_counts(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a model's config that decides what its vision tower computes."""
    vision = asdict(open_clip.CLIPVisionCfg(**config["vision_cfg"]))
    whole = {"embed_dim": config["embed_dim"], "quick_gelu": config.get("quick_gelu", False)}
    return whole | {f"vision_cfg.{key}": value for key, value in vision.items() if key not in FREE}
