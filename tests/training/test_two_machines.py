"""Runs on two machines, simulated by network namespaces with separate shared memory and temporary files.

Like the nodes of a cluster, they share only the working directory.
"""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ranks import two_ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ssmvl

pytestmark = [pytest.mark.netns, pytest.mark.filterwarnings("default")]  # Composer emits warnings
# The order of samples is split into one part per machine, unless the recipe sets the number.
PARTS = tuple(f"stages.{stage}.loader.num_canonical_nodes=2" for stage in ("align", "finetune"))
LONGER = (*PARTS, "stages.finetune.duration=20ba", "stages.finetune.checkpoint=5ba")
SCRIPT = Path(__file__).with_name("machine_script.py")
END = 240  # seconds after which a launch counts as stuck


class Machine:
    """A network namespace with one address.

    Args:
        rank: 0 or 1.
        folder: directory for its temporary files and output.
    """

    def __init__(self, rank: int, folder: Path) -> None:
        self.rank, self.name, self.address = rank, f"ssmvl-{os.getpid()}-{rank}", f"10.99.0.{rank + 1}"
        self.output, self.tmp = folder / f"machine{rank}.txt", folder / f"tmp{rank}"
        self.tmp.mkdir()
        self.launched: list[subprocess.Popen[bytes]] = []

    def launch(self, *recipe: str) -> subprocess.Popen[bytes]:
        """Start Composer's launcher with one process."""
        composer = [str(Path(sys.executable).with_name("composer")), "-n", "1", "--world_size", "2"]
        composer += ["--node_rank", str(self.rank), "--master_addr", "10.99.0.1", "--master_port", "29500"]
        # `ip netns exec` also creates a mount namespace, so this machine has its own shared memory.
        mount = 'mount -t tmpfs tmpfs /dev/shm && exec "$@"'
        variables = {"GLOO_SOCKET_IFNAME": "eth0", "TMPDIR": str(self.tmp), "OMP_NUM_THREADS": "1"}
        with self.output.open("wb") as output:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.name, "sh", "-c", mount, "sh", *composer, *recipe],
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **variables, "PYTHONUNBUFFERED": "1"},
            )
        self.launched.append(process)
        return process

    def lose(self) -> None:
        """Kill every process of the machine."""
        for _ in range(2):  # twice, for processes started while the first list was made
            for pid in ip("netns", "pids", self.name).split():
                try:
                    os.kill(int(pid), signal.SIGKILL)
                except ProcessLookupError:
                    continue
        for process in self.launched:
            process.wait()

    def remove(self) -> None:
        """Remove the machine, and kill its processes."""
        if shutil.which("ip") and self.name in ip("netns", "list").split():
            self.lose()
            ip("netns", "del", self.name)


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def machines(tiny: Path) -> Iterator[list[Machine]]:
    """Two connected machines, in the directory of `tiny`; they are removed after the test."""
    pair = [Machine(rank, tiny.parent) for rank in (0, 1)]
    first, second = pair
    try:
        if shutil.which("ip") is None:
            pytest.skip("the command `ip` is not installed; it creates network namespaces")
        for machine in pair:
            added = subprocess.run(["ip", "netns", "add", machine.name], capture_output=True, text=True, check=False)
            if added.returncode:
                pytest.skip(f"this user cannot create network namespaces: {added.stderr.strip()}")
        ip("-n", first.name, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", second.name)
        for machine in pair:
            ip("-n", machine.name, "addr", "add", f"{machine.address}/24", "dev", "eth0")
            ip("-n", machine.name, "link", "set", "lo", "up")
            ip("-n", machine.name, "link", "set", "eth0", "up")
        yield pair
    finally:
        for machine in pair:
            machine.remove()


def end(machines: list[Machine]) -> tuple[list[int], list[str]]:
    """Wait for the last launches; return their exit codes and output."""
    codes = [machine.launched[-1].wait(timeout=END) for machine in machines]
    return codes, [machine.output.read_text() for machine in machines]


def losses(run: str) -> dict[int, float]:
    """Return the losses of `finetune` by step; if a step was logged twice, the later one."""
    events = EventAccumulator(f"runs/{run}/tensorboard/{run}-finetune")
    events.Reload()
    return {event.step: event.value for event in events.Scalars("loss/train/total")}


def test_two_machines_train_like_one(tiny: Path, machines: list[Machine]) -> None:
    for machine in machines:
        machine.launch("tiny.yaml", *PARTS)
    codes, outputs = end(machines)
    assert codes == [0, 0], outputs
    assert json.loads(Path("runs/tiny/results.json").read_text())["reading"]["n"] == 2
    shards = {path.name for path in Path("runs/tiny/finetune/checkpoints/ep0-ba4").iterdir()}
    assert shards == {".metadata", "__0_0.distcp", "__1_0.distcp"}
    two_ranks(lambda: ssmvl.train(tiny, "run=one", *PARTS), tiny.parent)
    assert losses("tiny") == pytest.approx(losses("one"), rel=1e-4)
    assert len(losses("tiny")) == 4


def unplug(machine: Machine) -> None:
    ip("-n", machine.name, "link", "set", "eth0", "down")


def plug_in(machine: Machine) -> None:
    ip("-n", machine.name, "link", "set", "eth0", "up")


@pytest.mark.parametrize("failure", [Machine.lose, unplug])
def test_the_loss_of_a_machine_ends_the_run_and_both_resume(
    tiny: Path, machines: list[Machine], failure: Callable[[Machine], None]
) -> None:
    os.mkfifo("step")
    step = os.open("step", os.O_RDONLY | os.O_NONBLOCK)
    for machine in machines:
        machine.launch(str(SCRIPT), "tiny.yaml", *LONGER)
    ready, _, _ = select.select([step], [], [], END / 2)
    os.close(step)
    assert ready, machines[0].output.read_text()
    failure(machines[1])
    codes, outputs = end(machines)
    assert 0 not in codes
    assert "error: the connection to another rank was lost" in outputs[0]
    assert not Path("runs/tiny/model").exists()
    plug_in(machines[1])
    for machine in machines:
        machine.launch("tiny.yaml", *LONGER)
    codes, outputs = end(machines)
    assert codes == [0, 0], outputs
    assert "stage align: already finished" in outputs[0]
    assert re.search(r"stage finetune: resumed at step (5|10|15),", outputs[0])
    two_ranks(lambda: ssmvl.train(tiny, "run=one", *LONGER), tiny.parent)
    assert losses("tiny") == pytest.approx(losses("one"), rel=1e-4)
