"""VisionLanguageModel: encode -> fuse -> connect -> splice -> language model. Holds built parts, knows no recipe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from ssmvl.interfaces import Connector, Fusion, Grid, ImageSpec, LanguageModel, VisionEncoder
from ssmvl.ops.splice import require_filled, splice

__all__ = ["VisionLanguageModel"]

CHUNK = 1024  # positions that a prefill embeds and reads at once
Images = Mapping[ImageSpec, Tensor]


class VisionLanguageModel(nn.Module):
    """A vision-language model of given parts.

    Args:
        encoders: vision encoders by name.
        fusion: joins their features.
        connector: makes visual tokens of them, as wide as the language model.
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
        """How the fused features lie."""
        return cast(Fusion, self.fusion).grid

    @property
    def tokens_per_image(self) -> int:
        """M, the visual tokens of one image."""
        return cast(Connector, self.connector).num_tokens(self.grid)

    @property
    def image_specs(self) -> tuple[ImageSpec, ...]:
        """Each different input of the encoders, once, in their order."""
        return tuple(dict.fromkeys(cast(VisionEncoder, encoder).image_spec for encoder in self.encoders.values()))

    def forward(
        self,
        ids: Tensor,
        image_positions: Tensor,
        label_positions: Tensor,
        images: Images,
        segments: Tensor | None = None,
    ) -> Tensor:
        """Logits at the supervised positions only.

        Args:
            ids: (B, T), -1 at image places.
            image_positions: (I*M,) flat indices of the image places.
            label_positions: (n,) flat indices of the positions that predict a supervised token.
            images: {spec: uint8 (I, 3, S, S)}.
            segments: (B, T) where rows are packed.

        Returns:
            (n, V).

        Raises:
            ShapeError: images and image places do not match in number.
        """
        language = cast(LanguageModel, self.language)
        embeds = language.embed(ids.clamp(min=0))
        if next(iter(images.values())).shape[0]:
            embeds = splice(embeds, self.encode(images), image_positions)
        else:
            # Every rank must touch every part, or sharded ranks that do have images would wait for this one.
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
        """Read rows into `state`, `CHUNK` positions at a time: memory grows with T by ids and visual tokens only.

        Args:
            ids: (B, T) right-padded, -1 at image places.
            lengths: (B,) real positions, each at least 1.
            visual: (I, M, D) visual tokens.
            image_positions: (I*M,) flat indices of the image places.
            state: advanced in place.

        Returns:
            (B, V), logits after each row's last real position.

        Raises:
            ShapeError: images and image places do not match in number.
        """
        language, tokens = cast(LanguageModel, self.language), visual.flatten(0, 1)
        if ids.shape[1] <= CHUNK:  # as most are; the general way waits for a GPU in each chunk
            embeds = splice(language.embed(ids.clamp(min=0)), visual, image_positions)
            hidden = language.prefill(embeds, lengths, state)
            return language.head(hidden[torch.arange(len(ids), device=ids.device), lengths - 1])
        require_filled(visual, image_positions)
        places = image_positions % ids.shape[1]  # of the image places in their rows
        last = torch.zeros((), device=ids.device)
        for start in range(0, ids.shape[1], CHUNK):
            chunk = ids[:, start : start + CHUNK]
            length, inside = chunk.shape[1], (places >= start) & (places < start + CHUNK)
            flat = image_positions[inside] // ids.shape[1] * length + places[inside] - start
            embeds = splice(language.embed(chunk.clamp(min=0)), tokens[None, inside], flat)
            hidden = language.prefill(embeds, (lengths - start).clamp(0, length), state)
            end = lengths - 1 - start
            found = hidden[torch.arange(len(ids), device=ids.device), end.clamp(0, length - 1)]
            last = torch.where(((end >= 0) & (end < length))[:, None], found, last.to(found.dtype))
        return language.head(last)

    def step(self, ids: Tensor, state: Any) -> Tensor:
        """Ids (B,) -> logits (B, V); `state` advances in place."""
        language = cast(LanguageModel, self.language)
        return language.head(language.step(language.embed(ids), state))

    def shard_units(self) -> Iterator[nn.Module]:
        """Modules that are sharded as one each, the model itself excepted."""
        for part in (*self.encoders.values(), self.connector, self.language):
            yield from part.shard_units()
