"""Ragged batch: collating, counting, splitting by sample, and padding or packing into model inputs.

    sample_ids       list of sample names; the first key, because StreamingDataLoader counts the first value
    types            list of question types, possibly empty
    damaged          list of lists: [id, reason] of the damaged sample that this sample replaces; mostly empty
    ids              (N,) the tokens of all samples, concatenated
    labels           (A,) the supervised tokens
    label_positions  (A,) positions in `ids` of the logits that predict `labels`
    image_positions  (P,) positions in `ids` of the image places
    images           {ImageSpec: uint8 (I, 3, S, S)}
    num_tokens, num_labels, num_places, num_images     lists with the counts of each sample

A batch is a plain mapping, because Composer moves only mappings and sequences to a device. It has few tensors, because
each is copied to the device separately.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from ssmvl.interfaces import IGNORED, IMAGE_PLACE

Batch = dict[str, Any]
COUNTS = {
    "ids": "num_tokens",
    "labels": "num_labels",
    "label_positions": "num_labels",
    "image_positions": "num_places",
}


def collate(samples: Sequence[Mapping[str, Any]]) -> Batch:
    """Samples from the processor, each with an optional "id", "type" and "damaged" -> one ragged batch."""
    lengths = [len(sample["ids"]) for sample in samples]
    ids, labels = (torch.cat([sample[key] for sample in samples]) for key in ("ids", "labels"))
    labels[_starts(lengths)] = IGNORED  # no position precedes a sample's first token to predict it
    supervised, places = _indices(labels != IGNORED), _indices(ids == IMAGE_PLACE)
    return {
        "sample_ids": [sample.get("id", "") for sample in samples],
        "types": [sample.get("type", "") for sample in samples],
        "damaged": [sample.get("damaged", []) for sample in samples],
        "ids": ids,
        "labels": labels[supervised],
        "label_positions": supervised - 1,
        "image_positions": places,
        "images": {spec: torch.cat([sample["images"][spec] for sample in samples]) for spec in samples[0]["images"]},
        "num_tokens": lengths,
        "num_labels": _counts(supervised, lengths),
        "num_places": _counts(places, lengths),
        "num_images": [len(next(iter(sample["images"].values()))) for sample in samples],
    }


def num_samples(batch: Batch) -> int:
    """Number of samples in this batch; Composer counts its resume position in samples."""
    return len(batch["sample_ids"])


def num_tokens(batch: Batch) -> dict[str, int]:
    """Number of tokens in this batch, image places included, and of supervised tokens."""
    return {"total": len(batch["ids"]), "loss_generating": len(batch["labels"])}


def split_batch(batch: Batch, size: int) -> list[Batch]:
    """Split into batches of `size` samples (the last may be smaller), each with the images of its samples."""
    rows = [slice(start, start + size) for start in range(0, num_samples(batch), size)]

    def cut(values: Tensor, counts: str) -> tuple[Tensor, ...]:
        return values.split([sum(batch[counts][row]) for row in rows])

    parts: list[Batch] = [
        {key: values[row] for key, values in batch.items() if key not in (*COUNTS, "images")} for row in rows
    ]
    pieces = {key: cut(batch[key], counts) for key, counts in COUNTS.items()}
    images = {spec: cut(pixels, "num_images") for spec, pixels in batch["images"].items()}
    first = 0
    for index, part in enumerate(parts):
        part |= {key: values[index] for key, values in pieces.items()}
        part |= {key: part[key] - first for key in ("label_positions", "image_positions")}
        part["images"] = {spec: values[index] for spec, values in images.items()}
        first += len(part["ids"])
    return parts


def pad(batch: Batch, length: int = 0) -> dict[str, Any]:
    """One right-padded row per sample -> inputs of `VisionLanguageModel.forward`.

    Rows are as long as the longest sample, and at least `length` long.
    """
    lengths = batch["num_tokens"]
    ids = pad_sequence(batch["ids"].split(lengths), batch_first=True)
    ids = F.pad(ids, (0, max(0, length - ids.shape[1])))
    shifts = [row * ids.shape[1] - start for row, start in enumerate(_starts(lengths))]
    return {
        **_inputs(batch),
        "ids": ids,
        "label_positions": batch["label_positions"] + _repeat(shifts, batch["num_labels"], ids),
        "image_positions": batch["image_positions"] + _repeat(shifts, batch["num_places"], ids),
    }


def pack(batch: Batch) -> dict[str, Any]:
    """All samples in one row without padding -> inputs of `VisionLanguageModel.forward`, with `segments` (1, N)."""
    ids, lengths = batch["ids"], batch["num_tokens"]
    segments = _repeat(range(len(lengths)), lengths, ids).int()
    return {**_inputs(batch), "ids": ids[None], "segments": segments[None]}


def _inputs(batch: Batch) -> dict[str, Any]:
    return {key: batch[key] for key in ("label_positions", "image_positions", "images")}


def _starts(lengths: Sequence[int]) -> list[int]:
    return [0, *accumulate(lengths)][:-1]


def _indices(mask: Tensor) -> Tensor:
    return mask.nonzero().squeeze(1)


def _counts(indices: Tensor, lengths: Sequence[int]) -> list[int]:
    """Number of indices in each of consecutive segments of these lengths."""
    edges = torch.searchsorted(indices, torch.tensor([0, *accumulate(lengths)]))
    return cast(list[int], edges.diff().tolist())


def _repeat(values: Sequence[int], counts: Sequence[int], like: Tensor) -> Tensor:
    """Repeat each value `count` times, on the device of `like`, without synchronizing with it."""
    return torch.repeat_interleave(torch.tensor(values), torch.tensor(counts)).to(like.device, non_blocking=True)
