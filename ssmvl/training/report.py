"""Report of a finished run: results.json, a contact sheet, training curves, and a printed table."""

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

CELLS = 6  # questions per type on the contact sheet: the first ones with images in the test set


def report(folder: RunFolder, records: Sequence[Mapping[str, Any]], answered: Sequence[Answered]) -> None:
    """Write and print the report.

    Args:
        folder: the run folder.
        records: the test set, one question per record.
        answered: the answers, one per record.
    """
    scores = results(answered)
    folder.write("results.json", json.dumps(scores, indent=2).encode())
    Console().print(table(scores))
    draw_curves({stage: folder.logs(stage) for stage in folder.stages}, folder.root / "curves.png")
    with_images = [(r, a) for r, a in zip(records, answered, strict=True) if r["images"]]
    if not with_images:
        return
    rows: dict[str, list[Cell]] = {}
    for record, answer in with_images:
        row = rows.setdefault(answer.type, [])
        if len(row) < CELLS:
            row.append(Cell(read_image(record["images"][0]), answer.question, answer.seen, answer.truth))
    draw_contact_sheet(rows, folder.root / "answers.png")
    print(f"see {folder.root / 'answers.png'} and {folder.root / 'curves.png'}")
    single_turn = ((r, a) for r, a in with_images if len(r["images"]) == 1 and len(r["conversation"]) == 2)
    for record, answer in islice(single_turn, 1):
        folder.write("example.png", record["images"][0])
        arguments = shlex.join(["--image", str(folder.root / "example.png"), "--prompt", answer.question])
        print(f"ask the model: ssmvl generate {shlex.quote(str(folder.root))} {arguments}", flush=True)
