"""Collating, counting, splitting, padding and packing the ragged batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ssmvl.interfaces import ImageSpec
from ssmvl.processing.batch import collate, num_samples, num_tokens, pack, pad, split_batch

SMALL, LARGE, PLACES = ImageSpec(2), ImageSpec(4), 2


def make(number: int, images: int, texts: int, supervised: int) -> dict[str, Any]:
    """A sample whose ids and pixels encode its number; the last `supervised` text tokens are labels."""
    ids = torch.tensor([-1] * (PLACES * images) + [100 * number + i for i in range(texts)], dtype=torch.long)
    labels = ids.clone()
    labels[: len(ids) - supervised] = -100
    pixels = {spec: torch.full((images, 3, spec.size, spec.size), number, dtype=torch.uint8) for spec in (SMALL, LARGE)}
    return {"ids": ids, "labels": labels, "images": pixels, "id": f"s{number}", "damaged": [f"bad{number}", "why"]}


def make_all(shapes: Sequence[tuple[int, int, int]]) -> list[dict[str, Any]]:
    return [make(n, images, texts, min(supervised, texts)) for n, (images, texts, supervised) in enumerate(shapes, 1)]


SHAPES = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5), st.integers(0, 5)), min_size=1, max_size=6)
THREE = [(1, 3, 2), (0, 2, 2), (2, 4, 1)]


def equal(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


def predictions(inputs: dict[str, Any], labels: Tensor) -> list[tuple[int, int]]:
    """(id at the position of the logits, token to predict) of every label."""
    ids = inputs["ids"].flatten()[inputs["label_positions"]]
    return list(zip(ids.tolist(), labels.tolist(), strict=True))


def expected_predictions(samples: Sequence[dict[str, Any]]) -> list[tuple[int, int]]:
    pairs = []
    for sample in samples:
        ids, labels = sample["ids"].tolist(), sample["labels"].tolist()
        pairs += [(ids[t], labels[t + 1]) for t in range(len(ids) - 1) if labels[t + 1] != -100]
    return pairs


def test_collate_keeps_samples_apart_and_joins_images() -> None:
    samples = make_all(THREE)
    batch = collate(samples)
    assert len(next(iter(batch.values()))) == 3  # StreamingDataLoader counts the first value
    assert batch["sample_ids"] == ["s1", "s2", "s3"]
    assert equal(batch["ids"].split(batch["num_tokens"]), [s["ids"] for s in samples])
    assert batch["labels"].tolist() == [101, 102, 201, 303]
    assert batch["label_positions"].tolist() == [2, 3, 5, 13]
    assert batch["image_positions"].tolist() == [0, 1, 7, 8, 9, 10]
    counts = [batch[key] for key in ("num_tokens", "num_labels", "num_places", "num_images")]
    assert counts == [[5, 2, 8], [2, 1, 1], [2, 0, 4], [1, 0, 2]]
    for spec in (SMALL, LARGE):
        assert batch["images"][spec].shape == (3, 3, spec.size, spec.size)
        assert batch["images"][spec][:, 0, 0, 0].tolist() == [1, 3, 3]


def test_collate_without_optional_keys() -> None:
    sample = make(1, 0, 2, 1)
    del sample["id"], sample["damaged"]
    assert collate([sample])["sample_ids"] == [""]
    assert collate([sample])["damaged"] == [[]]


def test_counts() -> None:
    batch = collate(make_all([*THREE, (0, 3, 3)]))
    assert num_samples(batch) == 4
    assert num_tokens(batch) == {"total": 5 + 2 + 8 + 3, "loss_generating": 2 + 1 + 1 + 2}


@settings(deadline=None)
@given(shapes=SHAPES, size=st.integers(1, 7))
def test_split_gives_every_sample_its_own_images(shapes: list[tuple[int, int, int]], size: int) -> None:
    batch = collate(make_all(shapes))
    parts = split_batch(batch, size)
    assert all(num_samples(part) == size for part in parts[:-1])
    assert 1 <= num_samples(parts[-1]) <= size
    for part in parts:
        owners = [int(name[1:]) for name in part["sample_ids"]]
        images = [owner for owner, count in zip(owners, part["num_images"], strict=True) for _ in range(count)]
        assert all(pixels[:, 0, 0, 0].tolist() == images for pixels in part["images"].values())
        assert [int(ids[-1]) // 100 for ids in part["ids"].split(part["num_tokens"])] == owners
        assert [damaged[0] for damaged in part["damaged"]] == [f"bad{owner}" for owner in owners]


@settings(deadline=None)
@given(shapes=SHAPES, size=st.integers(1, 7))
def test_parts_are_batches_of_their_samples(shapes: list[tuple[int, int, int]], size: int) -> None:
    samples = make_all(shapes)
    batch = collate(samples)
    parts = split_batch(batch, size)
    for part, start in zip(parts, range(0, len(samples), size), strict=True):
        expected = collate(samples[start : start + size])
        assert part.keys() == expected.keys()
        assert all(map(torch.equal, part.pop("images").values(), expected.pop("images").values()))
        for key, values in expected.items():
            assert torch.equal(part[key], values) if isinstance(values, Tensor) else part[key] == values
    assert sum(num_samples(part) for part in parts) == num_samples(batch)


@pytest.mark.parametrize("layout", [pad, pack])
@settings(deadline=None)
@given(shapes=SHAPES)
def test_each_token_is_predicted_from_the_one_before_it(layout: Any, shapes: list[tuple[int, int, int]]) -> None:
    samples = make_all(shapes)
    batch = collate(samples)
    inputs = layout(batch)
    assert predictions(inputs, batch["labels"]) == expected_predictions(samples)
    assert len(batch["labels"]) == num_tokens(batch)["loss_generating"]
    assert layout is pad or inputs["ids"].numel() == num_tokens(batch)["total"]  # packing adds no padding


@pytest.mark.parametrize("layout", [pad, pack])
@settings(deadline=None)
@given(shapes=SHAPES)
def test_every_image_place_has_a_position(layout: Any, shapes: list[tuple[int, int, int]]) -> None:
    batch = collate(make_all(shapes))
    inputs = layout(batch)
    assert len(inputs["image_positions"]) == PLACES * sum(batch["num_images"])
    assert (inputs["ids"].flatten()[inputs["image_positions"]] == -1).all()
    assert inputs["image_positions"].tolist() == sorted(inputs["image_positions"].tolist())
    assert inputs["images"].keys() == {SMALL, LARGE}


def test_pad_is_one_row_per_sample() -> None:
    inputs = pad(collate(make_all(THREE)))
    assert inputs["ids"].tolist() == [
        [-1, -1, 100, 101, 102, 0, 0, 0],
        [200, 201, 0, 0, 0, 0, 0, 0],
        [-1, -1, -1, -1, 300, 301, 302, 303],
    ]
    assert inputs["image_positions"].tolist() == [0, 1, 16, 17, 18, 19]
    assert inputs["label_positions"].tolist() == [2, 3, 8, 22]
    assert "segments" not in inputs


def test_pack_is_one_row_without_padding() -> None:
    inputs = pack(collate(make_all(THREE)))
    assert inputs["ids"].tolist() == [[-1, -1, 100, 101, 102, 200, 201, -1, -1, -1, -1, 300, 301, 302, 303]]
    assert inputs["segments"].tolist() == [[0] * 5 + [1] * 2 + [2] * 8]
    assert inputs["segments"].dtype == torch.int32
    assert inputs["image_positions"].tolist() == [0, 1, 7, 8, 9, 10]
    assert inputs["label_positions"].tolist() == [2, 3, 5, 13]


def test_pack_and_pad_do_not_modify_the_batch() -> None:
    batch = collate(make_all([(0, 3, 3), (0, 2, 2)]))
    pack(batch)
    pad(batch)
    assert batch["ids"].tolist() == [100, 101, 102, 200, 201]
    assert batch["label_positions"].tolist() == [0, 1, 3]


@pytest.mark.parametrize("layout", [pad, pack])
def test_text_only(layout: Any) -> None:
    batch = collate(make_all([(0, 3, 2), (0, 4, 1)]))
    inputs = layout(batch)
    assert inputs["image_positions"].tolist() == []
    assert {spec: tuple(pixels.shape) for spec, pixels in inputs["images"].items()} == {
        SMALL: (0, 3, 2, 2),
        LARGE: (0, 3, 4, 4),
    }
    assert batch["labels"].tolist() == [101, 102, 203]
