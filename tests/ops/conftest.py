from __future__ import annotations

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print one line for each backend and op that test_parity.py did not run, with the reason."""
    skipped = terminalreporter.stats.get("skipped", [])
    lines = {value for report in skipped for name, value in report.user_properties if name == "not run"}
    if lines:
        terminalreporter.section("backends that were not compared", yellow=True)
        for line in sorted(lines):
            terminalreporter.line(line, yellow=True)
