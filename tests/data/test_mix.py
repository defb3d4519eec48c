"""Mixes of several datasets, and loader options: valid recipes, and the paths at which mistakes are reported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ssmvl.data.mix import Share, mix
from ssmvl.data.shards import ensure_shards
from ssmvl.errors import DataError, RecipeError
from ssmvl.interfaces import Stream
from ssmvl.recipes.merge import load_recipe
from ssmvl.training.checked import check
from ssmvl.training.schema import Plan

TALK = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "x"}]


def streams(**shares: str) -> str:
    """Return the `data` of a recipe: a mix of digit scenes, each stream with these options."""
    nodes = (f"{name}: {{data: digit_scenes{', ' * bool(rest)}{rest}}}" for name, rest in shares.items())
    return f"{{name: mix, streams: {{{', '.join(nodes)}}}}}"


def plan(data: str, part: str = "stages.align") -> Plan:
    return check(load_recipe("quickstart", f"{part}.data={data}")).plan


def problems(data: str, part: str = "stages.align") -> dict[str, str]:
    with pytest.raises(RecipeError) as caught:
        plan(data, part)
    return {path.removeprefix(f"{part}.data."): message for path, message in caught.value.problems}


def test_a_mix_returns_its_streams_with_weights_and_prompts(tmp_path: Path) -> None:
    for name in ("a", "b"):
        records = [{"id": name, "type": "", "conversation": TALK, "images": []}]
        ensure_shards(tmp_path / name / "train", lambda records=records: records, 1)
    a = f"{{data: {{name: shards, folder: {tmp_path / 'a'}}}, repeat: 0.5, prompt: plain}}"
    b = f"{{data: {{name: shards, folder: {tmp_path / 'b'}}}, choose: 7}}"
    data = plan(f"{{name: mix, streams: {{a: {a}, b: {b}}}}}").stages["align"].data
    first, second = data(split="train")
    assert first[:4] == (tmp_path / "a" / "train", None, 0.5, None)
    assert type(first.prompt).__name__ == "PlainPrompt"
    assert second == Stream(tmp_path / "b" / "train", choose=7)


@pytest.mark.parametrize(
    "data",
    [
        streams(a=""),
        streams(a="", b="repeat: 2"),
        streams(a="repeat: 0.3", b="choose: 5"),
        streams(a="proportion: 1", b="proportion: 3.5"),
    ],
)
def test_valid_combinations_of_weights(data: str) -> None:
    assert plan(data).stages["align"].data.options["streams"].keys() <= {"a", "b"}


@pytest.mark.parametrize(
    ("data", "path", "message"),
    [
        (streams(a="repeat: 2, choose: 5", b=""), "streams.a", "at most one of proportion, repeat, choose"),
        (streams(a="proportion: 1", b=""), "streams", "either all or none have a proportion"),
        (streams(a="proportion: 1", b="repeat: 2"), "streams", "either all or none have a proportion"),
        (streams(a="proportion: 0"), "streams.a.proportion", "a number above 0"),
        (streams(a="repeat: .inf"), "streams.a.repeat", "a number above 0"),
        (streams(a="choose: 1.5"), "streams.a.choose", "int"),
        (streams(a="repat: 2"), "streams.a.repat", "Did you mean 'repeat'?"),
        (streams(a="prompt: plian"), "streams.a.prompt", "Did you mean 'plain'?"),
        ("{name: mix, streams: {}}", "streams", "at least one entry"),
        ("{name: mix, streams: {a: {proportion: 1}}}", "streams.a.data", "Share needs 'data'"),
        ("{name: mix, streams: {a: {data: digit_scene}}}", "streams.a.data", "Did you mean 'digit_scenes'?"),
        (f"{{name: mix, streams: {{a: {{data: {streams(b='')}}}}}}}", "streams.a", "a stream, not a mix"),
    ],
)
def test_mistakes_are_reported_at_their_path(data: str, path: str, message: str) -> None:
    messages = problems(data)
    assert list(messages) == [path]
    assert message in messages[path]


def test_an_evaluation_accepts_a_mix_without_weights() -> None:
    assert plan(streams(a="", b=""), "evaluation").evaluation is not None
    messages = problems(streams(a="repeat: 2", b="prompt: plain"), "evaluation")
    assert list(messages) == ["streams.a.repeat", "streams.b.prompt"]
    assert all("leave it out" in message for message in messages.values())


def test_the_prompt_of_a_stream_is_checked(install_plugin: Any) -> None:
    code = "import ssmvl\nclass Bare:\n    pass\n@ssmvl.hookimpl\ndef ssmvl_register(register):\n"
    install_plugin("zz-bare", code + "    register('prompt', 'bare', Bare)\n")
    assert list(problems(streams(a="prompt: bare"))) == ["streams.a.prompt"]


def test_a_dataset_that_returns_a_mix_is_rejected_as_a_stream(tmp_path: Path) -> None:
    share = Share(data=lambda split: [Stream(tmp_path)])
    with pytest.raises(DataError, match="stream 'a' is itself a mix"):
        mix("train", streams={"a": share})


@pytest.mark.parametrize(
    ("option", "path"),
    [
        ("loader.workers=-1", "loader.workers"),
        ("loader.num_canonical_nodes=0", "loader.num_canonical_nodes"),
        ("loader.cache_limit=500", "loader.cache_limit"),
        ("loader.cache_limit=much", "loader.cache_limit"),
        ("loader.shufle=true", "loader.shufle"),
        ("max_text_tokens=0", "max_text_tokens"),
    ],
)
def test_loader_and_reading_options_are_checked(option: str, path: str) -> None:
    with pytest.raises(RecipeError) as caught:
        check(load_recipe("quickstart", f"stages.align.{option}"))
    assert [problem.path for problem in caught.value.problems] == [f"stages.align.{path}"]


def test_loader_options_reach_the_stage() -> None:
    options = "{workers: 3, shuffle: false, num_canonical_nodes: 2, cache_limit: 1.5TB}"
    stage = check(load_recipe("quickstart", f"stages.align.loader={options}")).plan.stages["align"]
    loader = stage.loader
    assert (loader.workers, loader.shuffle, loader.num_canonical_nodes, loader.cache_limit) == (3, False, 2, "1.5TB")
    assert stage.max_text_tokens == 2048
