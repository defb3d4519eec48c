"""A run that is killed anywhere goes on at the exact sample, with the losses and weights of one that never was."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
from killed_script import ranks, record
from tiny_recipe import TINY

from ssmvl.data import shards
from ssmvl.data.scenes.scenes import digit_scenes
from ssmvl.data.shards import ensure_shards
from ssmvl.data.streams import read_records
from ssmvl.training import run

pytestmark = pytest.mark.filterwarnings("default")  # Composer, streaming and torch.distributed warn on their own
SCRIPT = Path(__file__).with_name("killed_script.py")
SIZES = {"a": 23, "b": 14}
STREAM = "{name: shards, folder: %s}"
EPOCH = 29  # samples of stream a in an epoch
STEPS, EVERY = {"align": 9, "finetune": 14}, {"align": 3, "finetune": 4}  # and steps between checkpoints
Steps = dict[tuple[str, int], list[tuple[list[str], str]]]  # by stage and step, each rank's sample ids and the loss


def options(choose: int, *more: str) -> list[str]:
    """Two small stages on a mix of two streams, of which an epoch brings 29 and `choose` samples."""
    a, b = (STREAM % name for name in "ab")
    mix = f"{{name: mix, streams: {{a: {{data: {a}, repeat: 1.3}}, b: {{data: {b}, choose: {choose}}}}}}}"
    found = ["evaluation=null", "model.language.num_layers=1", "model.connector.num_layers=1"]
    for stage in STEPS:
        values = {"data": mix, "duration": f"{STEPS[stage]}ba", "checkpoint": f"{EVERY[stage]}ba"}
        found += [f"stages.{stage}.{key}={value}" for key, value in values.items()]
    return [*found, "stages.finetune.loader.workers=1", *more]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the two streams, in several shards each, and the recipe."""
    folder = tmp_path_factory.mktemp("killed")
    (folder / "tiny.yaml").write_text(TINY)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(shards, "SHARD_BYTES", 4000)
        for name, size in SIZES.items():
            scenes = read_records(digit_scenes("train", train_size=size, folder="scenes"))
            records = [{**record, "id": f"{name}{at}"} for at, record in enumerate(scenes)]
            ensure_shards(folder / name / "train", lambda records=records: records, size)
    return folder


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    return place


def launch(name: str, number: int, given: list[str], death: Mapping[str, Any] | None = None) -> tuple[int, Steps, str]:
    """One start of run `name`: exit code, what was trained, and what the first rank said."""
    folder = Path(f"said-{name}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()

    def work() -> int:
        record(folder, death or {})
        return run.main(["tiny.yaml", f"run={name}", *given])

    code = ranks(number, work, folder)
    return code, trained(folder), (folder / "rank0.txt").read_text()


def trained(folder: Path) -> Steps:
    found: Steps = {}
    for path in sorted(folder.glob("rank*.jsonl")):
        for line in path.read_text().splitlines():
            stage, step, ids, loss = json.loads(line)
            found.setdefault((stage, step), []).append((ids, loss))
    return found


def after(steps: Steps, stage: str, step: int) -> Steps:
    """What follows a step."""
    order = list(STEPS)
    return {key: value for key, value in steps.items() if (order.index(key[0]), key[1]) > (order.index(stage), step)}


def weights(name: str) -> bytes:
    return Path(f"runs/{name}/model/model.safetensors").read_bytes()


@pytest.fixture
def whole(here: Path) -> Steps:
    """Trained by two sharded ranks that nothing happens to."""
    if not Path("said-whole").exists():
        code, _, said = launch("whole", 2, options(choose=9))
        assert code == 0, said
    steps = trained(Path("said-whole"))
    assert len(steps) == sum(STEPS.values())
    assert {sum(len(ids) for ids, _ in parts) for parts in steps.values()} == {8, EPOCH + 9 - 4 * 8}
    assert {name[0] for parts in steps.values() for ids, _ in parts for name in ids} == {"a", "b"}
    return steps


def begin(name: str, stage: str) -> None:
    """A run folder as it is when `stage` begins."""
    shutil.rmtree(f"runs/{name}", ignore_errors=True)
    if stage == "finetune":
        left_out = shutil.ignore_patterns("finetune", "whole-finetune", ".lock")
        shutil.copytree("runs/whole", f"runs/{name}", symlinks=True, ignore=left_out)
        shutil.rmtree(f"runs/{name}/model")


def points(number: int, seed: int) -> list[tuple[str, str, dict[str, Any]]]:
    """Stage, what happens, and the death: each after a checkpoint and two steps before the end at the latest."""
    rng, found = random.Random(seed), []
    for at in range(number):
        stage = list(STEPS)[(at + 1) % 2]
        every, last = EVERY[stage], STEPS[stage] - 2
        moment = rng.choice(["start", "backward", "end", "write"])
        step = rng.randint(every + 1, last)
        death: dict[str, Any] = {"stage": stage, "moment": moment, "step": step}
        if moment == "write":
            step = rng.choice(range(2 * every, last + 1, every))
            death = {"path": rf"{stage}/checkpoints/ep\d+-ba{step}\b", "number": rng.randint(1, 3)}
        what = {"write": f"file {death.get('number')} of the checkpoint of"}.get(moment, f"the {moment} of")
        found.append((stage, f"{what} step {step}", {**death, "at": step}))
    return found


def assert_goes_on_equal(stage: str, what: str, death: dict[str, Any], whole: Steps) -> None:
    """Kill a run there, start it again, and compare all it trains with one that was not killed."""
    step = death.pop("at")
    begin("killed", stage)
    code, before, said = launch("killed", 2, options(choose=9), death)
    assert code == -9, said
    assert not Path("runs/killed/model").exists()
    assert all(all(one in whole[key] for one in parts) for key, parts in before.items())
    code, rest, said = launch("killed", 2, options(choose=9))
    assert code == 0, said
    last = (step - 1) // EVERY[stage] * EVERY[stage]  # the newest checkpoint, unless it died when that was whole
    resumed = next(at for at in (last, step) if f"stage {stage}: resumed at step {at}," in said)
    assert resumed == last or "path" in death
    assert rest == after(whole, stage, resumed)
    assert weights("killed") == weights("whole")
    print(f"killed at {what} of {stage}, resumed at step {resumed}: {len(rest)} steps equal", flush=True)


def test_two_killed_runs_go_on_as_if_they_had_not_been(whole: Steps) -> None:
    for stage, what, death in points(2, seed=1):
        assert_goes_on_equal(stage, what, death, whole)


@pytest.mark.slow
def test_ten_killed_runs_go_on_as_if_they_had_not_been(whole: Steps) -> None:
    for stage, what, death in points(10, seed=0):
        assert_goes_on_equal(stage, what, death, whole)


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 3, 5, 7])
def test_killed_while_a_model_is_written(whole: Steps, number: int) -> None:
    """The stage is over, and trained no more; the next one begins from the whole folder."""
    begin("killed", "align")
    code, _, said = launch("killed", 2, options(choose=9), {"path": r"align/\.model\.", "number": number})
    assert code == -9, said
    assert not Path("runs/killed/align/model").exists()
    code, rest, said = launch("killed", 2, options(choose=9))
    assert code == 0, said
    assert f"stage align: resumed at step {STEPS['align']}," in said
    assert rest == after(whole, "align", STEPS["align"])
    assert weights("killed") == weights("whole")


RANKS = {"one": (1, "fsdp2"), "two": (2, "fsdp2"), "four": (4, "fsdp2"), "ddp": (2, "ddp")}
CHANGES = [
    ("two", "one"),
    ("one", "two"),
    ("two", "four"),
    ("four", "two"),
    ("ddp", "two"),
    ("two", "ddp"),
    ("ddp", "one"),
]


@pytest.mark.long
@pytest.mark.parametrize(
    ("first", "then"), [pytest.param(*change, marks=pytest.mark.slow) for change in CHANGES[1:]] + CHANGES[:1]
)
def test_another_number_of_ranks_goes_on_in_the_same_order(here: Path, first: str, then: str) -> None:
    """An epoch of 40 samples, which all of them can share evenly. Sums are rounded elsewhere, so losses differ."""
    found = {}
    for name in (first, then):
        number, sharding = RANKS[name]
        one_stage = ("stages.align=null", "stages.order=null", "stages.finetune.keep=9")
        given = options(11, *one_stage, f"stages.finetune.sharding={sharding}")
        if name == first:
            code, whole, said = launch(f"from-{first}", number, given)
            assert code == 0, said
            for path in (Path(f"runs/from-{first}/model"), *Path(f"runs/from-{first}").glob("*/*/ep2-ba1*")):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        else:
            code, found, said = launch(f"from-{first}", number, given)
            assert code == 0, said
            assert "stage finetune: resumed at step 8," in said
    assert list(found) == [("finetune", step) for step in range(9, 15)]
    for key, parts in found.items():
        ids, wanted = (sorted(name for some, _ in each for name in some) for each in (parts, whole[key]))
        assert ids == wanted, key
        assert float.fromhex(parts[0][1]) == pytest.approx(float.fromhex(whole[key][0][1]), rel=1e-4), key
    newest = next(Path(f"runs/from-{first}/finetune/checkpoints").glob("ep*-ba14*"))
    assert newest.is_dir() is (then in ("two", "four") or first == "two")  # else one file
    shutil.rmtree(f"runs/from-{first}")


@pytest.mark.slow
@pytest.mark.parametrize("who", ["SIGTERM", "SIGKILL", 0, 1])
def test_a_launcher_or_a_rank_that_is_lost_ends_all(
    whole: Steps, composer: Callable[..., subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch, who: str | int
) -> None:
    begin("lost", "finetune")
    for path in Path().glob("rank*.jsonl"):
        path.unlink()
    monkeypatch.setenv("DEATH", json.dumps({"stage": "finetune", "moment": "end", "step": 7, "who": who}))
    process = composer("-n", "2", str(SCRIPT), "tiny.yaml", "run=lost", *options(choose=9))
    output, _ = process.communicate(timeout=300)
    assert process.returncode not in (0, 2), output
    _, alive = psutil.wait_procs(in_session(process.pid), timeout=60)
    assert not alive
    assert 7 <= len(trained(Path())) < STEPS["finetune"]
    code, rest, said = launch("lost", 2, options(choose=9))
    assert code == 0, said
    # A launcher tells its ranks a moment later, in which they may have come to the next checkpoint.
    resumed = next(step for step in (4, 8, 12) if f"stage finetune: resumed at step {step}," in said)
    assert rest == after(whole, "finetune", resumed)
    assert weights("lost") == weights("whole")


def in_session(session: int) -> list[psutil.Process]:
    """Processes that the launcher started and that still run."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found
