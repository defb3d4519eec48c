"""The number of worker processes."""

from __future__ import annotations

import pytest

from ssmvl.data import workers


def test_more_workers_than_cores_are_reduced_with_a_note(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "cores", lambda: 3)
    assert [workers.at_most_cores(number) for number in (None, 0, 1, 3)] == [3, 0, 1, 3]
    assert capsys.readouterr().err == ""
    assert workers.at_most_cores(64) == 3
    assert capsys.readouterr().err == "using 3 workers instead of 64: this machine has 3 cores\n"
