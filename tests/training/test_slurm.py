"""The Slurm job file, run by bash as Slurm would, with stubs for `srun` and `scontrol`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

JOB = Path(__file__).parents[2] / "docs" / "slurm.sh"
BIN = Path(sys.executable).parent
# Starts the command once per node, like srun with one task per node, and fails if one of them fails.
SRUN = """
while [[ "$1" == --* ]]; do echo "$1" >> srun.txt; shift; done
for node in $(seq 0 $((SLURM_JOB_NUM_NODES - 1))); do
  SLURM_NODEID=$node SLURM_PROCID=$node {on_node} "$@" > node$node.txt 2>&1 &
  nodes+=($!)
done
for node in "${{nodes[@]}}"; do wait "$node" || code=$?; done
exit "${{code:-0}}"
"""
SCONTROL = """
[ "$1 $2" = "show hostnames" ] && [ "$3" = "$SLURM_JOB_NODELIST" ] && printf '%s\\n' $HOSTS && exit
[ "$1 $2" = "requeue $SLURM_JOB_ID" ] && touch requeued && exec kill "$(cat srun.pid)"
exit 1
"""
SHARDS = {"__0_0.distcp", "__1_0.distcp"}
Sbatch = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sbatch:
    """`sbatch(stubs, *arguments, HOSTS=...)` runs the job file on two nodes with two processes each."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bin").mkdir(exist_ok=True)

    def run(stubs: dict[str, str], *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        for name, code in {"scontrol": SCONTROL, **stubs}.items():
            (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\nset -u\n{code}")
            (tmp_path / "bin" / name).chmod(0o755)
        slurm = {"JOB_ID": "123456", "JOB_NODELIST": "gpu[07-08]", "JOB_NUM_NODES": "2"}
        slurm |= {"GPUS_ON_NODE": "2", "CPUS_PER_TASK": "96"}
        path = os.pathsep.join([str(tmp_path / "bin"), str(BIN), os.environ["PATH"]])
        environment = {**os.environ, "PATH": path, "HOSTS": "gpu07 gpu08", **variables}
        environment |= {f"SLURM_{name}": value for name, value in slurm.items() if f"SLURM_{name}" not in variables}
        return subprocess.run(
            ["bash", JOB, *arguments], env=environment, capture_output=True, text=True, timeout=280, check=False
        )

    return run


def srun(on_node: str = "env") -> str:
    return SRUN.format(on_node=on_node)


def test_each_node_starts_the_launcher_with_its_own_rank(sbatch: Sbatch) -> None:
    composer = "printf '%s\\n' \"$@\""
    done = sbatch({"srun": srun(), "composer": composer}, "recipe.yaml", "stages.a.data.folder=my data", "run=x")
    assert (done.returncode, done.stderr) == (0, "")
    for node in (0, 1):
        machines = f"-n 2 --world_size 4 --node_rank {node} --master_addr gpu07 --master_port 13456".split()
        overrides = ["recipe.yaml", "stages.a.data.folder=my data", "run=x"]
        assert Path(f"node{node}.txt").read_text().splitlines() == [*machines, *overrides]
    assert "--cpus-per-task=96" in Path("srun.txt").read_text().split()


def test_a_node_that_fails_fails_the_job(sbatch: Sbatch) -> None:
    composer = '[ "$SLURM_NODEID" = 0 ] || exit 2'
    assert sbatch({"srun": srun(), "composer": composer}, "recipe.yaml").returncode == 2


def test_a_missing_recipe_or_node_list_fails_the_job_before_srun(sbatch: Sbatch) -> None:
    stubs = {"srun": "touch started", "composer": "true"}
    done = sbatch(stubs)
    assert done.returncode == 2
    assert "error: no recipe given" in done.stderr
    assert sbatch({**stubs, "scontrol": "exit 1"}, "recipe.yaml").returncode == 1
    assert not Path("started").exists()


def test_near_its_end_the_job_is_requeued(sbatch: Sbatch) -> None:
    """The step runs until scontrol ends it."""
    step = 'echo $$ > srun.pid\nkill -USR1 "$PPID"\nexec tail --pid "$PPID" -f /dev/null > tail.txt 2>&1'
    done = sbatch({"srun": step}, "recipe.yaml")
    assert "job 123456 is requeued" in done.stdout
    assert done.returncode == 0
    assert Path("requeued").exists()
    Path("requeued").unlink()
    failing = SCONTROL.replace("touch requeued", "exit 3")
    assert sbatch({"srun": step, "scontrol": failing}, "recipe.yaml").returncode == 3
    assert not Path("requeued").exists()


@pytest.mark.netns
@pytest.mark.filterwarnings("default")  # Composer emits warnings
def test_two_nodes_train_a_recipe_to_its_end(tiny: Path, sbatch: Sbatch) -> None:
    isolate = "unshare --user --map-root-user --mount"  # nodes do not share memory
    if subprocess.run([*isolate.split(), "true"], capture_output=True, check=False).returncode:
        pytest.skip("this user cannot create namespaces")
    on_node = f"{isolate} sh -c 'mount -t tmpfs tmpfs /dev/shm && TMPDIR=/dev/shm exec \"$@\"' node"
    variables = {"HOSTS": "127.0.0.1 127.0.0.1", "SLURM_GPUS_ON_NODE": "1", "OMP_NUM_THREADS": "1"}
    done = sbatch({"srun": srun(on_node)}, "tiny.yaml", **variables)
    output = Path("node0.txt").read_text()
    assert done.returncode == 0, (output, done)
    assert "stage finetune: started" in output
    assert json.loads(Path("runs/tiny/results.json").read_text())["reading"]["n"] == 2
    assert {path.name for path in Path("runs/tiny/finetune/checkpoints/ep0-ba4").glob("*.distcp")} == SHARDS
