"""Settings of a model that its tensors do not show, collected from its modules."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from timm.layers.activations import GELU
from torch import nn
from torch.nn import functional as F

from ssmvl.checkpoints.modules import module_settings
from ssmvl.interfaces import Grid
from ssmvl.layers.paths import PathFolding, PathTables
from ssmvl.recipes.binding import Bound
from ssmvl.scans import bsm


class Size(NamedTuple):
    rows: int
    columns: int


def order(grid: Any, times: int = 1) -> None:
    """Stand-in for a scan order."""


class Model(nn.Module):
    """Model that stores one value as `inner.value`."""

    def __init__(self, value: object) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 3)
        self.inner.value = value


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (True, True),
        (0.5, 0.5),
        ("mean", "mean"),
        ([1, "a", None], (1, "a", None)),
        (Size(2, 3), Size(2, 3)),
        (torch.float16, torch.float16),
        (bsm, "ssmvl.scans.bsm"),
        (F.gelu, "gelu"),
        (nn.LayerNorm.forward, "LayerNorm.forward"),
        (partial(order, times=2), f"{__name__}.order(times=2)"),
        (partial(order, 7), f"{__name__}.order(0=7, times=1)"),
        (partial(partial(order, times=2), times=3), f"{__name__}.order(times=3)"),
        (Bound(order, {"times": 2}, "theirs"), f"{__name__}.order(times=2)"),
        (order, f"{__name__}.order(times=1)"),
        (Bound(order, {}, "theirs"), f"{__name__}.order(times=1)"),
        ((order, {"a": [1]}), (f"{__name__}.order(times=1)", {"a": (1,)})),
    ],
)
def test_a_plain_value(value: object, shown: object) -> None:
    settings = module_settings(Model(value))
    assert settings["inner.value"] == shown
    assert settings[""] == f"{__name__}.Model"
    assert (settings["inner"], settings["inner.in_features"]) == ("Linear", 2)


def test_objects_and_mappings_are_traversed_once() -> None:
    model = Model(PathFolding(2, "own", "sum"))
    model.again = model.inner.value
    model.paths = PathTables(bsm, Grid(1, 2, 3))
    model.itself = {"a": {"b": 1}, "model": model}
    model.itself["self"] = model.itself
    settings = module_settings(model)
    assert {name: value for name, value in settings.items() if not name.startswith("inner")} == {
        "": f"{__name__}.Model",
        "again.count": 2,
        "again.merge_by": "sum",
        "again.own": 2,
        "paths.order": "ssmvl.scans.bsm",
        "paths.grid": Grid(1, 2, 3),
        "paths.count": 2,
        "itself.a.b": 1,
    }
    assert "inner.value.count" not in settings


def test_tensors_and_private_attributes_are_not_settings() -> None:
    model = Model(None)
    model._private, model.table, model.pretrained_cfg = 1, torch.ones(2), {"url": "x"}
    before = module_settings(model)
    assert before == module_settings(model.eval())
    assert not {"inner.value", "_private", "table", "pretrained_cfg.url", "training"} & before.keys()


def test_the_gelus_of_torch_and_timm_are_equal_and_the_approximation_differs() -> None:
    exact, timm, approximate = (module_settings(module) for module in (nn.GELU(), GELU(), nn.GELU("tanh")))
    assert exact == timm
    assert exact != approximate
