"""Plugins that violate their contract: `check` names the block, its plugin, the received and the expected value."""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ssmvl.errors import ContractError, DataError, PluginWarning, RecipeError
from ssmvl.plugins import components
from ssmvl.testing import check_dataset
from ssmvl.training.checked import check

Install = Callable[[str, str], None]
HEAD = """
import ssmvl, torch
from pathlib import Path
from torch import nn
from ssmvl.interfaces import Grid, ImageSpec, Piece
from ssmvl.connectors.projectors import MlpConnector
from ssmvl.data.shards import ensure_shards
from ssmvl.layers.mamba2 import Mamba2Mixer
from ssmvl.language.mamba_lm import MambaLM
from ssmvl.processing.prompts import MambaPrompt
from ssmvl.vision.fusion import ChannelFusion

class Small(Mamba2Mixer):
    def __init__(self, width, num_paths=1):
        super().__init__(width, num_paths, d_state=8, head_dim=16)

class Patches(nn.Module):
    width, grid, image_spec, weights = 16, Grid(1, 3, 3), ImageSpec(48), "none"
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 16, stride=16)
    def forward(self, pixels):
        return self.conv(pixels / 255).flatten(2).transpose(1, 2)
    def shard_units(self):
        return [self]

def shards(split, records):
    directory = Path("broken") / split
    ensure_shards(directory, lambda: records, len(records))
    return directory
"""
TAIL = """
@ssmvl.hookimpl
def ssmvl_register(register):
    register({kind!r}, "broken", broken)
"""
LANGUAGE, CONNECTOR = "model.language.mixer=broken", "model.connector=broken"
ENCODER, FUSION, PROMPT = "model.encoders.fine=broken", "model.fusion=broken", "model.prompt=broken"
LM = "model.language={name: broken, num_tokens: 339, width: 64, num_layers: 1}"
DATA = "stages.align.data=broken"
BROKEN: dict[str, tuple[str, str, str, str, str]] = {
    "a mixer of another width": (
        "mixer",
        "class broken(Small):\n    def forward(self, x, *rest):\n        return super().forward(x, *rest)[..., 1:]",
        LANGUAGE,
        "model.language.mixer",
        r"mixer 'broken' \(zz-broken 1\.0 \(zz_broken\)\): forward must return \(2, 17, 128\), returned \(2, 17, 127\)",
    ),
    "a mixer whose step returns a sequence": (
        "mixer",
        "class broken(Small):\n    def step(self, x, state):\n        return super().step(x, state)[:, None]",
        LANGUAGE,
        "model.language.mixer",
        r"step must return \(2, 128\), returned \(2, 1, 128\)",
    ),
    "a mixer whose prefill lacks an argument": (
        "mixer",
        "class broken(Small):\n    def prefill(self, x, state):\n        return x",
        LANGUAGE,
        "model.language.mixer",
        r"mixer 'broken' .*: prefill fails: TypeError: .*takes 3 positional arguments but 4 were given",
    ),
    "a connector of another width": (
        "connector",
        "class broken(MlpConnector):\n    def forward(self, *given):\n        return super().forward(*given)[..., 1:]",
        CONNECTOR,
        "model.connector",
        r"\(zz-broken .*forward must return \(2, 9, 128\), returned \(2, 9, 127\)",
    ),
    "a connector with a wrong number of tokens": (
        "connector",
        "class broken(MlpConnector):\n    def num_tokens(self, grid):\n        return grid.length + 1",
        CONNECTOR,
        "model.connector",
        r"forward must return \(2, 10, 128\), returned \(2, 9, 128\)",
    ),
    "an encoder that returns channels first": (
        "encoder",
        "class broken(Patches):\n    def forward(self, pixels):\n        return self.conv(pixels / 255).flatten(2)",
        ENCODER,
        "model.encoders.fine",
        r"encoder 'broken' \(zz-broken .*forward must return \(2, 9, 16\), returned \(2, 16, 9\)",
    ),
    "an encoder that fails on zero images": (
        "encoder",
        "class broken(Patches):\n    def forward(self, pixels):\n        assert len(pixels), 'no image'\n"
        "        return super().forward(pixels)",
        ENCODER,
        "model.encoders.fine",
        r"forward without images fails: AssertionError: no image \(.*zz_broken\.py, line \d+\)",
    ),
    "a fusion that drops a position": (
        "fusion",
        "class broken(ChannelFusion):\n    def forward(self, maps):\n        return super().forward(maps)[:, 1:]",
        FUSION,
        "model.fusion",
        r"fusion 'broken' .*forward must return \(2, 9, 256\), returned \(2, 8, 256\)",
    ),
    "a language model with fewer rows than tokens": (
        "language_model",
        "class broken(MambaLM):\n    def __init__(self, *, num_tokens: int, width: int, num_layers: int):\n"
        "        super().__init__(num_tokens=num_tokens, width=width, num_layers=num_layers)\n"
        "        self.vocab_rows = 100",
        LM,
        "model.language",
        r"each token needs a row of the vocabulary: num_tokens is 339, vocab_rows is 100",
    ),
    "a prompt that returns strings": (
        "prompt",
        "class broken(MambaPrompt):\n    def pieces(self, conversation, end):\n        return ['text']",
        PROMPT,
        "model.prompt",
        r"prompt 'broken' \(zz-broken .*pieces must return a list of Piece\(text\), returned one with 'text'",
    ),
    "a prompt with an unknown image placement": (
        "prompt",
        "class broken(MambaPrompt):\n    image_placement = 'somewhere'",
        PROMPT,
        "model.prompt",
        r"image_placement is 'somewhere'\. Allowed: before_all_text, in_place",
    ),
    "a prompt that supervises nothing": (
        "prompt",
        "class broken(MambaPrompt):\n    def pieces(self, conversation, end):\n        return [Piece('a')]",
        PROMPT,
        "model.prompt",
        r"no piece with the assistant's text is supervised, so there are no labels",
    ),
    "an encoder whose grid is not a Grid": (
        "encoder",
        "class broken(Patches):\n    grid = (1, 3, 3)",
        ENCODER,
        "model.encoders.fine",
        r"encoder 'broken' .*: grid must be a Grid\(maps, rows, columns\) .*, but is \(1, 3, 3\)",
    ),
    "an encoder whose weights are None": (
        "encoder",
        "class broken(Patches):\n    weights = None",
        ENCODER,
        "model.encoders.fine",
        r"weights must be a string, but is None",
    ),
    "a connector whose number of tokens fails": (
        "connector",
        "class broken(MlpConnector):\n    def num_tokens(self, grid):\n        return {}['tokens']",
        CONNECTOR,
        "model.connector",
        r"connector 'broken' .*: num_tokens fails: KeyError: 'tokens' \(.*zz_broken\.py, line \d+\)",
    ),
    "a connector that exits": (
        "connector",
        "class broken(MlpConnector):\n    def forward(self, *given):\n        raise SystemExit(0)",
        CONNECTOR,
        "model.connector",
        r"forward fails: SystemExit: 0",
    ),
    "a mixer whose state is a dictionary": (
        "mixer",
        "class broken(Small):\n    def new_state(self, rows, device=None, dtype=None):\n        return {}",
        LANGUAGE,
        "model.language.mixer",
        r"mixer 'broken' .*: new_state must return a named tuple of tensors with \d rows, returned \{\}",
    ),
    "a dataset that exits": (
        "dataset",
        "def broken(split):\n    raise SystemExit(0)",
        DATA,
        "stages.align.data",
        r"fails for the split 'train': SystemExit: 0",
    ),
    "a dataset smaller than a batch": (
        "dataset",
        "def broken(split):\n    return shards(split, [dict(id='a', type='', conversation=[], images=[])])",
        DATA,
        "stages.align.data",
        r"stages\.align\.batch: the data hold 1 samples, fewer than one batch of 64",
    ),
    "a module that cannot be imported": (
        "connector",
        "broken = 'zz_nowhere:Connector'",
        CONNECTOR,
        "model.connector",
        r"connector 'broken' \(zz-broken .* cannot be imported: ModuleNotFoundError: No module named 'zz_nowhere'",
    ),
    "a dataset that returns None": (
        "dataset",
        "def broken(split):\n    pass",
        DATA,
        "stages.align.data",
        r"must return a Path, Shards or a list of Stream for the split 'train', returned None",
    ),
    "a dataset that fails": (
        "dataset",
        "def broken(split):\n    return {}[split]",
        DATA,
        "stages.align.data",
        r"fails for the split 'train': KeyError: 'train' \(.*zz_broken\.py, line \d+\)",
    ),
    "a dataset whose records lack a key": (
        "dataset",
        "def broken(split):\n    return shards(split, [{'id': 'a', 'type': '', 'conversation': []}])",
        DATA,
        "stages.align.data",
        r"record 'a' lacks images; a record has id, type, conversation and images",
    ),
}


@pytest.fixture
def plugin(install_plugin: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """`plugin(kind, code)` installs a plugin that registers the code's `broken`."""
    monkeypatch.chdir(tmp_path)
    return lambda kind, code: install_plugin("zz-broken", f"{HEAD}\n{code}\n{TAIL.format(kind=kind)}")


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_plugin_is_named(what: str, plugin: Callable[[str, str], None]) -> None:
    kind, code, override, path, why = BROKEN[what]
    plugin(kind, code)
    with pytest.raises(RecipeError) as error:
        check("quickstart", "model.fusion.order=null", override, data=kind == "dataset")
    (problem,) = error.value.problems
    assert problem.path == path
    assert re.search(why, problem.message), problem.message


@pytest.mark.parametrize(
    ("kind", "code", "override"),
    [
        ("mixer", "broken = Small", LANGUAGE),
        ("encoder", "broken = Patches", ENCODER),
        ("connector", "broken = MlpConnector", CONNECTOR),
        ("fusion", "broken = ChannelFusion", FUSION),
        ("prompt", "broken = MambaPrompt", PROMPT),
    ],
)
def test_the_unbroken_parts_are_accepted(
    kind: str, code: str, override: str, plugin: Callable[[str, str], None]
) -> None:
    plugin(kind, code)
    check("quickstart", "model.fusion.order=null", override)


def test_a_part_that_reads_values_is_a_note(plugin: Callable[[str, str], None]) -> None:
    plugin(
        "mixer",
        "class broken(Small):\n    def forward(self, x, *a, **k):\n        float(x.sum())\n"
        "        return super().forward(x, *a, **k)",
    )
    notes = check("quickstart", LANGUAGE).notes
    assert any(note.startswith("model.language.mixer: not checked, forward of mixer 'broken' (zz-") for note in notes)


def test_parts_after_one_that_reads_values_are_checked(plugin: Callable[[str, str], None]) -> None:
    plugin(
        "connector",
        "class Reads(Patches):\n    def forward(self, pixels):\n        float(pixels.sum())\n\n"
        "class broken(MlpConnector):\n    def forward(self, *given):\n        return super().forward(*given)[..., 1:]",
    )
    import zz_broken

    from ssmvl.registry import Entry

    components().add([Entry("encoder", "reads", zz_broken.Reads, "zz-broken")])
    with pytest.raises(RecipeError, match=r"connector: .*must return \(2, 9, 128\), returned"):
        check("quickstart", "model.fusion.order=null", CONNECTOR, "model.encoders.fine=reads")


@pytest.mark.parametrize("what", [n for n in BROKEN if BROKEN[n][0] == "dataset" and "batch" not in n])
def test_check_dataset_reports_the_same(what: str, plugin: Callable[[str, str], None]) -> None:
    kind, code, _, _, why = BROKEN[what]
    plugin(kind, code)
    import zz_broken

    with pytest.raises((ContractError, DataError), match=why):
        check_dataset(zz_broken.broken)


@pytest.mark.parametrize(
    ("line", "changed"),
    [
        ("torch.set_default_dtype(torch.float64)", r"torch's default dtype to torch\.float64"),
        ("torch.manual_seed(123)", "torch's seed to 123"),
    ],
)
def test_a_plugin_that_changes_global_state(line: str, changed: str, install_plugin: Install, tmp_path: Path) -> None:
    """The change is made by the plugin itself or by the module of a block."""
    before, state = torch.get_default_dtype(), torch.initial_seed()
    sys.modules.pop("zz_late", None)
    (tmp_path / "zz_late.py").write_text(textwrap.dedent(f"import torch\n{line}\ndef order(grid): return 0"))
    hook = "@ssmvl.hookimpl\ndef ssmvl_register(register): register('scan_order', {!r}, {!r})"
    install_plugin("zz-late-plugin", "import ssmvl\n" + hook.format("late", "zz_late:order"))
    install_plugin("zz-early-plugin", f"import ssmvl, torch\n{line}\n" + hook.format("early", "zz_late:order"))
    with pytest.warns(PluginWarning, match=rf"zz-early-plugin .* changes {changed} on import"):
        with pytest.raises(RecipeError, match=rf"scan_order 'late' \(zz-late-plugin .*\) changes {changed} on import"):
            check("quickstart", "model.connector.scan_order=late")
    assert (torch.get_default_dtype(), torch.initial_seed()) == (before, state)


def test_a_plugin_that_registers_nothing_is_a_failure(install_plugin: Install) -> None:
    install_plugin("zz-empty", "import ssmvl\n@ssmvl.hookimpl\ndef ssmvl_register(register): pass")
    with pytest.warns(PluginWarning, match="zz-empty .*the module's function ssmvl_register registers nothing"):
        with pytest.raises(RecipeError, match="registers nothing"):
            check("quickstart", "model.connector=zz")


def test_disabled_plugins_are_listed_and_unknown_names_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSMVL_DISABLE_PLUGINS", "vl_mamba, vl_mmba")
    components.cache_clear()
    try:
        with pytest.warns(PluginWarning, match="unknown plugin 'vl_mmba'. Did you mean 'vl_mamba'"):
            with pytest.raises(RecipeError, match=r"Plugin ssmvl \S+ \(ssmvl_vl_mamba\) is disabled") as error:
                check("quickstart", "model.connector=vss_mlp")
        assert "unknown plugin 'vl_mmba'" in str(error.value)
    finally:
        components.cache_clear()
