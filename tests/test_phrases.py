"""The phrase check of scripts/lint finds banned phrases in comments, docstrings, messages and documents only."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

CHECK = runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "check_phrases.py"))


@pytest.mark.parametrize(
    ("name", "text", "count"),
    [
        ("a.py", '"""What a run leaves."""\n', 1),
        ("a.py", 'def f():\n    """Whether it is one."""\n', 1),
        ("a.py", 'x = "what is this"  # the run goes on\n', 1),
        ("a.py", 'raise E(f"{path} is no file; nobody reads it")\n', 2),
        ("a.py", 'goes_on = "folder"\nif goes_on:\n    pass\n', 0),
        ("a.py", '"""Return `goes on` {folder}, or the run folder."""\n', 0),
        ("a.py", '"""Resume."""\n\nWhat = "a text: there is no file"\n', 0),
        ("a.md", "The colour lies in the folder.\n\n```\ngoes on\n```\n", 3),
        ("CONTRIBUTING.md", "| goes on | resumes |\n", 0),
        ("a.yaml", "folder: x  # it goes on\n", 1),
    ],
)
def test_banned_phrases_are_found_in_prose(tmp_path: Path, name: str, text: str, count: int) -> None:
    (tmp_path / name).write_text(text)
    found = list(CHECK["findings"](tmp_path / name))
    assert len(found) == count, found
