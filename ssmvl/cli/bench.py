"""`ssmvl bench [--suite cpu|cuda|data|training] [--json FILE]`."""

from __future__ import annotations

import argparse
import json
from itertools import chain
from pathlib import Path

from ssmvl.errors import BackendError


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments: the suite and an output file."""
    parser.add_argument(
        "--suite",
        choices=("cpu", "cuda", "data", "training"),
        default="cpu",
        help="the model on a CPU or GPU, data conversion and loading, or training overhead (default: cpu)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write machine and rows to this file")


def run(options: argparse.Namespace) -> int:
    """Print the machine, then each row as soon as it is measured."""
    import torch

    from ssmvl.benchmarks.bare_loop import loop_cases
    from ssmvl.benchmarks.data_cases import DataSize, data_cases
    from ssmvl.benchmarks.limits import Shape, machine
    from ssmvl.benchmarks.model_cases import cases
    from ssmvl.benchmarks.training_cases import TrainingSize, training_cases

    if options.suite == "cuda" and not torch.cuda.is_available():
        raise BackendError("torch finds no CUDA device; run --suite cpu")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
    hardware = machine("cuda" if options.suite == "cuda" else "cpu")
    print(" · ".join(f"{key} {value}" for key, value in hardware.items()), end="\n\n")
    print(LINE.format("case", "value", "unit", "limit", "share", "bar", "peer"))
    bars = BARS | CUDA_BARS if options.suite == "cuda" else BARS
    rows = []
    suites = {
        "cpu": lambda: cases(Shape(), "cpu"),
        "cuda": lambda: chain(cases(Shape(), "cuda"), loop_cases("cuda")),
        "data": lambda: data_cases(DataSize()),
        "training": lambda: training_cases(TrainingSize()),
    }
    for row in suites[options.suite]():
        limit, share = ("", "") if row.limit is None else (f"{row.limit:.1f}", f"{row.of_limit:.0%}")
        line = LINE.format(row.case, f"{row.value:.1f}", row.unit, limit, share, bars.get(row.case, ""), row.peer or "")
        print(line.rstrip(), flush=True)
        rows.append(row._asdict())
        if options.json:
            options.json.write_text(json.dumps({"machine": hardware, "rows": rows}, indent=2) + "\n")
    return 0


LINE = "{:26} {:>9} {:8} {:>9} {:>6}  {:8} {}"
BARS = {
    "prefill": "≥ 60 %",
    "decode": "≥ 85 %",
    "decode_16 / decode": "≥ 5",
    "train_step": "≥ 45 %",
    "scan, K = 4": "≥ 95 %",
    "length, 8192": "≥ 91 %",
    "memory": "≤ 100 %",
    "memory, rows twice as long": "≤ 100 %",
    "convert, directory": "≥ 60 %",
    "convert, zip": "≥ 60 %",
    "verify": "≥ 90 %",
    "load": "≥ 85 %",
    "memory, texts": "≤ 100 %",
    "memory, images in a zip": "≤ 100 %",
    "run / bare loop": "≥ 95 %",
    "run, a core for data": "≥ 95 %",
    "start": "≤ 100 %",
}
CUDA_BARS = {"scan, K = 4": "≥ 143 %"}
