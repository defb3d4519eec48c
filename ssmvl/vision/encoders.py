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

FREE = (  # of a folder's model_args, with all rates of dropout: no feature depends on them
    *("img_size", "dynamic_img_size", "dynamic_img_pad", "weight_init", "fix_init"),
    *("num_classes", "global_pool", "pool_include_prefix"),
)
NEVER_RUN = ("norm", "attn_pool", "fc_norm", "head", "head_dist")  # of a model's modules: they come after the blocks


class Encoder(nn.Module, ABC):
    """What the encoders of every library share; a subclass adds `part`, `layout`, `features` and `adapted`.

    Args:
        tower: computes the features; it becomes the attribute that `part` names.
        size: side of its input in pixels.
        mean: per channel, of pixels in 0…1.
        std: per channel, of pixels in 0…1.
        resize: how the loader brings an image to that size; a letterbox has the colour `mean`.
        weights: where its weights are, see `ssmvl.interfaces.VisionEncoder`.
        prefix: of the names in that file.
        agrees: raises CheckpointError if the config beside that file describes another encoder; None to ignore it.

    Raises:
        ContractError: `tower` is no ViT of two blocks or more, or its input is smaller than a patch; on `meta` also: it
            fails on its input or gives other than one feature for each position of its grid.
    """

    part: ClassVar[str]
    never_run: ClassVar[tuple[str, ...]] = ()  # modules of the tower that no feature depends on: a file may lack them

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
                f"{type(tower).__name__} is no ViT of two blocks or more; features come from the last but one"
            )
        if not self.grid.length:
            raise ContractError(f"images of {size} px are smaller than one patch; give a larger image_size")
        self.add_module(self.part, tower)
        self.mean, self.std = tuple(mean), tuple(std)  # no buffers: a cast to bf16 would round them
        red, green, blue = (int(255 * value) for value in mean)  # cut off, as Prismatic does
        self.image_spec = ImageSpec(size, resize, (red, green, blue) if resize == "letterbox" else (0, 0, 0))
        self.weights, self._prefix, self._agrees = weights, prefix, agrees
        if next(self.parameters()).is_meta:  # `build_model` begins there, and nothing is computed
            self._require_features()

    def _require_features(self) -> None:
        """Refuse a tower that fails when run or gives another grid. A twin is run: ConViT keeps tables it made."""
        twin, size = copy.deepcopy(self), self.image_spec.size
        what = f"{type(getattr(self, self.part)).__name__} on images of {size} x {size} px"
        try:
            with torch.no_grad():
                found = tuple(twin(torch.zeros(1, 3, size, size, dtype=torch.uint8, device="meta")).shape)
        except FAILURES as error:
            raise ContractError(
                f"{what} fails ({type(error).__name__}: {error}); give another image_size or model"
            ) from error
        if found != (1, self.grid.length, self.width):
            raise ContractError(
                f"{what} gives {found}, its grid is {self.grid.rows} x {self.grid.columns} of width {self.width}; "
                "give another image_size or model"
            )

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels uint8 (I, 3, S, S) -> (I, N, D), in the dtype of the weights, autocast or not."""
        x = self.normalise(pixels)
        if not len(pixels):  # towers reshape by the number of images
            return x.new_empty(0, self.grid.length, self.width)
        return self.features(x).to(x.dtype)

    def normalise(self, pixels: Tensor) -> Tensor:
        """uint8 (I, 3, S, S) -> what the tower takes: computed in fp32 at least, then in the dtype of its weights."""
        dtype = next(p.dtype for p in self.parameters() if p.is_floating_point())
        planes = pixels.to(torch.promote_types(dtype, torch.float32)).unbind(1)
        scaled = [(plane / 255 - m) / s for plane, m, s in zip(planes, self.mean, self.std, strict=True)]
        return torch.stack(scaled, dim=1).to(dtype)

    @abstractmethod
    def layout(self, tower: Any) -> tuple[int, int, Grid]:
        """A tower's number of blocks, 0 if it is no ViT; its width; the grid of its patches."""

    @abstractmethod
    def features(self, x: Tensor) -> Tensor:
        """Normalised (I, 3, S, S), I > 0 -> (I, N, D)."""

    @abstractmethod
    def adapted(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of a file by the tower's names, positions of another image size resampled as the library does."""

    def weights_layout(self, names: Collection[str], config: Mapping[str, Any]) -> Layout:
        """The layout of the file that `weights` names, of which these are the tensors' names and the `config.json`.

        Raises:
            CheckpointError: no name has the encoder's prefix, or the config describes another encoder.
        """
        if not any(name.startswith(self._prefix) for name in names):
            raise CheckpointError(f"holds no tensor named {self._prefix}*, but {', '.join(sorted(names)[:5])}, …")
        if self._agrees is not None:
            self._agrees(config)

        def adapt(tensors: dict[str, Tensor], module: Encoder) -> dict[str, Tensor]:
            cut = len(self._prefix)
            return module.adapted({n[cut:]: t for n, t in tensors.items() if n.startswith(self._prefix)})

        absent = [f"{self.part}.{name}" for name in self.never_run]
        return Layout(part="encoder", rules={f"{self.part}.*": ["*"]}, absent=absent, adapt=adapt)

    def shard_units(self) -> Sequence[nn.Module]:
        """The encoder as a whole."""
        return [self]


class VitEncoder(Encoder):
    """Patch features of a timm VisionTransformer: second-to-last block, no final norm, prefix tokens dropped.

    Takes the arguments of `Encoder`.

    Source: ML-Mamba §3.2 and Prismatic VLMs (arXiv 2402.07865) §3: second-to-last layer.
    """

    part = "vit"
    never_run = NEVER_RUN
    vit: Any  # what timm's VisionTransformer offers is typed as Tensor | Module

    def layout(self, tower: Any) -> tuple[int, int, Grid]:
        """A tower's number of blocks, 0 if it is no ViT; its width; the grid of its patches."""
        grid = getattr(getattr(tower, "patch_embed", None), "grid_size", None)
        if grid is None or not hasattr(tower, "blocks") or not hasattr(tower, "forward_intermediates"):
            return 0, 0, Grid(0, 0, 0)
        return len(tower.blocks), int(tower.embed_dim), Grid(1, *grid)

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

    def adapted(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """By timm's filter. Tensors of modules that are never run are left out where the tower lacks them.

        Raises:
            ValueError: the patches are of another size; timm would resample them too.
        """
        own = self.vit.state_dict()
        patch = own.get("patch_embed.proj.weight", torch.empty(0))
        for name, tensor in tensors.items():  # of every layout that timm reads, and only the embedding has 3 channels
            if tensor.ndim == 4 and tensor.shape[:2] == patch.shape[:2] and tensor.shape != patch.shape:
                theirs, mine = (" x ".join(map(str, shape[2:])) for shape in (tensor.shape, patch.shape))
                raise ValueError(f"{name} is of patches of {theirs} px, the encoder's are {mine} px")
        adapt = getattr(sys.modules[type(self.vit).__module__], "checkpoint_filter_fn", None)
        if adapt is not None:
            tensors = adapt(tensors, self.vit)
        return {name: tensor for name, tensor in tensors.items() if name in own or not _never_run(name)}


def _never_run(name: str) -> bool:
    """Whether a module, tensor or setting of that name is of no use to the encoder."""
    return name.partition(".")[0] in NEVER_RUN


def timm_encoder(
    model: str, *, image_size: Pixels | None = None, resize: Resize = "resize-naive", weights: str = "none"
) -> VitEncoder:
    """Any ViT of timm, by its name there. Nothing is read or fetched until weights are loaded.

    Args:
        model: timm's name, with or without a tag, e.g. `vit_large_patch14_reg4_dinov2.lvd142m`; the tag decides mean
            and std.
        image_size: side in pixels; the model's own if None.
        resize: how an image is brought to that size; bicubic, whatever interpolation the tag names.
        weights: `none`; a safetensors file with timm's model, its classifier not needed, and the tag written where
            the model's tags differ in mean, std or QuickGELU; a tag of timm's, fetched from the hub;
            `local-dir:FOLDER`, a folder with the `config.json` and `model.safetensors` of one of timm's repositories.

    Raises:
        ContractError: timm has no such model or tag, it is no ViT or cannot be run on such images, a file's tag is not
            known, or the tag's weights need QuickGELU.
    """
    name, _, tag = model.partition(".")
    if not timm.is_model(name):
        raise ContractError(f"timm has no model {name!r}; similar names there: {similar(name, timm.list_models())}")
    trained, quick = _tags(name), _quick(name)
    source = parse_weights(weights, trained, name)
    tag = resolve_tag(source, tag, model, f"{name}.", trained, name == quick)
    if tag in trained and trained[tag].quick and name != quick:
        raise ContractError(
            f"the weights {tag!r} were trained with QuickGELU, which {name!r} lacks: answers would be silently wrong; "
            f"write model: {quick}.{tag}"
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
            raise ContractError(f"timm has {name}.{tag} as a pickle only, which is not read; see {config.get('url')}")
        return config["hf_hub_id"], config.get("hf_hub_filename") or WEIGHTS_FILE

    agrees = partial(_agrees, name, create, mean, std) if source.kind == "folder" else None
    place = weights_path(source, hub, WEIGHTS_FILE)
    size = image_size or config["input_size"][-1]
    return VitEncoder(vit, size=size, mean=mean, std=std, resize=resize, weights=place, agrees=agrees)


def _tags(name: str) -> dict[str, Trained]:
    """What timm's pretrained weights of a model need, by tag."""
    quick = get_arch_pretrained_cfgs(_quick(name))
    found = ((full.partition(".")[2], config) for full, config in get_arch_pretrained_cfgs(name).items() if "." in full)
    return {tag: Trained(tuple(c.mean), tuple(c.std), f"{_quick(name)}.{tag}" in quick) for tag, c in found}


def _quick(name: str) -> str:
    """The model that has QuickGELU in its place, if timm has one: it repeats the tags of weights that need it."""
    return name if "_quickgelu_" in name else name.replace("_clip_", "_clip_quickgelu_")


def _agrees(
    name: str,
    create: Callable[..., nn.Module],
    mean: Sequence[float],
    std: Sequence[float],
    config: Mapping[str, Any],
) -> None:
    """Refuse a folder of timm's whose config says that its weights are those of another encoder."""
    need(config, ["architecture"], "a ViT")
    found = str(config["architecture"])
    pretrained = config.get("pretrained_cfg", config)  # older folders have one mapping
    if pretrained.get("tag") in _tags(_quick(found)):
        found = _quick(found)  # timm's folders name the model without QuickGELU even where its weights need it
    if found != name:
        raise CheckpointError(f"its weights are those of {found!r}, the encoder is {name!r}")
    fitting = {tag: need for tag, need in _tags(name).items() if need.quick == (name == _quick(name))}
    require_statistics(pretrained, mean, std, f"{name}.", fitting)
    given = config.get("model_args", {}).items()
    options = {key: value for key, value in given if key not in FREE and not key.endswith("_rate")}
    with torch.device("meta"):
        needed, own = (
            {key: value for key, value in module_settings(create(**given)).items() if not _never_run(key)}
            for given in (options, {})
        )
    require_same(f"its weights are those of {name} with model_args {options}", own, needed)
