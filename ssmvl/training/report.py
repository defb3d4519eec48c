"""What a finished run leaves to look at: results.json, a contact sheet, curves, and a table on the screen."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from rich.console import Console

from ssmvl.drawing.contact_sheet import Cell, draw_contact_sheet
from ssmvl.drawing.training_curves import draw_curves
from ssmvl.evaluation.results import results, table
from ssmvl.evaluation.runner import Answered
from ssmvl.processing.transforms import read_image
from ssmvl.training.run_folder import RunFolder

CELLS = 6  # of each type on the contact sheet, the first ones of the test set


def report(folder: RunFolder, records: Sequence[Mapping[str, Any]], answered: Sequence[Answered]) -> None:
    """Write and print it.

    Args:
        folder: of the run.
        records: the test set, one question each.
        answered: the answers, one for each record.
    """
    found = results(answered)
    folder.write("results.json", json.dumps(found, indent=2).encode())
    Console().print(table(found))
    draw_curves({stage: folder.logs(stage) for stage in folder.stages}, folder.root / "curves.png")
    pictured = [(r, a) for r, a in zip(records, answered, strict=True) if r["images"]]
    if not pictured:
        return
    rows: dict[str, list[Cell]] = {}
    for record, one in pictured:
        row = rows.setdefault(one.type, [])
        if len(row) < CELLS:
            row.append(Cell(read_image(record["images"][0]), one.question, one.seen, one.truth))
    draw_contact_sheet(rows, folder.root / "answers.png")
    print(f"look at {folder.root / 'answers.png'} and {folder.root / 'curves.png'}")
    simple = ((r, a) for r, a in pictured if len(r["images"]) == 1 and len(r["conversation"]) == 2)
    for record, one in islice(simple, 1):
        folder.write("example.png", record["images"][0])
        ask = shlex.join(["--image", str(folder.root / "example.png"), "--prompt", one.question])
        print(f"ask it: ssmvl generate {shlex.quote(str(folder.root))} {ask}", flush=True)
