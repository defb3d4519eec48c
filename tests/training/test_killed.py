"""A run killed anywhere resumes at the exact sample, with the losses and weights of an uninterrupted run."""

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

pytestmark = pytest.mark.filterwarnings("default")  # Composer, streaming and torch.distributed emit warnings
SCRIPT = Path(__file__).with_name("killed_script.py")
SIZES = {"a": 23, "b": 14}
STREAM = "{name: shards, folder: %s}"
EPOCH = 29  # samples of stream a in one epoch
STEPS = {"align": 9, "finetune": 14}
EVERY = {"align": 3, "finetune": 4}  # steps between checkpoints
Steps = dict[tuple[str, int], list[tuple[list[str], str]]]  # (stage, step) -> sample ids and loss of each rank


def options(choose: int, *more: str) -> list[str]:
    """Overrides for two small stages on a mix of two streams, with 29 and `choose` samples per epoch."""
    a, b = (STREAM % name for name in "ab")
    mix = f"{{name: mix, streams: {{a: {{data: {a}, repeat: 1.3}}, b: {{data: {b}, choose: {choose}}}}}}}"
    overrides = ["evaluation=null", "model.language.num_layers=1", "model.connector.num_layers=1"]
    for stage in STEPS:
        values = {"data": mix, "duration": f"{STEPS[stage]}ba", "checkpoint": f"{EVERY[stage]}ba"}
        overrides += [f"stages.{stage}.{key}={value}" for key, value in values.items()]
    return [*overrides, "stages.finetune.loader.workers=1", *more]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory with the recipe and the two streams, each in several shards."""
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
def in_root(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)


def launch(
    name: str, number: int, overrides: list[str], death: Mapping[str, Any] | None = None
) -> tuple[int, Steps, str]:
    """Launch run `name`; return the exit code, the steps trained, and the first rank's output."""
    folder = Path(f"output-{name}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()

    def work() -> int:
        record(folder, death or {})
        return run.main(["tiny.yaml", f"run={name}", *overrides])

    code = ranks(number, work, folder)
    return code, trained(folder), (folder / "rank0.txt").read_text()


def trained(folder: Path) -> Steps:
    steps: Steps = {}
    for path in sorted(folder.glob("rank*.jsonl")):
        for line in path.read_text().splitlines():
            stage, step, ids, loss = json.loads(line)
            steps.setdefault((stage, step), []).append((ids, loss))
    return steps


def after(steps: Steps, stage: str, step: int) -> Steps:
    """Return the steps after this one."""
    order = list(STEPS)
    return {key: value for key, value in steps.items() if (order.index(key[0]), key[1]) > (order.index(stage), step)}


def weights(name: str) -> bytes:
    return Path(f"runs/{name}/model/model.safetensors").read_bytes()


@pytest.fixture
def uninterrupted(in_root: None) -> Steps:
    """Steps of an uninterrupted run on two sharded ranks."""
    if not Path("output-uninterrupted").exists():
        code, _, output = launch("uninterrupted", 2, options(choose=9))
        assert code == 0, output
    steps = trained(Path("output-uninterrupted"))
    assert len(steps) == sum(STEPS.values())
    assert {sum(len(ids) for ids, _ in parts) for parts in steps.values()} == {8, EPOCH + 9 - 4 * 8}
    assert {name[0] for parts in steps.values() for ids, _ in parts for name in ids} == {"a", "b"}
    return steps


def begin(name: str, stage: str) -> None:
    """Make a run folder as it is when `stage` begins."""
    shutil.rmtree(f"runs/{name}", ignore_errors=True)
    if stage == "finetune":
        ignore = shutil.ignore_patterns("finetune", "uninterrupted-finetune", ".lock")
        shutil.copytree("runs/uninterrupted", f"runs/{name}", symlinks=True, ignore=ignore)
        shutil.rmtree(f"runs/{name}/model")


def random_kills(number: int, seed: int) -> list[tuple[str, str, dict[str, Any]]]:
    """Choose stage, description and `death` of kills: each after a checkpoint, at least two steps before the end."""
    rng, kills = random.Random(seed), []
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
        kills.append((stage, f"{what} step {step}", {**death, "at": step}))
    return kills


def assert_resumes_exactly(stage: str, what: str, death: dict[str, Any], uninterrupted: Steps) -> None:
    """Kill a run at `death`, launch it again, and compare all steps with those of the uninterrupted run."""
    step = death.pop("at")
    begin("killed", stage)
    code, before, output = launch("killed", 2, options(choose=9), death)
    assert code == -9, output
    assert not Path("runs/killed/model").exists()
    assert all(all(part in uninterrupted[key] for part in parts) for key, parts in before.items())
    code, rest, output = launch("killed", 2, options(choose=9))
    assert code == 0, output
    last = (step - 1) // EVERY[stage] * EVERY[stage]  # the latest checkpoint, unless the one at `step` was complete
    resumed = next(at for at in (last, step) if f"stage {stage}: resumed at step {at}," in output)
    assert resumed == last or "path" in death
    assert rest == after(uninterrupted, stage, resumed)
    assert weights("killed") == weights("uninterrupted")
    print(f"killed at {what} of {stage}, resumed at step {resumed}: {len(rest)} steps equal", flush=True)


def test_two_killed_runs_resume_exactly(uninterrupted: Steps) -> None:
    for stage, what, death in random_kills(2, seed=1):
        assert_resumes_exactly(stage, what, death, uninterrupted)


@pytest.mark.slow
def test_ten_killed_runs_resume_exactly(uninterrupted: Steps) -> None:
    for stage, what, death in random_kills(10, seed=0):
        assert_resumes_exactly(stage, what, death, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 3, 5, 7])
def test_a_run_killed_while_a_model_is_written(uninterrupted: Steps, number: int) -> None:
    """The finished stage is not trained again, and the next one starts from its complete model."""
    begin("killed", "align")
    code, _, output = launch("killed", 2, options(choose=9), {"path": r"align/\.model\.", "number": number})
    assert code == -9, output
    assert not Path("runs/killed/align/model").exists()
    code, rest, output = launch("killed", 2, options(choose=9))
    assert code == 0, output
    assert f"stage align: resumed at step {STEPS['align']}," in output
    assert rest == after(uninterrupted, "align", STEPS["align"])
    assert weights("killed") == weights("uninterrupted")


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
def test_another_number_of_ranks_resumes_in_the_same_order(in_root: None, first: str, then: str) -> None:
    """An epoch has 40 samples, which all numbers of ranks split evenly. Losses differ by the rounding of sums."""
    for name in (first, then):
        number, sharding = RANKS[name]
        one_stage = ("stages.align=null", "stages.order=null", "stages.finetune.keep=9")
        overrides = options(11, *one_stage, f"stages.finetune.sharding={sharding}")
        if name == first:
            code, before, output = launch(f"from-{first}", number, overrides)
            assert code == 0, output
            for path in (Path(f"runs/from-{first}/model"), *Path(f"runs/from-{first}").glob("*/*/ep2-ba1*")):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        else:
            code, resumed, output = launch(f"from-{first}", number, overrides)
            assert code == 0, output
            assert "stage finetune: resumed at step 8," in output
    assert list(resumed) == [("finetune", step) for step in range(9, 15)]
    for key, parts in resumed.items():
        ids, expected = (sorted(name for names, _ in rows for name in names) for rows in (parts, before[key]))
        assert ids == expected, key
        assert float.fromhex(parts[0][1]) == pytest.approx(float.fromhex(before[key][0][1]), rel=1e-4), key
    latest = next(Path(f"runs/from-{first}/finetune/checkpoints").glob("ep*-ba14*"))
    assert latest.is_dir() is (then in ("two", "four") or first == "two")  # otherwise it is one file
    shutil.rmtree(f"runs/from-{first}")


@pytest.mark.slow
@pytest.mark.parametrize("who", ["SIGTERM", "SIGKILL", 0, 1])
def test_the_loss_of_a_launcher_or_rank_ends_all_ranks(
    uninterrupted: Steps,
    composer: Callable[..., subprocess.Popen[str]],
    monkeypatch: pytest.MonkeyPatch,
    who: str | int,
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
    code, rest, output = launch("lost", 2, options(choose=9))
    assert code == 0, output
    # Ranks get the launcher's signal a moment later, and may have reached the next checkpoint by then.
    resumed = next(step for step in (4, 8, 12) if f"stage finetune: resumed at step {step}," in output)
    assert rest == after(uninterrupted, "finetune", resumed)
    assert weights("lost") == weights("uninterrupted")


def in_session(session: int) -> list[psutil.Process]:
    """Return the processes of this session that are still running."""
    running = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                running.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return running
