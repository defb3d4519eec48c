"""Two machines, as far as a kernel can be two: network namespaces joined by a cable, memory and temporary files apart.

What they share is the working folder, as the nodes of a cluster do.
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

pytestmark = [pytest.mark.netns, pytest.mark.filterwarnings("default")]  # Composer warns on its own account
# The order of samples is cut into as many parts as there are machines, unless a recipe says how many.
PARTS = tuple(f"stages.{stage}.loader.num_canonical_nodes=2" for stage in ("align", "finetune"))
LONGER = (*PARTS, "stages.finetune.duration=20ba", "stages.finetune.checkpoint=5ba")
SCRIPT = Path(__file__).with_name("machine_script.py")
END = 240  # seconds after which a launch counts as hanging


class Machine:
    """A network namespace with one address.

    Args:
        rank: 0 or 1.
        folder: where its temporary files and its output go.
    """

    def __init__(self, rank: int, folder: Path) -> None:
        self.rank, self.name, self.address = rank, f"ssmvl-{os.getpid()}-{rank}", f"10.99.0.{rank + 1}"
        self.said, self.tmp = folder / f"machine{rank}.txt", folder / f"tmp{rank}"
        self.tmp.mkdir()
        self.launched: list[subprocess.Popen[bytes]] = []

    def launch(self, *recipe: str) -> subprocess.Popen[bytes]:
        """Start the stock launcher with one process."""
        composer = [str(Path(sys.executable).with_name("composer")), "-n", "1", "--world_size", "2"]
        composer += ["--node_rank", str(self.rank), "--master_addr", "10.99.0.1", "--master_port", "29500"]
        # `ip netns exec` brings a mount namespace too: this machine's shared memory is its own.
        own = 'mount -t tmpfs tmpfs /dev/shm && exec "$@"'
        variables = {"GLOO_SOCKET_IFNAME": "eth0", "TMPDIR": str(self.tmp), "OMP_NUM_THREADS": "1"}
        with self.said.open("wb") as said:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.name, "sh", "-c", own, "sh", *composer, *recipe],
                stdout=said,
                stderr=subprocess.STDOUT,
                env={**os.environ, **variables, "PYTHONUNBUFFERED": "1"},
            )
        self.launched.append(process)
        return process

    def lose(self) -> None:
        """Every process of the machine ends at once."""
        for _ in range(2):  # what was started while they were listed
            for pid in ip("netns", "pids", self.name).split():
                try:
                    os.kill(int(pid), signal.SIGKILL)
                except ProcessLookupError:
                    continue
        for process in self.launched:
            process.wait()

    def remove(self) -> None:
        """Nothing is left of it."""
        if shutil.which("ip") and self.name in ip("netns", "list").split():
            self.lose()
            ip("netns", "del", self.name)


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def machines(tiny: Path) -> Iterator[list[Machine]]:
    """Two, joined by a cable, in the folder of `tiny`. Nothing of them outlives the test."""
    found = [Machine(rank, tiny.parent) for rank in (0, 1)]
    first, second = found
    try:
        if shutil.which("ip") is None:
            pytest.skip("there is no command `ip`, which makes network namespaces")
        for machine in found:
            made = subprocess.run(["ip", "netns", "add", machine.name], capture_output=True, text=True, check=False)
            if made.returncode:
                pytest.skip(f"this user may not make network namespaces: {made.stderr.strip()}")
        ip("-n", first.name, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", second.name)
        for machine in found:
            ip("-n", machine.name, "addr", "add", f"{machine.address}/24", "dev", "eth0")
            ip("-n", machine.name, "link", "set", "lo", "up")
            ip("-n", machine.name, "link", "set", "eth0", "up")
        yield found
    finally:
        for machine in found:
            machine.remove()


def end(machines: list[Machine]) -> tuple[list[int], list[str]]:
    """Exit codes of their last launches, and what those said."""
    codes = [machine.launched[-1].wait(timeout=END) for machine in machines]
    return codes, [machine.said.read_text() for machine in machines]


def losses(run: str) -> dict[int, float]:
    """By step of `finetune`; of a step that came twice, the later."""
    events = EventAccumulator(f"runs/{run}/tensorboard/{run}-finetune")
    events.Reload()
    return {event.step: event.value for event in events.Scalars("loss/train/total")}


def test_two_machines_train_what_one_does(tiny: Path, machines: list[Machine]) -> None:
    for machine in machines:
        machine.launch("tiny.yaml", *PARTS)
    codes, said = end(machines)
    assert codes == [0, 0], said
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


@pytest.mark.parametrize("happens", [Machine.lose, unplug])
def test_what_is_left_of_a_lost_machine_ends_and_both_go_on(
    tiny: Path, machines: list[Machine], happens: Callable[[Machine], None]
) -> None:
    os.mkfifo("step")
    step = os.open("step", os.O_RDONLY | os.O_NONBLOCK)
    for machine in machines:
        machine.launch(str(SCRIPT), "tiny.yaml", *LONGER)
    there, _, _ = select.select([step], [], [], END / 2)
    os.close(step)
    assert there, machines[0].said.read_text()
    happens(machines[1])
    codes, said = end(machines)
    assert 0 not in codes
    assert "error: the connection to another rank is lost" in said[0]
    assert not Path("runs/tiny/model").exists()
    plug_in(machines[1])
    for machine in machines:
        machine.launch("tiny.yaml", *LONGER)
    codes, said = end(machines)
    assert codes == [0, 0], said
    assert "stage align: finished before" in said[0]
    assert re.search(r"stage finetune: resumed at step (5|10|15),", said[0])
    two_ranks(lambda: ssmvl.train(tiny, "run=one", *LONGER), tiny.parent)
    assert losses("tiny") == pytest.approx(losses("one"), rel=1e-4)
