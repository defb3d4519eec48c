"""Helpers for the tests of `ssmvl data convert`: small sources of real files, expected records, and processes."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def jpeg(number: int, side: int = 40) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 255, (side, side + number, 3), dtype=np.uint8)
    written = io.BytesIO()
    Image.fromarray(pixels).save(written, "JPEG")
    return written.getvalue()


def source(folder: Path, count: int, name: str = "made.json", side: int = 40) -> Path:
    """Write a JSON of records with no, one or two images each. The images are in `pictures`."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for number in range(7):
        (folder / "pictures" / f"{number}.jpg").write_bytes(jpeg(number, side))
    records = []
    for number in range(count):
        images = [f"pictures/{(number + at) % 7}.jpg" for at in range((1, 1, 0, 2)[number % 4])]
        question = "<image>\n" * len(images) + f"Question {number}, é?"
        talk = [{"from": "human", "value": question}, {"from": "gpt", "value": f"Answer {number}."}]
        records.append({"id": f"{name}-{number}", "conversations": talk} | ({"image": images} if images else {}))
    path = folder / name
    path.write_text(json.dumps(records))
    return path


def cut_images(folder: Path) -> Callable[[], object]:
    """Write records that all have the same truncated image. Returns a function that repairs it."""
    records = json.loads(source(folder, 10).read_text())
    for record in records:
        record["image"] = ["pictures/0.jpg"]
        record["conversations"][0]["value"] = "<image>What?"
    (folder / "made.json").write_text(json.dumps(records))
    image = folder / "pictures" / "0.jpg"
    complete = image.read_bytes()
    image.write_bytes(complete[:-50])
    return lambda: image.write_bytes(complete)


def expected(path: Path) -> list[dict[str, Any]]:
    """Return the records of `source`, read in the simplest way."""
    records = []
    for record in json.loads(path.read_text()):
        question, answer = (turn["value"] for turn in record["conversations"])
        images = [(path.parent / name).read_bytes() for name in record.get("image", [])]
        talk = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        type_ = "pictures" if images else "text"
        records.append({"id": record["id"], "type": type_, "conversation": talk, "images": images})
    return records


def tree(folder: Path) -> dict[str, str]:
    """Return the hash of every file below a directory, by relative path."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def start(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    """Start the real command in its own process group."""
    command = [sys.executable, "-c", "from ssmvl.cli import main; raise SystemExit(main())", "data", "convert"]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [*command, *map(str, arguments)], stdout=pipe, stderr=pipe, text=True, start_new_session=True, **options
    )


def wait_until(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    """Poll the condition every few milliseconds. Fails if the process ends before."""
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


def parts(train: Path) -> list[str]:
    return sorted(path.name for path in train.glob("part-*"))


def children(pid: int) -> list[int]:
    """Return the processes whose parent is `pid`."""
    pids = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(path.read_text().rpartition(")")[2].split()[1]) == pid:
                pids.append(int(path.parent.name))
        except OSError:  # the process has ended
            continue
    return pids


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until_ended(pids: list[int]) -> None:
    """Wait until all of the processes have ended."""
    limit = time.monotonic() + 60
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < limit, "processes are still running"
        os.sched_yield()
        time.sleep(0.005)
