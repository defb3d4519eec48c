"""Every contract and every shape on one page.

Letters: B samples, I images, N = rows*columns patches of one map, L scanned length, K scan paths, M visual tokens of
one image, T positions, D width, E inner width, H heads, P head width, S state size, G groups, V vocabulary rows.

    Grid         (maps, rows, columns); maps > 1 only for a visual long sequence
    segments     (B, L) int32: 0, 1, 2, … in each row, -1 = padding. Only in `forward`: state never meets segments.
    lengths      (B,) real positions of each row; rows are right-padded
    paths        a scan order's K paths over a grid, and the way back; see `Paths`
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

IMAGE_PLACE, IGNORED = -1, -100  # the id at image places; the label of what is not supervised
Message = Mapping[str, str]  # {"role": "user" | "assistant", "content": text}; `<image>` in a content is one image

# A parameter annotated with one of these takes a component of that kind, bound to its options.
MixerPart = Annotated[Callable[..., nn.Module], Part("mixer")]
EncoderPart = Annotated[Callable[..., nn.Module], Part("encoder")]
FusionPart = Annotated[Callable[..., nn.Module], Part("fusion")]
ConnectorPart = Annotated[Callable[..., nn.Module], Part("connector")]
LanguageModelPart = Annotated[Callable[..., nn.Module], Part("language_model")]
PromptPart = Annotated[Callable[..., Any], Part("prompt")]


class Shards(NamedTuple):
    """A folder of shards in a bucket, and the folder on this machine that keeps what was fetched of it.

    Attributes:
        local: holds its `index.json`.
        remote: URL of the folder.
    """

    local: Path
    remote: str


class Stream(NamedTuple):
    """One of several sets of shards that are trained on together; at most one of the weights is set.

    Attributes:
        source: the directory of its shards, on this machine or in a bucket.
        proportion: its share of an epoch, relative to the others'.
        repeat: how often an epoch brings each of its samples.
        choose: how many of its samples an epoch brings.
        prompt: how its conversations are written; as the stage does if None.
    """

    source: Path | Shards
    proportion: float | None = None
    repeat: float | None = None
    choose: int | None = None
    prompt: Any = None


Data = Path | Shards | list[Stream]  # what a dataset gives: shards in a folder, in a bucket, or several of them
DatasetPart = Annotated[Callable[..., Data], Part("dataset")]


class Grid(NamedTuple):
    """How visual tokens lie: maps, rows, columns."""

    maps: int
    rows: int
    columns: int

    @property
    def length(self) -> int:
        """Scanned length L."""
        return self.maps * self.rows * self.columns


Resize = Literal["resize-naive", "resize-crop", "letterbox"]


class ImageSpec(NamedTuple):
    """What the loader makes of an image: RGB, `size` x `size` pixels, bicubic.

    Encoders with equal specs share one uint8 tensor; each normalises with its own mean and std.

    Attributes:
        size: S.
        resize: `resize-naive`: both sides to S; `resize-crop`: the shorter side to S, the middle of the longer;
            `letterbox`: the longer side to S, in the middle of a square of the colour `fill`.
        fill: red, green and blue, 0…255; black where nothing is filled, so that equal images have equal specs.
    """

    size: int
    resize: Resize = "resize-naive"
    fill: tuple[int, int, int] = (0, 0, 0)


ScanOrder = Callable[..., Tensor]
"""(grid) -> (K, L) int64, each row a permutation of range(L), always on the CPU; K does not depend on the grid."""

ScanOrderPart = Annotated[ScanOrder, Part("scan_order")]


class Paths(NamedTuple):
    """The paths of a scan order over one grid, on the device of the input; both (K, L) int64."""

    order: Tensor  # path k reads raster position order[k, i] at its step i
    inverse: Tensor  # raster position j is step inverse[k, j] of path k

    @classmethod
    def of(cls, order: Tensor) -> Self:
        """The paths (K, L), with their inverse."""
        return cls(order, torch.argsort(order, dim=-1))


@runtime_checkable
class State(Protocol):
    """What a recurrent part remembers of each row: fixed shape, updated in place by `step` and `prefill`."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""

    def rows(self, index: Tensor | Sequence[int]) -> Self:
        """A copy of these rows, in this order."""

    def write(self, index: Tensor | Sequence[int], other: Self) -> None:
        """Overwrite these rows with the rows of `other`."""

    def clone(self) -> Self:
        """A copy."""


@runtime_checkable
class Mixer(Protocol):
    """Mixes positions. Built with `width` and `num_paths`."""

    def forward(self, x: Tensor, paths: Paths | None = None, segments: Tensor | None = None) -> Tensor:
        """X (B, L, D), K paths of L, segments (B, L) -> (B, L, D); training and connectors, no state."""

    def prefill(self, x: Tensor, lengths: Tensor, state: Any) -> Tensor:
        """X (B, L, D) right-padded, lengths (B,) -> (B, L, D); causal; advances `state`; no gradients."""

    def step(self, x: Tensor, state: Any) -> Tensor:
        """X (B, D) -> (B, D); advances `state` in place; no gradients."""

    def new_state(self, rows: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Any:
        """A state of `rows` rows that has seen nothing: a named tuple of tensors, rows first."""


@runtime_checkable
class VisionEncoder(Protocol):
    """uint8 pixels -> patch features. Normalises itself.

    `weights` names its file: `none`, a file or folder, the id of a model in the hub, or `hf-hub:owner/model/FILE`. It
    is read in a layout registered as a `checkpoint`, or in the one that the encoder's method
    `weights_layout(names, config)` returns, if it has that. `build_model` reads it; no encoder does so itself.
    """

    width: int
    grid: Grid
    image_spec: ImageSpec
    weights: str

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels uint8 (I, 3, S, S) -> (I, N, D); I = 0 is allowed."""

    def shard_units(self) -> Sequence[nn.Module]:
        """Modules that are sharded as one each."""


@runtime_checkable
class Fusion(Protocol):
    """Features of several encoders -> one sequence. Built with `widths` and `grids` by encoder."""

    width: int
    grid: Grid

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """{encoder: (I, N, D_i)} -> (I, L, D)."""


@runtime_checkable
class Connector(Protocol):
    """Fused features -> visual tokens. Built with `in_width`, `out_width`, `grid`."""

    def num_tokens(self, grid: Grid) -> int:
        """M, the visual tokens of one image."""

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """X (I, L, in_width) -> (I, M, out_width)."""

    def shard_units(self) -> Sequence[nn.Module]:
        """Modules that are sharded as one each."""


@runtime_checkable
class LanguageModel(Protocol):
    """Token ids -> logits, in parts. `num_tokens` ids exist; the `vocab_rows - num_tokens` others are never sampled.

    `weights` is what its option of that name says: `none`, a file or folder of a layout that is registered as a
    `checkpoint`, or the id of a model in the hub. `build_model(weights="recipe")` reads it; no model does so itself.
    """

    width: int
    vocab_rows: int
    num_tokens: int
    recurrent: bool
    weights: str

    def embed(self, ids: Tensor) -> Tensor:
        """Ids (B, T) -> (B, T, D)."""

    def backbone(self, embeds: Tensor, segments: Tensor | None = None) -> Tensor:
        """Embeds (B, T, D) -> hidden (B, T, D)."""

    def prefill(self, embeds: Tensor, lengths: Tensor, state: Any) -> Tensor:
        """Embeds (B, T, D) -> hidden (B, T, D); advances `state`. Long prompts come in chunks, of which a row that has
        ended has length 0.
        """

    def step(self, embeds: Tensor, state: Any) -> Tensor:
        """Embeds (B, D) -> hidden (B, D); advances `state` in place."""

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden (*, D) -> logits (*, V)."""

    def new_state(self, rows: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Any:
        """A state of `rows` rows that has seen nothing."""

    def shard_units(self) -> Sequence[nn.Module]:
        """Modules that are sharded as one each."""


class Piece(NamedTuple):
    """A stretch of a prompt.

    What stands between two answers is tokenised as one text, an answer with its end as another. `template` text may
    hold special tokens; any other text came from a user and is never parsed for them.
    """

    text: str
    supervised: bool = False
    template: bool = False


@runtime_checkable
class Prompt(Protocol):
    """How a conversation is written.

    Images come before all text, or `in_place`, where the user's text has `<image>` marks; without marks in place means
    before the first question, each on a line of its own.
    """

    image_placement: Literal["before_all_text", "in_place"]

    def pieces(self, conversation: Sequence[Message], end: str) -> list[Piece]:
        """The text to read; it ends where the assistant's answer begins if the last message is the user's."""
