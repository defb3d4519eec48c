"""Ablations: reading, merging into recipes, commands, and their table in the docs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hub import Hub

from ssmvl.cli import main
from ssmvl.errors import RecipeError
from ssmvl.recipes.ablations import PREFIX, Ablation, find_ablation, read_ablations, shipped_ablations
from ssmvl.recipes.files import recipe_names, recipe_path
from ssmvl.recipes.merge import load_recipe
from ssmvl.training import schema
from ssmvl.training.run import main as composer_main

ROOT = Path(__file__).parents[2]
CSM = "ablation:ml_mamba/table7/csm"
ENTRY = "table: t1, row: a, recipe: quickstart, overrides: [seed=1], published: {VQAv2: 1}"
NOT_CHECKED = (
    "model.tokenizer: not checked, EleutherAI/gpt-neox-20b is not in the hub's cache; "
    "it is downloaded when training starts"
)
Capture = pytest.CaptureFixture[str]
Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def written(text: str) -> Path:
        (tmp_path / "mine.yaml").write_text(text)
        return tmp_path / "mine.yaml"

    return written


def problems(path: Path) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        read_ablations(path)
    return list(map(str, caught.value.problems))


# The file


def test_every_row_of_the_papers_tables_is_listed() -> None:
    rows = Counter((entry.recipe, entry.table) for entry in shipped_ablations())
    tables = {"ml_mamba": {"table4": 3, "table5": 3, "table6": 3, "table7": 2}}
    tables |= {"vl_mamba": {"table2": 3, "table3": 2, "table4": 3, "table5": 2}, "mamba_vlm": {"table3": 4}}
    assert rows == {(recipe, table): n for recipe, counts in tables.items() for table, n in counts.items()}


def test_rows_of_one_table_are_different_models_with_results_for_the_same_benchmarks() -> None:
    tables: dict[tuple[str, str], list[Ablation]] = {}
    for entry in shipped_ablations():
        tables.setdefault((entry.recipe, entry.table), []).append(entry)
    for entries in tables.values():
        models = [load_recipe(entry).data["model"] for entry in entries]
        assert all(model not in models[:number] for number, model in enumerate(models))
        assert len({tuple(entry.published) for entry in entries}) == 1


@pytest.mark.parametrize("entry", shipped_ablations(), ids=lambda entry: entry.name)
def test_an_entry_is_its_recipe_with_overrides_and_its_own_run(entry: Ablation) -> None:
    recipe = load_recipe(PREFIX + entry.name)
    assert recipe.data == load_recipe(entry.recipe, *entry.overrides, f"run={entry.run}").data
    assert recipe.data["run"] == entry.run
    assert schema.NAME.fullmatch(entry.run)
    assert recipe.source == PREFIX + entry.name
    assert recipe == load_recipe(entry)


def test_an_entry_is_named_after_its_recipe_table_and_row() -> None:
    entry = find_ablation("ml_mamba/table4/mamba2-1.3b")
    assert (entry.name, entry.run) == ("ml_mamba/table4/mamba2-1.3b", "ml_mamba-table4-mamba2-1-3b")
    assert entry.published["GQA"] == 55.41
    assert load_recipe(CSM).data["model"]["connector"]["scan_order"] == "csm"
    assert find_ablation(CSM).overrides == ["model.connector.scan_order=csm"]


def test_overrides_of_the_user_are_applied_last() -> None:
    data = load_recipe(CSM, "model.connector.scan_order=raster", "run=mine", "seed=7").data
    assert (data["model"]["connector"]["scan_order"], data["run"], data["seed"]) == ("raster", "mine", 7)


@pytest.mark.parametrize("name", ["ablation:ml_mamba/table7/cms", "ablation:", "ablation:ml_mamba"])
def test_an_unknown_entry_raises_an_error_with_the_nearest_name(name: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(name)
    assert f"unknown ablation {name.removeprefix(PREFIX)!r}" in str(caught.value)
    assert "Allowed: mamba_vlm/table3/baseline, " in str(caught.value)
    assert ("Did you mean 'ml_mamba/table7/csm'?" in str(caught.value)) is name.endswith("cms")


def test_the_file_is_not_a_recipe() -> None:
    assert "ablations" not in recipe_names()
    with pytest.raises(RecipeError, match="unknown recipe 'ablations'"):
        recipe_path("ablations")
    with pytest.raises(RecipeError, match="A list of ablations is checked with `ssmvl check FILE`"):
        load_recipe(ROOT / "recipes/ablations.yaml")


# Invalid files


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"- {{{ENTRY}, nots: x}}", ["entry 1.nots: an ablation has no option 'nots'. Did you mean 'note'?"]),
        ("- {table: t1, row: a, recipe: q, overrides: []}", ["entry 1.published: an ablation needs 'published'"]),
        (f"- {{{ENTRY}}}\n- x", ["entry 2: expected a mapping of options, received 'x'"]),
        ("- {" + ENTRY.replace("t1", "a/b") + "}", ["entry 1.table: must be a name of letters"]),
        ("- {" + ENTRY.replace("[seed=1]", "seed=1") + "}", ["entry 1.overrides: expected list[str]"]),
        ("- {" + ENTRY.replace("VQAv2: 1", "VQAv2: high") + "}", ["entry 1.published: expected dict[str, float]"]),
        (f"- {{{ENTRY}}}\n- {{{ENTRY}}}", ["entry 2: quickstart/t1/a would share its run folder with quickstart/t1/a"]),
        (
            "- {" + ENTRY.replace("row: a", "row: b.c") + "}\n- {" + ENTRY.replace("row: a", "row: b-c") + "}",
            ["entry 2: quickstart/t1/b-c would share its run folder with quickstart/t1/b.c"],
        ),
        (
            "- {row: a}\n- y",
            [f"entry 1.{key}: an ablation needs" for key in ("table", "recipe", "overrides", "published")]
            + ["entry 2: expected a mapping"],
        ),
        ("[]", ["the list has no entry"]),
        ("model: {}", ["ablations must be a list of entries, received a mapping"]),
        ("- {a: 1, a: 2}", ["cannot be read"]),
        ("- [", ["cannot be read"]),
    ],
)
def test_every_mistake_in_a_file_is_reported(write: Write, text: str, expected: list[str]) -> None:
    lines = problems(write(text))
    assert len(lines) == len(expected), lines
    assert all(line.startswith(start) for line, start in zip(lines, expected, strict=True)), lines


# Commands


def test_check_prints_a_line_for_each_entry_and_all_problems(write: Write, capsys: Capture) -> None:
    rows = {"good": "seed=1", "two": "model.conector=mlp, stages.align.batch=0", "shape": "model.language.width=7"}
    rows |= {"no_override": "x", "no_recipe": "seed=2"}
    text = "".join(f"- {{{ENTRY.replace('row: a', f'row: {row}').replace('seed=1', o)}}}\n" for row, o in rows.items())
    path = write(text.replace("row: no_recipe, recipe: quickstart", "row: no_recipe, recipe: quickstrat"))
    assert main(["check", str(path)]) == 2
    shown = capsys.readouterr()
    assert [line.rpartition(": ")[2] for line in shown.out.splitlines()] == [
        "no problem found",
        "2 problems",
        "1 problem",
        "1 problem",
        "1 problem",
    ]
    assert shown.err.startswith(f"error: {path}: 5 problems\n")
    assert "quickstart/t1/two: model.conector: ModelParts has no option 'conector'" in shown.err
    assert "quickstart/t1/two: stages.align.batch: must be from 1 to 10^6" in shown.err
    assert "quickstart/t1/shape: model.language: " in shown.err
    assert "quickstart/t1/no_override: 'x' is not an override" in shown.err
    assert "quickstrat/t1/no_recipe: unknown recipe 'quickstrat'" in shown.err


def test_a_note_of_several_entries_is_printed_once(write: Write, hub: Hub, capsys: Capture) -> None:
    text = ENTRY.replace("seed=1", "model.tokenizer=owner/none")
    path = write(f"- {{{text}}}\n- {{{text.replace('row: a', 'row: b')}}}\n")
    assert main(["check", str(path)]) == 0
    subjects = [line.partition(": ")[0] for line in capsys.readouterr().out.splitlines()]
    assert subjects == ["ablation:quickstart/t1/a", "ablation:quickstart/t1/b", "model.tokenizer"]
    assert hub.requests == []


def test_show_prints_the_published_results(capsys: Capture) -> None:
    assert main(["show", "ablation:ml_mamba/table4/mamba2-2.7b"]) == 0
    row, published, note, first = capsys.readouterr().out.splitlines()[:4]
    assert row == "# ml_mamba, table4, row mamba2-2.7b"
    assert published == "# published: VQAv2 75.26, GQA 60.68, TextVQA 52.2, POPE 88.3, VizWiz 45.17, VSR 51.5"
    assert note.startswith(
        "# note: the paper says this table uses the plain MLP, but these are the results of msc_advanced;"
    )
    assert first == "seed: 0"
    assert main(["show", CSM]) == 0
    assert "# note" not in capsys.readouterr().out


def test_check_show_and_train_accept_an_entry(
    hub: Hub, capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert main(["check", "ablation:mamba_vlm/table3/baseline"]) == 0
    result, *notes = capsys.readouterr().out.splitlines()
    assert result == "ablation:mamba_vlm/table3/baseline: no problem found"
    parts = ("model.language", "model.encoders.dinov2", "model.encoders.siglip")
    assert notes[0] == NOT_CHECKED
    assert all(note.startswith(f"{part}.weights: not checked") for note, part in zip(notes[1:], parts, strict=True))
    assert main(["show", CSM, "seed=3"]) == 0
    (tmp_path / "again.yaml").write_text(capsys.readouterr().out)
    assert load_recipe(tmp_path / "again.yaml").data == load_recipe(CSM, "seed=3").data
    monkeypatch.chdir(tmp_path)
    assert main(["train", CSM, "model.connector.nosuch=1"]) == 2
    assert composer_main([CSM, "model.connector.nosuch=1"]) == 2
    assert capsys.readouterr().err.count(f"error: {CSM}: 1 problem\n  model.connector.nosuch: ") == 2


@pytest.mark.parametrize("kind", ["recipe", "recipes"])
def test_list_shows_recipes_and_entries(kind: str, capsys: Capture) -> None:
    assert main(["list", kind]) == 0
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    names = [*recipe_names(), *[PREFIX + entry.name for entry in shipped_ablations()]]
    assert shown == [["recipe", name] for name in names]


# The docs


def test_the_docs_show_every_row() -> None:
    lines = (ROOT / "docs/systems.md").read_text().splitlines()
    for entry in shipped_ablations():
        (line,) = [line for line in lines if line.startswith("|") and f"`ssmvl train {PREFIX}{entry.name}`" in line]
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        numbers = [float(cell) for cell in cells if re.fullmatch(r"[\d,]+(\.\d+)?", cell)]
        assert numbers == list(entry.published.values()), entry.name
