"""What `check_checkpoint` finds."""

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
        theirs: part.clone()
        for own, names in RIGHT.table(named).items()
        for theirs, part in zip(names, named[own].chunk(len(names)), strict=True)
    }
    return {**tensors, "lm.head": tensors["lm.emb.weight"].clone(), "lm.layers.0.table": torch.ones(3)}


def right(names: Collection[str], config: Mapping[str, Any]) -> Layout | None:
    if "lm.emb.weight" not in names:
        return None
    need(config, ["kind"], "it")
    return RIGHT


def but(**changes: Any) -> Callable[..., Layout | None]:
    """`right`, whose layout has these fields changed."""

    def broken(names: Collection[str], config: Mapping[str, Any]) -> Layout | None:
        found = right(names, config)
        return found and replace(found, **changes)

    return broken


def takes_an_empty_file(names: Collection[str], config: Mapping[str, Any]) -> Layout | None:
    return None if "some.other.weight" in names else RIGHT


def takes_every_file(names: Collection[str], config: Mapping[str, Any]) -> Layout | None:
    return RIGHT if names else None


def goes_by_the_config(names: Collection[str], config: Mapping[str, Any]) -> Layout | None:
    return RIGHT if config.get("kind") == "lm" else None


def takes_no_file(names: Collection[str], config: Mapping[str, Any]) -> Layout | None:
    return None


def gives_its_rules(names: Collection[str], config: Mapping[str, Any]) -> Any:
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


class TakesWhatIsThere(Layout):
    def check(self, module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
        if all(name in tensors for name in ("lm.emb.weight", "lm.norm_f.weight")):
            return
        super().check(module, tensors, source)


def made_as(kind: type[Layout]) -> Callable[..., Layout | None]:
    """`right`, whose layout is of that class."""

    def broken(names: Collection[str], config: Mapping[str, Any]) -> Layout | None:
        return right(names, config) and kind(part="language", rules=RIGHT.rules, tied=RIGHT.tied, ignored=RIGHT.ignored)

    return broken


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        (takes_an_empty_file, r"takes_an_empty_file must give None for the names \[\]"),
        (takes_every_file, r"must give None for the names \['some\.other\.weight'\]"),
        (goes_by_the_config, r"must give None for the names \[\]"),
        (takes_no_file, "must give a Layout for its own file, gave None"),
        (gives_its_rules, "must give a Layout for its own file, gave {"),
        (fails_for_others, r"fails_for_others failed for the names \[\] \(KeyError: 'kind'\)"),
        (but(part="model"), "part must be 'language' for a MambaLM, is 'model'"),
        (
            but(rules={**RIGHT.rules, "*": ["model.*"]}),
            r"must fit .*missing norm_f\.weight \(there model\.norm_f\.weight",
        ),
        (but(rules={"embedding.*": ["lm.emb.*"], "*": ["lm.*"]}), r"must fit .*missing layers\.0\.mixer\.A_log"),
        (but(tied={}), r"must fit .*surplus lm\.head"),
        (but(ignored=[]), r"must fit .*surplus lm\.layers\.0\.table"),
        (but(expects={"width": 9}), "must fit .*width is 8, the checkpoint needs 9"),
        (but(ignored=["*"]), "a file that holds some.other.weight too must be refused"),
        (made_as(LoadsNothing), "must fill all of the module; embedding.weight, .* still hold their old values"),
        (made_as(LoadsHalf), "must fill all of the module; norm_f.weight still hold their old values"),
        (made_as(TakesWhatIsThere), r"a file without lm\.layers\.0\.norm\.weight must be refused"),
    ],
)
def test_a_broken_layout_is_refused(layout: Callable[..., Layout | None], said: str) -> None:
    with pytest.raises(ContractError, match=f"(?s){said}"):
        check_checkpoint(layout, file(), model(), CONFIG)


def test_the_right_one_is_not() -> None:
    check_checkpoint(right, file(), model(), CONFIG)


def test_a_file_that_holds_nan_is_filled_all_the_same() -> None:
    tensors = file()
    tensors["lm.norm_f.weight"][:4] = torch.nan
    tensors["lm.layers.1.norm.weight"].fill_(torch.nan)
    check_checkpoint(right, tensors, model(), CONFIG)
    with pytest.raises(ContractError, match=r"must fill all of the module; embedding\.weight, "):
        check_checkpoint(made_as(LoadsNothing), tensors, model(), CONFIG)
