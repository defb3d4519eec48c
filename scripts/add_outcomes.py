"""`add_outcomes.py OUTCOMES.xml BENCH.json`: what pytest found, by test, beside what the benchmark measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from xml.etree import ElementTree


def outcomes(report: Path) -> dict[str, str]:
    """Of pytest's --junitxml: "passed", or "skipped", "failure" or "error" with its first line."""
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        why = next((part for part in case if part.tag in ("skipped", "failure", "error")), None)
        said = "passed" if why is None else f"{why.tag}: {(why.get('message') or '').partition(chr(10))[0]}"
        found[f"{case.get('classname')}.{case.get('name')}"] = said
    return found


if __name__ == "__main__":
    bench = Path(sys.argv[2])
    measured = json.loads(bench.read_text()) if bench.is_file() else {}
    bench.write_text(json.dumps({**measured, "tests": outcomes(Path(sys.argv[1]))}, indent=2) + "\n")
