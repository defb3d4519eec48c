"""Vision encoders: uint8 pixels -> patch features of a ViT's second-to-last block."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import get_arch_pretrained_cfgs
from torch import Tensor, nn

from ssmvl.checkpoints import WEIGHTS_FILE, copy_into, read_json
from ssmvl.errors import CheckpointError, ContractError
from ssmvl.hub import hub_file
from ssmvl.interfaces import Count, Grid, ImageSpec, Resize
from ssmvl.vision.sources import (
    adapting,
    folder_file,
    parse_weights,
    read_under,
    require_statistics,
    similar,
)

WeightsFile = Callable[[], Path]
"""Gives the safetensors file of an encoder's weights; called when they are loaded, and only then may it fetch it."""


class Encoder(nn.Module, ABC):
    """What the encoders of every library share; a subclass adds `features` and `load_weights`.

    Args:
        width: D.
        grid: of the patches.
        size: side of its input in pixels.
        mean: per channel, of pixels in 0…1.
        std: per channel, of pixels in 0…1.
        resize: how the loader brings an image to that size; a letterbox has the colour `mean`.

    Raises:
        ContractError: the input is smaller than a patch.
    """

    def __init__(
        self, *, width: int, grid: Grid, size: int, mean: Sequence[float], std: Sequence[float], resize: Resize
    ) -> None:
        super().__init__()
        if not grid.length:
            raise ContractError(f"images of {size} px are smaller than one patch; give a larger image_size")
        self.width, self.grid = width, grid
        self.mean, self.std = tuple(mean), tuple(std)  # no buffers: a cast to bf16 would round them
        red, green, blue = (round(255 * value) for value in mean)
        self.image_spec = ImageSpec(size, resize, (red, green, blue) if resize == "letterbox" else (0, 0, 0))

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels uint8 (I, 3, S, S) -> (I, N, D), in the dtype of the weights."""
        x = self.normalise(pixels)
        if not len(pixels):  # towers reshape by the number of images
            return x.new_empty(0, self.grid.length, self.width)
        return self.features(x)

    def normalise(self, pixels: Tensor) -> Tensor:
        """uint8 (I, 3, S, S) -> what the tower takes: computed in fp32 at least, then in the dtype of its weights."""
        dtype = next(self.parameters()).dtype
        planes = pixels.to(torch.promote_types(dtype, torch.float32)).unbind(1)
        scaled = [(plane / 255 - m) / s for plane, m, s in zip(planes, self.mean, self.std, strict=True)]
        return torch.stack(scaled, dim=1).to(dtype)

    @abstractmethod
    def features(self, x: Tensor) -> Tensor:
        """Normalised (I, 3, S, S), I > 0 -> (I, N, D)."""

    @abstractmethod
    def load_weights(self) -> None:
        """Load the weights that were named; nothing if none were."""

    def shard_units(self) -> Sequence[nn.Module]:
        """The encoder as a whole."""
        return [self]


class VitEncoder(Encoder):
    """Patch features of a timm VisionTransformer: second-to-last block, no final norm, prefix tokens dropped.

    Args:
        vit: a timm `VisionTransformer` with at least two blocks.
        size: side of its input in pixels.
        mean: per channel, of pixels in 0…1.
        std: per channel, of pixels in 0…1.
        resize: how the loader brings an image to that size.
        file: gives the weights that `load_weights` reads; None to keep the initial ones.
        prefix: of the names in that file.

    Raises:
        ContractError: `vit` is none, or its input is smaller than a patch.

    Source: ML-Mamba §3.2 and Prismatic VLMs (arXiv 2402.07865) §3: second-to-last layer.
    """

    vit: Any  # what timm's VisionTransformer offers is typed as Tensor | Module

    def __init__(
        self,
        vit: Any,
        *,
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
        resize: Resize = "resize-naive",
        file: WeightsFile | None,
        prefix: str = "",
    ) -> None:
        grid = getattr(getattr(vit, "patch_embed", None), "grid_size", None)
        if grid is None or len(getattr(vit, "blocks", ())) < 2 or not hasattr(vit, "forward_intermediates"):
            raise ContractError(
                f"{type(vit).__name__} is no ViT of two blocks or more; features come from the last but one"
            )
        super().__init__(width=int(vit.embed_dim), grid=Grid(1, *grid), size=size, mean=mean, std=std, resize=resize)
        self.vit = vit
        self._file, self._prefix = file, prefix

    def features(self, x: Tensor) -> Tensor:
        """Normalised (I, 3, S, S), I > 0 -> (I, N, D)."""
        (features,) = self.vit.forward_intermediates(
            x,
            indices=[len(self.vit.blocks) - 2],
            norm=False,
            stop_early=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
        return features

    def load_weights(self) -> None:
        """Load the weights that were named; as timm does, positions and patches of another size are resampled first.

        Raises:
            CheckpointError: they cannot be found or fetched, are damaged, or do not fit.
        """
        if self._file is None:
            return
        path = self._file()
        tensors = read_under(path, self._prefix)
        adapted = getattr(sys.modules[type(self.vit).__module__], "checkpoint_filter_fn", None)
        if adapted is not None:
            with adapting(path):
                tensors = adapted(tensors, self.vit)
        heads = getattr(self.vit, "pretrained_cfg", {}).get("classifier") or ()
        for head in (heads,) if isinstance(heads, str) else heads:
            if not any(name.startswith(f"{head}.") for name in self.vit.state_dict()):
                tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{head}.")}
        copy_into(self.vit, tensors, str(path))


def timm_encoder(
    model: str, *, image_size: Count | None = None, resize: Resize = "resize-naive", weights: str = "none"
) -> VitEncoder:
    """Any ViT of timm, by its name there. Nothing is read or fetched before `load_weights`.

    Args:
        model: timm's name, with or without a tag, e.g. `vit_large_patch14_reg4_dinov2.lvd142m`; the tag decides mean
            and std.
        image_size: side in pixels; the model's own if None.
        resize: how an image is brought to that size.
        weights: `none`; a safetensors file with timm's model, its classifier not needed; a tag of timm's, fetched from
            the hub; `local-dir:FOLDER`, a folder with the `config.json` and `model.safetensors` of one of timm's
            repositories.

    Raises:
        ContractError: timm has no such model or tag, it is no ViT, or the tag's weights need QuickGELU.
    """
    name, _, tag = model.partition(".")
    if not timm.is_model(name):
        raise ContractError(f"timm has no model {name!r}; similar names there: {similar(name, timm.list_models())}")
    source = parse_weights(weights, _tags(name), name)
    if source.kind == "tag":
        if tag not in ("", source.value):
            raise ContractError(f"model {model!r} and weights {weights!r} name two tags; write one")
        tag = source.value
    if tag in _tags(_quick(name)) and name != _quick(name):
        raise ContractError(
            f"the weights {tag!r} were trained with QuickGELU, which {name!r} lacks: answers would be silently wrong; "
            f"write model: {_quick(name)}.{tag}"
        )
    options = {} if image_size is None else {"img_size": image_size}
    try:
        vit = timm.create_model(f"{name}.{tag}" if tag else name, pretrained=False, num_classes=0, **options)
    except (RuntimeError, TypeError) as error:
        raise ContractError(
            f"timm cannot build {model!r} ({error}); its tags: {', '.join(_tags(name)) or 'none'}"
        ) from error
    config = vit.pretrained_cfg
    mean, std = config["mean"], config["std"]
    file: WeightsFile | None = None
    if source.kind == "file":
        file = Path(source.value).expanduser
    elif source.kind == "folder":
        file = partial(_folder, source.value, name, mean, std)
    elif source.kind == "tag":
        if "hf_hub_id" not in config:
            raise ContractError(f"timm has {name}.{tag} as a pickle only, which is not read; see {config.get('url')}")
        file = partial(hub_file, config["hf_hub_id"], config.get("hf_hub_filename") or WEIGHTS_FILE)
    size = image_size or config["input_size"][-1]
    return VitEncoder(vit, size=size, mean=mean, std=std, resize=resize, file=file)


def _tags(name: str) -> Mapping[str, Any]:
    """Tags of timm's pretrained weights of a model."""
    return {full.partition(".")[2]: config for full, config in get_arch_pretrained_cfgs(name).items() if "." in full}


def _quick(name: str) -> str:
    """The model that has QuickGELU in its place, if timm has one: it repeats the tags of weights that need it."""
    return name if "_quickgelu_" in name else name.replace("_clip_", "_clip_quickgelu_")


def _folder(folder: str, name: str, mean: Sequence[float], std: Sequence[float]) -> Path:
    """The weights in a folder of timm's, once its config agrees with the encoder."""
    path = folder_file(folder, "config.json")
    config = read_json(path)
    with adapting(path):
        found = str(config.get("architecture"))
        pretrained = config.get("pretrained_cfg", config)  # older folders have one mapping
        tag = pretrained.get("tag")
        if tag in _tags(_quick(found)):
            found = _quick(found)  # timm's folders name the model without QuickGELU even where its weights need it
        if found != name:
            raise CheckpointError(f"{path}: its weights are those of {found!r}, the encoder is {name!r}")
        require_statistics(path, pretrained, mean, std, f"write the tag of these weights too, model: {name}.{tag}")
    return folder_file(folder, WEIGHTS_FILE)
