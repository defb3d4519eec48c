"""Add pytest's outcomes to the results of a benchmark: `add_outcomes.py OUTCOMES.xml BENCH.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from xml.etree import ElementTree


def outcomes(report: Path) -> dict[str, str]:
    """Read a --junitxml report: test -> "passed", or "skipped", "failure" or "error" with its first line."""
    results = {}
    for case in ElementTree.parse(report).iter("testcase"):
        problem = next((part for part in case if part.tag in ("skipped", "failure", "error")), None)
        result = "passed"
        if problem is not None:
            result = f"{problem.tag}: {(problem.get('message') or '').partition(chr(10))[0]}"
        results[f"{case.get('classname')}.{case.get('name')}"] = result
    return results


if __name__ == "__main__":
    bench = Path(sys.argv[2])
    results = json.loads(bench.read_text()) if bench.is_file() else {}
    bench.write_text(json.dumps({**results, "tests": outcomes(Path(sys.argv[1]))}, indent=2) + "\n")
