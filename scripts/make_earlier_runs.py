"""Archive run folders of this version for tests/training/test_earlier_runs.py.

    PYTHONPATH=tests/training python scripts/make_earlier_runs.py tests/training/earlier_runs/vX.Y.Z.tar.xz

Run it once for a release that changes the contents of a run folder. Never change archives of earlier versions.
"""

import io
import json
import os
import signal
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from composer.utils import dist
from killed_script import ranks

import ssmvl
from ssmvl.data.scenes.scenes import digit_scenes
from ssmvl.data.streams import read_records
from ssmvl.training import run
from ssmvl.training.callbacks.loss_guard import LossGuard
from ssmvl.training.checkpoints.export import export

RECIPE = Path(__file__).parents[1] / "tests/training/earlier_runs/recipe.yaml"
KILLED_AT = 85  # step of the second stage, which has 100; the latest checkpoint is of step 80
EXCLUDED = ("tensorboard", ".lock", "align/checkpoints", "finished1/finetune", "finished2/finetune")
MARGIN = 0.05  # minimum distance of the two highest logits, so that rounding on another CPU gives the same answer
SCENES = 30


def launch(name: str, number: int, death: int | None) -> list[Any]:
    """Train on `number` ranks and return the second stage's steps: [step, sample ids of each rank, loss].

    Steps are recorded by patching a callback, because the state of a new one would be saved in the checkpoints.
    """
    folder = Path(f"steps-{name}")
    folder.mkdir(exist_ok=True)
    batch_end = LossGuard.batch_end

    def work() -> int:
        def recorded(self: LossGuard, state: Any, logger: Any) -> None:
            batch_end(self, state, logger)
            if state.run_name.endswith("finetune"):
                step = state.timestamp.batch.value
                line = [step, list(state.batch["sample_ids"]), float(state.total_loss_dict["loss/train/total"])]
                with (folder / f"rank{dist.get_global_rank()}.jsonl").open("a") as file:
                    file.write(json.dumps(line) + "\n")
                if step == death:
                    os.killpg(0, signal.SIGKILL)

        LossGuard.batch_end = recorded
        return run.main(["recipe.yaml", f"run={name}"])

    code = ranks(number, work, folder)
    assert code == (-9 if death else 0), (folder / "rank0.txt").read_text()
    parts = [[json.loads(line) for line in path.open()] for path in sorted(folder.glob("rank*.jsonl"))]
    return [[rows[0][0], [row[1] for row in rows], rows[0][2]] for rows in zip(*parts, strict=True)]


def answers(folder: str, records: list[Any]) -> list[Any]:
    """Generate answers, and return [scene, question, answer] if each token is the likeliest by at least `MARGIN`."""
    assistant = ssmvl.load(folder)
    model, gaps = assistant.model, []

    def recording_gaps(call: Any) -> Any:
        def wrapped(*arguments: Any) -> Any:
            logits = call(*arguments)
            top = logits[:, : model.language.num_tokens].topk(2).values
            gaps.append(float(top[0, 0] - top[0, 1]))
            return logits

        return wrapped

    model.prefill, assistant._step = recording_gaps(model.prefill), recording_gaps(assistant._step)
    clear = []
    for number, record in enumerate(records):
        question = record["conversation"][0]["content"]
        gaps.clear()
        (answer,) = assistant.generate([question], [record["images"][0]], max_new_tokens=8)
        if min(gaps) > MARGIN:
            clear.append([f"scene{number}.png", question, answer])
    return clear


def main() -> None:
    out = Path(sys.argv[1]).resolve()
    recipe = RECIPE.read_text()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        Path("recipe.yaml").write_text(recipe)
        expected: dict[str, Any] = {"resumed": {}, "answers": {}}
        records = read_records(digit_scenes("test", test_size=SCENES))
        for number in (1, 2):
            launch(f"killed{number}", number, KILLED_AT)
            steps = launch(f"finished{number}", number, None)
            expected["resumed"][f"killed{number}"] = [step for step in steps if step[0] > 80]
            export(f"runs/killed{number}/finetune/checkpoints", f"exported{number}")
            expected["answers"][f"killed{number}"] = answers(f"exported{number}", records)
            expected["answers"][f"finished{number}"] = answers(f"runs/finished{number}", records)
        files = {"expected.json": json.dumps(expected, indent=1).encode()}
        files |= {f"scene{number}.png": record["images"][0] for number, record in enumerate(records)}
        for path in sorted(Path("runs").rglob("*")):
            if path.is_file() and not any(part in f"{path}" for part in EXCLUDED):
                files[str(path)] = path.read_bytes()
        with tarfile.open(out, "w:xz", preset=9) as tar:
            for name, content in files.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    print(f"{out}: {out.stat().st_size:,} bytes; { ({k: len(v) for k, v in expected['answers'].items()}) } answers")


if __name__ == "__main__":
    main()
