"""Contracts of all component kinds, with every tensor shape.

Letters: B rows of a batch, I images, N = rows * columns patches of one map, L scanned length, K scan paths, M visual
tokens per image, T positions, D width, E inner width, H heads, P head width, S state size (or side of an image),
G groups, V vocabulary rows.

    Grid         (maps, rows, columns); maps > 1 only if fusion concatenates several maps into one long sequence
    segments     (B, L) int32: number of the packed sample (0, 1, 2, …), -1 = padding; never combined with a state
    lengths      (B,) real positions per row, right-padded; 0 if a row ended before this chunk of a long prompt
    paths        a scan order's K paths over a grid and their inverses; see `Paths`
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn

from ssmvl.registry import Check, Count, Depth, Part, Pixels, Register, Seed

__all__ = [
    "Check",
    "Count",
    "Depth",
    "Part",
    "Pixels",
    "Register",
    "Seed",
    "IMAGE_PLACE",
    "IGNORED",
    "Message",
    "MixerPart",
    "EncoderPart",
    "FusionPart",
    "ConnectorPart",
    "LanguageModelPart",
    "PromptPart",
    "Shards",
    "Stream",
    "Data",
    "DatasetPart",
    "Grid",
    "Resize",
    "ImageSpec",
    "ScanOrder",
    "ScanOrderPart",
    "Paths",
    "State",
    "Mixer",
    "VisionEncoder",
    "Fusion",
    "Connector",
    "LanguageModel",
    "Piece",
    "Prompt",
]

IMAGE_PLACE, IGNORED = -1, -100  # the id at image places; the label of unsupervised positions
Message = Mapping[str, str]  # {"role": "user" | "assistant", "content": text}; the user's text may have `<image>` marks

# A parameter annotated with one of these takes a component of that kind, with its options bound.
MixerPart = Annotated[Callable[..., nn.Module], Part("mixer")]
EncoderPart = Annotated[Callable[..., nn.Module], Part("encoder")]
FusionPart = Annotated[Callable[..., nn.Module], Part("fusion")]
ConnectorPart = Annotated[Callable[..., nn.Module], Part("connector")]
LanguageModelPart = Annotated[Callable[..., nn.Module], Part("language_model")]
PromptPart = Annotated[Callable[..., Any], Part("prompt")]


class Shards(NamedTuple):
    """Shards in a bucket, with the local directory that caches them.

    Attributes:
        local: the cache directory; it already holds the shards' `index.json`.
        remote: URL of the shards' directory.
    """

    local: Path
    remote: str


class Stream(NamedTuple):
    """One of several sets of shards in a training mix. At most one of `proportion`, `repeat` and `choose` is set.

    Attributes:
        source: directory of the shards, local or in a bucket.
        proportion: share of an epoch, relative to the other streams.
        repeat: number of times that an epoch contains each sample.
        choose: number of samples per epoch.
        prompt: prompt format of the conversations; None means the stage's.
    """

    source: Path | Shards
    proportion: float | None = None
    repeat: float | None = None
    choose: int | None = None
    prompt: Any = None


Data = Path | Shards | list[Stream]  # what a dataset returns: a directory of shards, shards in a bucket, or a mix
DatasetPart = Annotated[Callable[..., Data], Part("dataset")]


class Grid(NamedTuple):
    """Grid of visual features: number of maps, and rows and columns of each map."""

    maps: int
    rows: int
    columns: int

    @property
    def length(self) -> int:
        """Scanned length L = maps * rows * columns."""
        return self.maps * self.rows * self.columns


Resize = Literal["resize-naive", "resize-crop", "letterbox"]


class ImageSpec(NamedTuple):
    """Image format that an encoder expects: RGB, S x S pixels, bicubic resizing.

    Encoders with equal specs share one uint8 tensor; each normalizes it with its own mean and std.

    Attributes:
        size: S.
        resize: `resize-naive` scales both sides to S; `resize-crop` scales the shorter side to S and crops the center;
            `letterbox` scales the longer side to S and centers the image on a square of color `fill`.
        fill: red, green and blue, 0…255; black unless `resize` is `letterbox`, so that equal images have equal specs.
    """

    size: int
    resize: Resize = "resize-naive"
    fill: tuple[int, int, int] = (0, 0, 0)


ScanOrder = Callable[..., Tensor]
"""(grid) -> (K, L) int64 on the CPU, each row a permutation of range(L). K is the same for every grid."""

ScanOrderPart = Annotated[ScanOrder, Part("scan_order")]


class Paths(NamedTuple):
    """Paths of a scan order over one grid and their inverses, both (K, L) int64, on the input's device."""

    order: Tensor  # path k reads raster position order[k, i] at step i
    inverse: Tensor  # path k reads raster position j at step inverse[k, j]

    @classmethod
    def of(cls, order: Tensor) -> Self:
        """Complete the paths `order` (K, L) with their inverses."""
        return cls(order, torch.argsort(order, dim=-1))


@runtime_checkable
class State(Protocol):
    """Recurrent state of each row of a batch. Its shapes are fixed; `step` and `prefill` update it in place."""

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""

    def rows(self, index: Tensor | Sequence[int]) -> Self:
        """Copy the rows `index`, in that order."""

    def write(self, index: Tensor | Sequence[int], other: Self) -> None:
        """Overwrite the rows `index` with the rows of `other`."""

    def clone(self) -> Self:
        """Copy all rows."""


@runtime_checkable
class Mixer(Protocol):
    """Layer that mixes positions. Built with `width` and `num_paths`."""

    def forward(self, x: Tensor, paths: Paths | None = None, segments: Tensor | None = None) -> Tensor:
        """X (B, L, D), K paths over L, segments (B, L) -> (B, L, D). For training and connectors; uses no state."""

    def prefill(self, x: Tensor, lengths: Tensor, state: Any) -> Tensor:
        """X (B, L, D) right-padded, lengths (B,) -> (B, L, D). Causal; no gradients; updates `state` in place."""

    def step(self, x: Tensor, state: Any) -> Tensor:
        """X (B, D) -> (B, D). No gradients; updates `state` in place."""

    def new_state(self, rows: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Any:
        """Create the initial state for `rows` rows: a named tuple of tensors whose first axis is the rows."""


@runtime_checkable
class VisionEncoder(Protocol):
    """uint8 pixels -> patch features, normalization included.

    `weights` names the pretrained weights: `none`, a file or directory, the id of a model on the Hub, or
    `hf-hub:owner/model/FILE`. `build_model` reads them; the encoder never does. Their layout is the one returned by the
    encoder's method `weights_layout(names, config)` if it has one, otherwise a registered `checkpoint`.
    """

    width: int
    grid: Grid
    image_spec: ImageSpec
    weights: str

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels uint8 (I, 3, S, S) -> (I, N, D). I = 0 is allowed."""

    def shard_units(self) -> Sequence[nn.Module]:
        """Return the submodules that FSDP shards as units."""


@runtime_checkable
class Fusion(Protocol):
    """Features of several encoders -> one sequence. Built with `widths` and `grids`, both by encoder name."""

    width: int
    grid: Grid

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """{encoder: (I, N, D_i)} -> (I, L, D)."""


@runtime_checkable
class Connector(Protocol):
    """Fused features -> visual tokens. Built with `in_width`, `out_width` and `grid`."""

    def num_tokens(self, grid: Grid) -> int:
        """Return M, the number of visual tokens per image."""

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """X (I, L, in_width) -> (I, M, out_width)."""

    def shard_units(self) -> Sequence[nn.Module]:
        """Return the submodules that FSDP shards as units."""


@runtime_checkable
class LanguageModel(Protocol):
    """Token ids -> logits, in parts. Ids from `num_tokens` up to `vocab_rows` are padding and never sampled.

    `recurrent`: samples may be packed into one row. `weights` names the pretrained weights: `none`, a file or directory
    in a layout registered as a `checkpoint`, or the id of a model on the Hub. `build_model(weights="recipe")` reads
    them; the language model never does.
    """

    width: int
    vocab_rows: int
    num_tokens: int
    recurrent: bool
    weights: str

    def embed(self, ids: Tensor) -> Tensor:
        """Ids (B, T) -> (B, T, D)."""

    def backbone(self, embeds: Tensor, segments: Tensor | None = None) -> Tensor:
        """Embeds (B, T, D), segments (B, T) -> hidden (B, T, D). For training; uses no state."""

    def prefill(self, embeds: Tensor, lengths: Tensor, state: Any) -> Tensor:
        """Embeds (B, T, D) right-padded, lengths (B,) -> hidden (B, T, D). Updates `state` in place."""

    def step(self, embeds: Tensor, state: Any) -> Tensor:
        """Embeds (B, D) -> hidden (B, D). Updates `state` in place."""

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden (*, D) -> logits (*, V)."""

    def new_state(self, rows: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Any:
        """Create the initial state for `rows` rows."""

    def shard_units(self) -> Sequence[nn.Module]:
        """Return the submodules that FSDP shards as units."""


class Piece(NamedTuple):
    """Part of a formatted conversation.

    Everything between two answers is tokenized as one text, and so is an answer with its end token. Special tokens are
    recognized only in `template` text; any other text comes from users and is never parsed for them.
    """

    text: str
    supervised: bool = False
    template: bool = False


@runtime_checkable
class Prompt(Protocol):
    """Prompt format: conversation -> pieces of text.

    `image_placement` is `before_all_text`, or `in_place`: images replace the `<image>` marks in the user's text. If a
    conversation has no marks, `in_place` puts the images before the first question, each on its own line.
    """

    image_placement: Literal["before_all_text", "in_place"]

    def pieces(self, conversation: Sequence[Message], end: str) -> list[Piece]:
        """Format a conversation. If its last message is the user's, the text ends where the answer begins."""
