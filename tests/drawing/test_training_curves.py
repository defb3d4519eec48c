"""Plots of a run's loss and accuracy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from ssmvl.drawing.training_curves import draw_curves, read_scalars

Values = dict[str, dict[int, float]]


def log(folder: Path, values: Values) -> None:
    with SummaryWriter(str(folder)) as writer:
        for name, curve in values.items():
            for step, value in curve.items():
                writer.add_scalar(name, value, step)


LOGGED = {"loss/train/total": {0: 2.0, 1: 1.0}, "accuracy/reading": {1: 0.5}, "other": {0: 7.0}}


def test_scalars_are_read_by_name_and_step(tmp_path: Path) -> None:
    log(tmp_path, LOGGED)
    assert read_scalars(tmp_path) == LOGGED


def test_later_values_of_a_resumed_run_override_earlier_ones(tmp_path: Path) -> None:
    log(tmp_path, {"loss/train/total": {0: 2.0, 1: 9.0}})
    log(tmp_path, {"loss/train/total": {1: 1.0, 2: 0.5}})
    assert read_scalars(tmp_path) == {"loss/train/total": {0: 2.0, 1: 1.0, 2: 0.5}}


def drawn(folder: Path, stages: dict[str, Values]) -> np.ndarray:
    for name, values in stages.items():
        log(folder / "logs" / name, values)
    draw_curves({name: folder / "logs" / name for name in stages}, folder / "curves.png")
    return np.asarray(Image.open(folder / "curves.png").convert("RGB"))


def num_colors(pixels: np.ndarray) -> int:
    return len(np.unique(pixels.reshape(-1, 3), axis=0))


def test_each_curve_is_drawn(tmp_path: Path) -> None:
    one = drawn(tmp_path / "one", {"r-align": {"loss/train/total": {0: 2.0, 9: 1.0}}})
    many = drawn(
        tmp_path / "many",
        {
            "r-align": {"loss/train/total": {0: 2.0, 9: 1.0}, "accuracy/reading": {0: 0.0, 9: 0.5}},
            "r-finetune": {"loss/train/total": {0: 1.0, 9: 0.1}, "accuracy/spatial": {0: 0.5, 9: 0.9}},
        },
    )
    assert one.shape == many.shape
    assert num_colors(many) > num_colors(one) > 2


@pytest.mark.parametrize("stages", [{}, {"r-align": {}}, {"r-align": {"accuracy/_a$_{": {0: 1.0}}}])
def test_a_run_with_few_steps_or_none_is_drawn(tmp_path: Path, stages: dict[str, Values]) -> None:
    assert drawn(tmp_path, stages).ndim == 3
    assert not list(tmp_path.glob(".*"))
