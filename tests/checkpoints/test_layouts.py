"""Layouts: joined, tied, absent and expected tensors; strict, with a readable diff."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ssmvl.checkpoints import Layout, copy_into, need
from ssmvl.errors import CheckpointError


class Model(nn.Module):
    """An embedding tied to the head, a layer with separate rows for two paths, and an encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.layers = nn.ModuleList([nn.Linear(3, 4)])
        self.encoders = nn.Linear(2, 2)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.groups = 2


LAYOUT = Layout(
    part="model",
    rules={
        "embedding.*": ["m.emb.*"],
        "layers.*.bias": ["m.blocks.*.b", "m.blocks.*.b_back"],
        "layers.*": ["m.blocks.*"],
    },
    tied={"lm_head": "embedding.weight"},
    absent=["encoders"],
    expects={"groups": 2},
)


def tensors(**other: Tensor) -> dict[str, Tensor]:
    file = {
        "m.emb.weight": torch.randn(5, 3),
        "m.blocks.0.b": torch.tensor([1.0, 2.0]),
        "m.blocks.0.b_back": torch.tensor([3.0, 4.0]),
        "m.blocks.0.weight": torch.randn(4, 3, dtype=torch.float64),
    }
    return {**file, **other}


def differences(model: nn.Module, given: dict[str, Tensor], layout: Layout = LAYOUT) -> list[str]:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError) as error:
        layout.load(model, given, "file.pt")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    first, *lines = str(error.value).splitlines()
    assert first == "file.pt does not fit the model:"
    return [line.strip() for line in lines]


def test_every_value_is_copied_to_its_parameter() -> None:
    model, given = Model(), tensors()
    encoder = model.encoders.weight.clone()
    LAYOUT.load(model, given, "file.pt")
    assert torch.equal(model.embedding.weight, given["m.emb.weight"])
    assert model.layers[0].bias.tolist() == [1, 2, 3, 4]
    assert torch.equal(model.layers[0].weight, given["m.blocks.0.weight"].float())
    assert torch.equal(model.encoders.weight, encoder)
    assert model.head.weight is model.embedding.weight


def test_a_tied_head_may_be_in_the_file_if_it_is_equal() -> None:
    model, given = Model(), tensors()
    LAYOUT.load(model, {**given, "lm_head": given["m.emb.weight"].clone()}, "file.pt")
    assert torch.equal(model.head.weight, given["m.emb.weight"])
    lines = differences(Model(), tensors(lm_head=torch.zeros(5, 3)))
    assert lines == ["lm_head differs from m.emb.weight, but the model has one tensor for both"]
    assert differences(Model(), tensors(lm_head=torch.zeros(5, 3, dtype=torch.complex64))) == lines


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"m.emb.weight": None}, "missing embedding.weight (in the file: m.emb.weight) (5, 3)"),
        ({"m.blocks.0.b_back": None}, "missing layers.0.bias (in the file: m.blocks.0.b + m.blocks.0.b_back) (4,)"),
        ({"m.blocks.1.b": torch.zeros(1)}, "unexpected m.blocks.1.b (1,)"),
        (
            {"m.emb.weight": torch.zeros(6, 3)},
            "embedding.weight (in the file: m.emb.weight) is (6, 3), the model has (5, 3)",
        ),
        (
            {"m.blocks.0.b": torch.zeros(3), "m.blocks.0.b_back": torch.zeros(3)},
            "layers.0.bias (in the file: m.blocks.0.b + m.blocks.0.b_back) is (6,), the model has (4,)",
        ),
        (
            {"m.blocks.0.b": torch.zeros(1), "m.blocks.0.b_back": torch.zeros(3)},
            "layers.0.bias (in the file: m.blocks.0.b + m.blocks.0.b_back) have shapes (1,), (3,); all must be equal",
        ),
        (
            {"m.emb.weight": torch.zeros(5, 3, dtype=torch.int8)},
            "embedding.weight (in the file: m.emb.weight) is torch.int8; quantized weights are not supported",
        ),
    ],
)
def test_each_difference_is_one_line(change: dict[str, Tensor | None], line: str) -> None:
    given: dict[str, Any] = {**tensors(), **change}
    assert differences(Model(), {name: t for name, t in given.items() if t is not None}) == [line]


def test_lossy_casts_are_rejected() -> None:
    lines = differences(Model(), tensors(**{"m.emb.weight": torch.zeros(5, 3, dtype=torch.complex64)}))
    assert lines == [
        "embedding.weight (in the file: m.emb.weight) is torch.complex64; quantized weights are not supported"
    ]
    model = Model()
    model.encoders.register_buffer("count", torch.tensor(3))
    layout = replace(LAYOUT, rules={**LAYOUT.rules, "encoders.count": ["n"]})
    lines = differences(model, tensors(n=torch.tensor(2.5)), layout)
    assert lines == ["encoders.count (in the file: n) is torch.float32, the model has torch.int64"]
    layout.load(model, tensors(n=torch.tensor(7)), "file.pt")
    assert model.encoders.count == 7


def test_names_of_thousands_of_characters_are_shortened() -> None:
    (line,) = differences(Model(), tensors(**{"x" * 5000: torch.zeros(2)}))
    assert line.startswith("unexpected xxx")
    assert line.endswith("x (2,)")
    assert len(line) < 400


def test_expected_values_are_compared() -> None:
    model = Model()
    model.groups = 1
    assert differences(model, tensors()) == ["groups is 1, the checkpoint needs 2"]
    del model.groups
    assert differences(model, tensors()) == ["groups is not set, the checkpoint needs 2"]


def test_a_part_without_a_rule_is_missing() -> None:
    layout = Layout(part="model", rules={"embedding.*": ["m.emb.*"]}, absent=["enc"])
    assert differences(Model(), {"m.emb.weight": torch.zeros(5, 3)}, layout) == [
        "missing encoders.bias (2,)",
        "missing encoders.weight (2, 2)",
        "missing layers.0.bias (4,)",
        "missing layers.0.weight (4, 3)",
    ]


def test_tensors_that_are_not_weights_may_be_ignored() -> None:
    layout = replace(LAYOUT, ignored=["m.*.inv_freq"])
    layout.load(Model(), tensors(**{"m.blocks.0.inv_freq": torch.zeros(2)}), "file.pt")
    assert differences(Model(), tensors(**{"m.blocks.0.freq": torch.zeros(2)}), layout) == [
        "unexpected m.blocks.0.freq (2,)"
    ]


def test_own_names_with_and_without_the_second_name_of_a_tied_tensor() -> None:
    source = Model()
    given = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    target = Model()
    copy_into(target, given, "x")
    assert torch.equal(target.head.weight, source.head.weight)
    without = {name: tensor for name, tensor in given.items() if name != "head.weight"}
    target = Model()
    copy_into(target, without, "x")
    assert torch.equal(target.head.weight, source.head.weight)
    with pytest.raises(CheckpointError, match=r"head\.weight differs from embedding\.weight"):
        copy_into(target, {**given, "head.weight": torch.zeros(5, 3)}, "x")


def test_a_layout_may_require_keys_of_the_config() -> None:
    need({"a": None, "b": 0}, ["a", "b"], "X")
    with pytest.raises(CheckpointError, match=r"its config\.json lacks b, c, but the tensors of X alone do not"):
        need({"a": 1}, ["a", "b", "c"], "X")
    with pytest.raises(CheckpointError, match=r"its config\.json is missing or empty, but"):
        need({}, ["a"], "X")
