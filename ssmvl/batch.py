"""The ragged batch: collated, counted, split by samples, and padded or packed into what the model takes.

    ids, labels      lists of 1-D tensors, one per sample; `ids` first (StreamingDataLoader counts the first value)
    images           {ImageSpec: uint8 (I, 3, S, S)}
    num_images       (B,)
    sample_ids       list of names

A plain mapping, because Composer moves only mappings and sequences to a device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ssmvl.interfaces import IGNORED, IMAGE_PLACE

Batch = dict[str, Any]


def collate(samples: Sequence[Mapping[str, Any]]) -> Batch:
    """Samples of the processor, each with an optional "id" -> one ragged batch."""
    specs = samples[0]["images"].keys()
    return {
        "ids": [sample["ids"] for sample in samples],
        "labels": [sample["labels"] for sample in samples],
        "images": {spec: torch.cat([sample["images"][spec] for sample in samples]) for spec in specs},
        "num_images": torch.tensor([len(next(iter(sample["images"].values()))) for sample in samples]),
        "sample_ids": [sample.get("id", "") for sample in samples],
    }


def num_samples(batch: Batch) -> int:
    """Samples of the data set in this batch; Composer's resume position is counted in them."""
    return len(batch["ids"])


def num_tokens(batch: Batch) -> dict[str, int]:
    """Tokens in this batch, image places included, and those that carry loss."""
    return {
        "total": sum(len(ids) for ids in batch["ids"]),
        "loss_generating": sum(int((labels[1:] != IGNORED).sum()) for labels in batch["labels"]),
    }


def split_batch(batch: Batch, size: int) -> list[Batch]:
    """Batches of `size` samples (the last may be smaller), each with its own samples' images."""
    ends = batch["num_images"].cumsum(0).tolist()
    parts = []
    for start in range(0, num_samples(batch), size):
        stop = min(start + size, num_samples(batch))
        images = slice(ends[start - 1] if start else 0, ends[stop - 1])
        parts.append(
            {
                "ids": batch["ids"][start:stop],
                "labels": batch["labels"][start:stop],
                "images": {spec: pixels[images] for spec, pixels in batch["images"].items()},
                "num_images": batch["num_images"][start:stop],
                "sample_ids": batch["sample_ids"][start:stop],
            }
        )
    return parts


def pad(batch: Batch) -> dict[str, Any]:
    """One row per sample, padded on the right -> inputs of `VisionLanguageModel.forward`, with `lengths` (B,)."""
    ids = pad_sequence(batch["ids"], batch_first=True)
    labels = pad_sequence(batch["labels"], batch_first=True, padding_value=IGNORED)
    lengths = torch.tensor([len(row) for row in batch["ids"]], device=ids.device)
    return _inputs(ids, labels, batch, lengths=lengths)


def pack(batch: Batch) -> dict[str, Any]:
    """All samples in one row, without padding -> inputs of `VisionLanguageModel.forward`, with `segments` (1, T)."""
    ids, labels = torch.cat(batch["ids"])[None], [labels.clone() for labels in batch["labels"]]
    for row in labels:
        row[:1] = IGNORED  # a sample's first token is not predicted from the sample before it
    numbers = [torch.full_like(row, i, dtype=torch.int32) for i, row in enumerate(batch["ids"])]
    return _inputs(ids, torch.cat(labels)[None], batch, segments=torch.cat(numbers)[None])


def _inputs(ids: Tensor, labels: Tensor, batch: Batch, **layout: Tensor) -> dict[str, Any]:
    supervised = (labels[:, 1:] != IGNORED).nonzero()
    rows, before = supervised.unbind(1)  # the logits at position t predict the token at t + 1
    return {
        "ids": ids,
        "image_positions": (ids.flatten() == IMAGE_PLACE).nonzero().squeeze(1),
        "label_positions": rows * ids.shape[1] + before,
        "labels": labels[rows, before + 1],
        "images": batch["images"],
        **layout,
    }
