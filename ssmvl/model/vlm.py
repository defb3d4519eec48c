"""VisionLanguageModel: encode -> fuse -> connect -> splice -> language model. Holds built parts, no recipe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from ssmvl.interfaces import Connector, Fusion, Grid, ImageSpec, LanguageModel, VisionEncoder
from ssmvl.ops.splice import require_filled, splice

__all__ = ["VisionLanguageModel"]

CHUNK = 1024  # positions that a prefill embeds and reads at a time
Images = Mapping[ImageSpec, Tensor]


class VisionLanguageModel(nn.Module):
    """A vision-language model made of the given parts.

    Args:
        encoders: vision encoders by name.
        fusion: fuses their features.
        connector: turns these into visual tokens as wide as the language model.
        language: the language model.
    """

    def __init__(
        self, encoders: Mapping[str, nn.Module], fusion: nn.Module, connector: nn.Module, language: nn.Module
    ) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict(encoders)
        self.fusion = fusion
        self.connector = connector
        self.language = language

    @property
    def grid(self) -> Grid:
        """Grid of the fused features."""
        return cast(Fusion, self.fusion).grid

    @property
    def tokens_per_image(self) -> int:
        """M, the visual tokens of one image."""
        return cast(Connector, self.connector).num_tokens(self.grid)

    @property
    def image_specs(self) -> tuple[ImageSpec, ...]:
        """Distinct image specs of the encoders, in their order."""
        return tuple(dict.fromkeys(cast(VisionEncoder, encoder).image_spec for encoder in self.encoders.values()))

    def forward(
        self,
        ids: Tensor,
        image_positions: Tensor,
        label_positions: Tensor,
        images: Images,
        segments: Tensor | None = None,
    ) -> Tensor:
        """Compute the logits at the supervised positions only.

        Args:
            ids: (B, T), -1 at image places.
            image_positions: (I*M,) flat indices of the image places.
            label_positions: (n,) flat indices of the positions that predict a supervised token.
            images: {spec: uint8 (I, 3, S, S)}.
            segments: (B, T) if rows are packed.

        Returns:
            (n, V).

        Raises:
            ShapeError: the numbers of images and image places do not match.
        """
        language = cast(LanguageModel, self.language)
        embeds = language.embed(ids.clamp(min=0))
        if next(iter(images.values())).shape[0]:
            embeds = splice(embeds, self.encode(images), image_positions)
        else:
            # Every rank must run every part, else sharded ranks that do have images would wait for this one.
            blank = {spec: pixels.new_zeros(1, *pixels.shape[1:]) for spec, pixels in images.items()}
            embeds = splice(embeds, embeds.new_empty(0, 1, embeds.shape[-1]), image_positions)
            embeds = embeds + 0 * self.encode(blank).sum().to(embeds.dtype)
        hidden = language.backbone(embeds, segments)
        return language.head(hidden.flatten(0, 1)[label_positions])

    def encode(self, images: Images) -> Tensor:
        """{spec: uint8 (I, 3, S, S)} -> visual tokens (I, M, D)."""
        features = {name: encoder(images[encoder.image_spec]) for name, encoder in self.encoders.items()}
        return self.connector(self.fusion(features), self.grid)

    def prefill(self, ids: Tensor, lengths: Tensor, visual: Tensor, image_positions: Tensor, state: Any) -> Tensor:
        """Read rows into `state`, `CHUNK` positions at a time.

        Apart from ids and visual tokens, memory does not grow with T.

        Args:
            ids: (B, T) right-padded, -1 at image places.
            lengths: (B,) real positions, each at least 1.
            visual: (I, M, D) visual tokens.
            image_positions: (I*M,) flat indices of the image places.
            state: advanced in place.

        Returns:
            (B, V), logits after each row's last real position.

        Raises:
            ShapeError: the numbers of images and image places do not match.
        """
        language, tokens = cast(LanguageModel, self.language), visual.flatten(0, 1)
        if ids.shape[1] <= CHUNK:  # the usual case; the loop below waits for the GPU in each chunk
            embeds = splice(language.embed(ids.clamp(min=0)), visual, image_positions)
            hidden = language.prefill(embeds, lengths, state)
            return language.head(hidden[torch.arange(len(ids), device=ids.device), lengths - 1])
        require_filled(visual, image_positions)
        columns = image_positions % ids.shape[1]  # of the image places
        last = torch.zeros((), device=ids.device)
        for start in range(0, ids.shape[1], CHUNK):
            chunk = ids[:, start : start + CHUNK]
            length, inside = chunk.shape[1], (columns >= start) & (columns < start + CHUNK)
            flat = image_positions[inside] // ids.shape[1] * length + columns[inside] - start
            embeds = splice(language.embed(chunk.clamp(min=0)), tokens[None, inside], flat)
            hidden = language.prefill(embeds, (lengths - start).clamp(0, length), state)
            end = lengths - 1 - start
            states = hidden[torch.arange(len(ids), device=ids.device), end.clamp(0, length - 1)]
            last = torch.where(((end >= 0) & (end < length))[:, None], states, last.to(states.dtype))
        return language.head(last)

    def step(self, ids: Tensor, state: Any) -> Tensor:
        """Advance `state` in place by one token per row: ids (B,) -> logits (B, V)."""
        language = cast(LanguageModel, self.language)
        return language.head(language.step(language.embed(ids), state))

    def shard_units(self) -> Iterator[nn.Module]:
        """Yield the modules that are sharded as one unit each, except for the model itself."""
        for part in (*self.encoders.values(), self.connector, self.language):
            yield from part.shard_units()
