"""Vision encoders: uint8 pixels -> patch features of a ViT's second-to-last block."""

from __future__ import annotations

import copy
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import timm
import torch
from timm.models import get_arch_pretrained_cfgs
from torch import Tensor, nn

from ssmvl.checkpoints import Layout, need
from ssmvl.checkpoints.files import WEIGHTS_FILE
from ssmvl.checkpoints.modules import module_settings, require_same
from ssmvl.errors import CheckpointError, ContractError
from ssmvl.interfaces import Grid, ImageSpec, Pixels, Resize
from ssmvl.vision.pretrained import (
    FAILURES,
    Trained,
    parse_weights,
    require_statistics,
    resolve_tag,
    similar,
    weights_path,
)

__all__ = ["Encoder", "VitEncoder", "timm_encoder"]

IGNORED_ARGS = (  # model_args that no feature depends on; dropout rates are ignored too
    *("img_size", "dynamic_img_size", "dynamic_img_pad", "weight_init", "fix_init"),
    *("num_classes", "global_pool", "pool_include_prefix"),
)
NEVER_RUN = ("norm", "attn_pool", "fc_norm", "head", "head_dist")  # modules after the blocks


class Encoder(nn.Module, ABC):
    """Base class of the encoders of all libraries; a subclass adds `part`, `layout`, `features` and `adapted`.

    Args:
        tower: computes the features; stored as the attribute that `part` names.
        size: side of the input in pixels.
        mean: per channel, of pixels in 0…1.
        std: per channel, of pixels in 0…1.
        resize: how images are resized to `size`; a letterbox is filled with the color `mean`.
        weights: file of the weights; see `ssmvl.interfaces.VisionEncoder`.
        prefix: prefix of the tensor names in that file.
        agrees: raises CheckpointError if the config next to that file describes another encoder; None to ignore it.

    Raises:
        ContractError: `tower` is not a ViT with at least two blocks, or its input is smaller than a patch; on `meta`
            also: it fails on its input or does not output one feature per position of its grid.
    """

    part: ClassVar[str]
    never_run: ClassVar[tuple[str, ...]] = ()  # modules of the tower that no feature depends on; files may omit them

    def __init__(
        self,
        tower: nn.Module,
        *,
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
        resize: Resize = "resize-naive",
        weights: str = "none",
        prefix: str = "",
        agrees: Callable[[Mapping[str, Any]], None] | None = None,
    ) -> None:
        super().__init__()
        blocks, self.width, self.grid = self.layout(tower)
        if blocks < 2:
            raise ContractError(
                f"{type(tower).__name__} is not a ViT of 2 or more blocks; features come from the second-to-last block"
            )
        if not self.grid.length:
            raise ContractError(f"images of {size} px are smaller than one patch; use a larger image_size")
        self.add_module(self.part, tower)
        self.mean, self.std = tuple(mean), tuple(std)  # not buffers, because a cast to bf16 would round them
        red, green, blue = (int(255 * value) for value in mean)  # truncated, as in Prismatic
        self.image_spec = ImageSpec(size, resize, (red, green, blue) if resize == "letterbox" else (0, 0, 0))
        self.weights, self._prefix, self._agrees = weights, prefix, agrees
        if next(self.parameters()).is_meta:  # `build_model` builds on `meta` first, where a forward pass is free
            self._check_features()

    def _check_features(self) -> None:
        """Reject a tower that fails when run or outputs another grid. Runs a copy, because ConViT caches tables."""
        twin, size = copy.deepcopy(self), self.image_spec.size
        what = f"{type(getattr(self, self.part)).__name__} on images of {size} x {size} px"
        try:
            with torch.no_grad():
                shape = tuple(twin(torch.zeros(1, 3, size, size, dtype=torch.uint8, device="meta")).shape)
        except FAILURES as error:
            raise ContractError(
                f"{what} fails ({type(error).__name__}: {error}); use another image_size or model"
            ) from error
        if shape != (1, self.grid.length, self.width):
            raise ContractError(
                f"{what} outputs {shape}, but its grid is {self.grid.rows} x {self.grid.columns} with width "
                f"{self.width}; use another image_size or model"
            )

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels uint8 (I, 3, S, S) -> (I, N, D), in the dtype of the weights, with or without autocast."""
        x = self.normalise(pixels)
        if not len(pixels):  # towers cannot reshape zero images
            return x.new_empty(0, self.grid.length, self.width)
        return self.features(x).to(x.dtype)

    def normalise(self, pixels: Tensor) -> Tensor:
        """uint8 (I, 3, S, S) -> the tower's input: computed in at least fp32, then cast to the dtype of its weights."""
        dtype = next(p.dtype for p in self.parameters() if p.is_floating_point())
        planes = pixels.to(torch.promote_types(dtype, torch.float32)).unbind(1)
        scaled = [(plane / 255 - m) / s for plane, m, s in zip(planes, self.mean, self.std, strict=True)]
        return torch.stack(scaled, dim=1).to(dtype)

    @abstractmethod
    def layout(self, tower: Any) -> tuple[int, int, Grid]:
        """The number of blocks of a tower (0 if it is not a ViT), its width, and the grid of its patches."""

    @abstractmethod
    def features(self, x: Tensor) -> Tensor:
        """Normalized (I, 3, S, S), I > 0 -> (I, N, D)."""

    @abstractmethod
    def adapted(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """A file's tensors under the tower's names, position embeddings resampled as the library does it."""

    def weights_layout(self, names: Collection[str], config: Mapping[str, Any]) -> Layout:
        """The layout of the file that `weights` names, given the names of its tensors and its `config.json`.

        Raises:
            CheckpointError: no name has the encoder's prefix, or the config describes another encoder.
        """
        if not any(name.startswith(self._prefix) for name in names):
            raise CheckpointError(f"has no tensor named {self._prefix}*, only {', '.join(sorted(names)[:5])}, …")
        if self._agrees is not None:
            self._agrees(config)

        def adapt(tensors: dict[str, Tensor], module: Encoder) -> dict[str, Tensor]:
            cut = len(self._prefix)
            return module.adapted({n[cut:]: t for n, t in tensors.items() if n.startswith(self._prefix)})

        absent = [f"{self.part}.{name}" for name in self.never_run]
        return Layout(part="encoder", rules={f"{self.part}.*": ["*"]}, absent=absent, adapt=adapt)

    def shard_units(self) -> Sequence[nn.Module]:
        """The whole encoder as one unit."""
        return [self]


class VitEncoder(Encoder):
    """Patch features of a timm VisionTransformer: second-to-last block, no final norm, prefix tokens dropped.

    Has the arguments of `Encoder`.

    Source: ML-Mamba §3.2 and Prismatic VLMs (arXiv 2402.07865) §3: second-to-last layer.
    """

    part = "vit"
    never_run = NEVER_RUN
    vit: Any  # mypy types the attributes of timm's VisionTransformer as Tensor | Module

    def layout(self, tower: Any) -> tuple[int, int, Grid]:
        """The number of blocks of a tower (0 if it is not a ViT), its width, and the grid of its patches."""
        grid = getattr(getattr(tower, "patch_embed", None), "grid_size", None)
        if grid is None or not hasattr(tower, "blocks") or not hasattr(tower, "forward_intermediates"):
            return 0, 0, Grid(0, 0, 0)
        return len(tower.blocks), int(tower.embed_dim), Grid(1, *grid)

    def features(self, x: Tensor) -> Tensor:
        """Normalized (I, 3, S, S), I > 0 -> (I, N, D)."""
        (features,) = self.vit.forward_intermediates(
            x,
            indices=[len(self.vit.blocks) - 2],
            norm=False,
            stop_early=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
        return features

    def adapted(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """A file's tensors through timm's filter, without those of never-run modules that the tower lacks.

        Raises:
            ValueError: the patch sizes differ; timm would resample the patch embedding.
        """
        own = self.vit.state_dict()
        patch = own.get("patch_embed.proj.weight", torch.empty(0))
        for name, tensor in tensors.items():  # in every layout that timm reads, only the embedding has 3 channels
            if tensor.ndim == 4 and tensor.shape[:2] == patch.shape[:2] and tensor.shape != patch.shape:
                size, own_size = (" x ".join(map(str, shape[2:])) for shape in (tensor.shape, patch.shape))
                raise ValueError(f"{name} has {size}-pixel patches, but the encoder uses {own_size}-pixel patches")
        adapt = getattr(sys.modules[type(self.vit).__module__], "checkpoint_filter_fn", None)
        if adapt is not None:
            tensors = adapt(tensors, self.vit)
        return {name: tensor for name, tensor in tensors.items() if name in own or not _never_run(name)}


def _never_run(name: str) -> bool:
    """Return True if a module, tensor or setting of that name has no effect on the encoder."""
    return name.partition(".")[0] in NEVER_RUN


def timm_encoder(
    model: str, *, image_size: Pixels | None = None, resize: Resize = "resize-naive", weights: str = "none"
) -> VitEncoder:
    """Any timm ViT, by its timm name. Nothing is read or downloaded until weights are loaded.

    Args:
        model: timm's name, with or without a tag, e.g. `vit_large_patch14_reg4_dinov2.lvd142m`; the tag determines mean
            and std.
        image_size: side in pixels; the model's own if None.
        resize: how images are resized to it; always bicubic, even if the tag names another interpolation.
        weights: `none`; a safetensors file of a timm model, with or without classifier (`model` must then name the tag
            if the model's tags differ in mean, std or QuickGELU); a timm tag, downloaded from the Hub; or
            `local-dir:DIRECTORY`, a directory with the `config.json` and `model.safetensors` of a timm repository.

    Raises:
        ContractError: timm does not know the model or tag, the model is not a ViT or does not run on such images, the
            tag of a file is unknown, or the tag's weights need QuickGELU.
    """
    name, _, tag = model.partition(".")
    if not timm.is_model(name):
        raise ContractError(f"unknown timm model {name!r}. Similar names: {similar(name, timm.list_models())}")
    trained, quick = _tags(name), _quickgelu_name(name)
    source = parse_weights(weights, trained, name)
    tag = resolve_tag(source, tag, model, f"{name}.", trained, name == quick)
    if tag in trained and trained[tag].quick and name != quick:
        raise ContractError(
            f"the weights {tag!r} were trained with QuickGELU, but {name!r} does not use it, so answers would be "
            f"silently wrong; write model: {quick}.{tag}"
        )
    options = {} if image_size is None else {"img_size": image_size}
    create = partial(timm.create_model, f"{name}.{tag}" if tag else name, pretrained=False, num_classes=0, **options)
    try:
        vit = create()
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise ContractError(
            f"timm cannot build {model!r}{f' for images of {image_size} px' if image_size else ''} "
            f"({type(error).__name__}: {error}); its tags: {', '.join(trained) or 'none'}"
        ) from error
    config = vit.pretrained_cfg
    mean, std = config["mean"], config["std"]

    def hub() -> tuple[str, str]:
        if "hf_hub_id" not in config:
            raise ContractError(f"timm has {name}.{tag} only as a pickle, which is not read; see {config.get('url')}")
        return config["hf_hub_id"], config.get("hf_hub_filename") or WEIGHTS_FILE

    agrees = partial(_check_config, name, create, mean, std) if source.kind == "folder" else None
    path = weights_path(source, hub, WEIGHTS_FILE)
    size = image_size or config["input_size"][-1]
    return VitEncoder(vit, size=size, mean=mean, std=std, resize=resize, weights=path, agrees=agrees)


def _tags(name: str) -> dict[str, Trained]:
    """The preprocessing and activation that timm's pretrained weights of a model need, by tag."""
    quick = _quickgelu_name(name)
    quick_configs = get_arch_pretrained_cfgs(quick)
    configs = {full.partition(".")[2]: config for full, config in get_arch_pretrained_cfgs(name).items() if "." in full}
    return {tag: Trained(tuple(c.mean), tuple(c.std), f"{quick}.{tag}" in quick_configs) for tag, c in configs.items()}


def _quickgelu_name(name: str) -> str:
    """The model's QuickGELU variant, if timm has one; timm lists the tags of weights that need it for both models."""
    return name if "_quickgelu_" in name else name.replace("_clip_", "_clip_quickgelu_")


def _check_config(
    name: str,
    create: Callable[..., nn.Module],
    mean: Sequence[float],
    std: Sequence[float],
    config: Mapping[str, Any],
) -> None:
    """Reject a timm directory whose config states that its weights are of another encoder."""
    need(config, ["architecture"], "a ViT")
    architecture = str(config["architecture"])
    pretrained = config.get("pretrained_cfg", config)  # older timm configs have a single mapping
    if pretrained.get("tag") in _tags(_quickgelu_name(architecture)):
        architecture = _quickgelu_name(architecture)  # timm names the plain model even if its weights need QuickGELU
    if architecture != name:
        raise CheckpointError(f"contains weights of {architecture!r}, but the encoder is {name!r}")
    quick = name == _quickgelu_name(name)
    fitting = {tag: trained for tag, trained in _tags(name).items() if trained.quick == quick}
    require_statistics(pretrained, mean, std, f"{name}.", fitting)
    model_args = config.get("model_args", {})
    options = {k: value for k, value in model_args.items() if k not in IGNORED_ARGS and not k.endswith("_rate")}
    with torch.device("meta"):
        needed, own = (
            {key: value for key, value in module_settings(create(**args)).items() if not _never_run(key)}
            for args in (options, {})
        )
    require_same(f"contains weights of {name} with model_args {options}", own, needed)
