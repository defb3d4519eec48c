"""Broken layouts that `check_checkpoint` must reject."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ssmvl.checkpoints import Layout, need
from ssmvl.errors import ContractError
from ssmvl.language.mamba_lm import MambaLM
from ssmvl.layers.mamba2 import Mamba2Mixer
from ssmvl.testing import check_checkpoint

RIGHT = Layout(
    part="language",
    rules={"embedding.*": ["lm.emb.*"], "layers.*.A_log": ["lm.*.A_even", "lm.*.A_odd"], "*": ["lm.*"]},
    tied={"lm.head": "embedding.weight"},
    ignored=["lm.*.table"],
)
CONFIG = {"kind": "lm"}


def model() -> MambaLM:
    return MambaLM(width=8, num_layers=2, num_tokens=20, mixer=partial(Mamba2Mixer, d_state=4, head_dim=4))


def file() -> dict[str, Tensor]:
    named = model().state_dict()
    tensors = {
        file_name: part.clone()
        for own, file_names in RIGHT.table(named).items()
        for file_name, part in zip(file_names, named[own].chunk(len(file_names)), strict=True)
    }
    return {**tensors, "lm.head": tensors["lm.emb.weight"].clone(), "lm.layers.0.table": torch.ones(3)}


def right(names: Collection[str], config: Mapping[str, Any]) -> Layout | None:
    if "lm.emb.weight" not in names:
        return None
    need(config, ["kind"], "it")
    return RIGHT


def changed(**changes: Any) -> Callable[..., Layout | None]:
    """`right` with these fields of its layout changed."""

    def broken(names: Collection[str], config: Mapping[str, Any]) -> Layout | None:
        layout = right(names, config)
        return layout and replace(layout, **changes)

    return broken


def accepts_an_empty_file(names: Collection[str], config: Mapping[str, Any]) -> Layout | None:
    return None if "some.other.weight" in names else RIGHT


def accepts_every_file(names: Collection[str], config: Mapping[str, Any]) -> Layout | None:
    return RIGHT if names else None


def reads_only_the_config(names: Collection[str], config: Mapping[str, Any]) -> Layout | None:
    return RIGHT if config.get("kind") == "lm" else None


def accepts_no_file(names: Collection[str], config: Mapping[str, Any]) -> Layout | None:
    return None


def returns_its_rules(names: Collection[str], config: Mapping[str, Any]) -> Any:
    return RIGHT.rules if "lm.emb.weight" in names else None


def fails_for_others(names: Collection[str], config: Mapping[str, Any]) -> Layout | None:
    return RIGHT if config["kind"] and "lm.emb.weight" in names else None


class LoadsNothing(Layout):
    def load(self, module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
        self.check(module, tensors, source)


class LoadsHalf(Layout):
    def load(self, module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
        before = module.state_dict()["norm_f.weight"][:4].clone()
        super().load(module, tensors, source)
        module.state_dict()["norm_f.weight"][:4] = before


class AcceptsAnIncompleteFile(Layout):
    def check(self, module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
        if all(name in tensors for name in ("lm.emb.weight", "lm.norm_f.weight")):
            return
        super().check(module, tensors, source)


def with_class(kind: type[Layout]) -> Callable[..., Layout | None]:
    """`right` with a layout of that class."""

    def broken(names: Collection[str], config: Mapping[str, Any]) -> Layout | None:
        return right(names, config) and kind(part="language", rules=RIGHT.rules, tied=RIGHT.tied, ignored=RIGHT.ignored)

    return broken


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (accepts_an_empty_file, r"accepts_an_empty_file must return None for the names \[\]"),
        (accepts_every_file, r"must return None for the names \['some\.other\.weight'\]"),
        (reads_only_the_config, r"must return None for the names \[\]"),
        (accepts_no_file, "must return a Layout for its own file, returned None"),
        (returns_its_rules, "must return a Layout for its own file, returned {"),
        (fails_for_others, r"fails_for_others failed for the names \[\] \(KeyError: 'kind'\)"),
        (changed(part="model"), "part must be 'language' for a MambaLM, is 'model'"),
        (
            changed(rules={**RIGHT.rules, "*": ["model.*"]}),
            r"must fit .*missing norm_f\.weight \(in the file: model\.norm_f\.weight",
        ),
        (changed(rules={"embedding.*": ["lm.emb.*"], "*": ["lm.*"]}), r"must fit .*missing layers\.0\.mixer\.A_log"),
        (changed(tied={}), r"must fit .*unexpected lm\.head"),
        (changed(ignored=[]), r"must fit .*unexpected lm\.layers\.0\.table"),
        (changed(expects={"width": 9}), "must fit .*width is 8, the checkpoint needs 9"),
        (changed(ignored=["*"]), "a file with an extra some.other.weight must be rejected"),
        (with_class(LoadsNothing), "must fill the whole module, but does not set all of embedding.weight, .*"),
        (with_class(LoadsHalf), "must fill the whole module, but does not set all of norm_f.weight$"),
        (with_class(AcceptsAnIncompleteFile), r"a file without lm\.layers\.0\.norm\.weight must be rejected"),
    ],
)
def test_a_broken_layout_is_rejected(layout: Callable[..., Layout | None], message: str) -> None:
    with pytest.raises(ContractError, match=f"(?s){message}"):
        check_checkpoint(layout, file(), model(), CONFIG)


def test_the_unbroken_layout_passes() -> None:
    check_checkpoint(right, file(), model(), CONFIG)


def test_a_file_that_contains_nan_passes() -> None:
    tensors = file()
    tensors["lm.norm_f.weight"][:4] = torch.nan
    tensors["lm.layers.1.norm.weight"].fill_(torch.nan)
    check_checkpoint(right, tensors, model(), CONFIG)
    with pytest.raises(ContractError, match=r"does not set all of embedding\.weight, "):
        check_checkpoint(with_class(LoadsNothing), tensors, model(), CONFIG)
