"""The ragged batch: collated, counted, split by samples, and padded or packed into what the model takes.

    ids, labels      lists of 1-D tensors, one per sample; `ids` first (StreamingDataLoader counts the first value)
    images           {ImageSpec: uint8 (I, 3, S, S)}
    image_places     list of 1-D index tensors: where each sample's image places are
    label_places     list of 1-D index tensors: where each sample's supervised tokens are, never its first
    num_images       list of numbers
    sample_ids       list of names
    types            list of the samples' types of question, which may be empty
    damaged          list of lists: [id, reason] of the damaged sample in whose place a sample stands, mostly empty

A plain mapping, because Composer moves only mappings and sequences to a device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ssmvl.interfaces import IGNORED, IMAGE_PLACE

Batch = dict[str, Any]
PLACES = ("image_places", "label_places")


def collate(samples: Sequence[Mapping[str, Any]]) -> Batch:
    """Samples of the processor, each with an optional "id", "type" and "damaged" -> one ragged batch."""
    specs = samples[0]["images"].keys()
    labels = [sample["labels"].clone() for sample in samples]
    for row in labels:
        row[:1] = IGNORED  # nothing stands before a sample's first token that could predict it
    return {
        "ids": [sample["ids"] for sample in samples],
        "labels": labels,
        "image_places": [_places(sample["ids"] == IMAGE_PLACE) for sample in samples],
        "label_places": [_places(row != IGNORED) for row in labels],
        "images": {spec: torch.cat([sample["images"][spec] for sample in samples]) for spec in specs},
        "num_images": [len(next(iter(sample["images"].values()))) for sample in samples],
        "sample_ids": [sample.get("id", "") for sample in samples],
        "types": [sample.get("type", "") for sample in samples],
        "damaged": [sample.get("damaged", []) for sample in samples],
    }


def num_samples(batch: Batch) -> int:
    """Samples of the data set in this batch; Composer's resume position is counted in them."""
    return len(batch["ids"])


def num_tokens(batch: Batch) -> dict[str, int]:
    """Tokens in this batch, image places included, and those that carry loss."""
    return {"total": sum(map(len, batch["ids"])), "loss_generating": sum(map(len, batch["label_places"]))}


def split_batch(batch: Batch, size: int) -> list[Batch]:
    """Batches of `size` samples (the last may be smaller), each with its own samples' images."""
    parts, first = [], 0
    for start in range(0, num_samples(batch), size):
        part = {key: rows[start : start + size] for key, rows in batch.items() if key != "images"}
        last = first + sum(part["num_images"])
        parts.append({**part, "images": {spec: pixels[first:last] for spec, pixels in batch["images"].items()}})
        first = last
    return parts


def pad(batch: Batch) -> dict[str, Any]:
    """One row per sample, padded on the right -> inputs of `VisionLanguageModel.forward`, with `lengths` (B,)."""
    ids = pad_sequence(batch["ids"], batch_first=True)
    lengths = [len(row) for row in batch["ids"]]
    starts = [number * ids.shape[1] for number in range(len(lengths))]
    return {"ids": ids, "lengths": torch.tensor(lengths, device=ids.device), **_flat(batch, starts)}


def pack(batch: Batch) -> dict[str, Any]:
    """All samples in one row, without padding -> inputs of `VisionLanguageModel.forward`, with `segments` (1, T)."""
    numbers = [torch.full_like(row, number, dtype=torch.int32) for number, row in enumerate(batch["ids"])]
    starts = [0, *accumulate(len(row) for row in batch["ids"])][:-1]
    return {"ids": torch.cat(batch["ids"])[None], "segments": torch.cat(numbers)[None], **_flat(batch, starts)}


def _flat(batch: Batch, starts: list[int]) -> dict[str, Any]:
    """Places within samples -> flat places, given where each sample starts. No value is read back from a device."""
    places = {key: torch.cat([p + s for p, s in zip(batch[key], starts, strict=True)]) for key in PLACES}
    taken = [row[place] for row, place in zip(batch["labels"], batch["label_places"], strict=True)]
    return {
        "image_positions": places["image_places"],
        "label_positions": places["label_places"] - 1,  # the logits at t - 1 predict the token at t
        "labels": torch.cat(taken),
        "images": batch["images"],
    }


def _places(mask: Tensor) -> Tensor:
    return mask.nonzero().squeeze(1)
