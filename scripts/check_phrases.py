"""Find phrases that CONTRIBUTING.md bans in comments, docstrings, messages and documents. Exit code 1 if there are any.

python scripts/check_phrases.py [FILE …]   checks these files, or all tracked ones
"""

from __future__ import annotations

import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
EXEMPT = {Path(__file__), ROOT / "tests" / "test_phrases.py"}  # they quote banned phrases
STRINGS = {tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
BANNED = {
    r"^\W*(What|Where|Whose|Whether|Which|Who|How|When) .*[^?]$": "start with a noun or a verb",  # first lines only
    r"(?<!here )\b(is|are|was|were) no (?!longer\b|more\b|less\b|fewer\b|better\b|worse\b|larger\b)\w": "is not a …",
    r"\b(go|goes|going|went) on\b": "resume, continue",
    r"\b(than|as|into|beside) what\b": "a noun",
    r"\b(whoever|anybody|somebody|everybody|nobody)\b": "anyone, someone, users",
    r"\bbeside\b": "next to, in addition to",
    r"\b(left|stays?|kept) as (it|they) (is|are|was|were)\b": "unchanged",
    r"\b(is|are|was) said\b": "say who says it",
    r"\bin (one|a single) go\b": "in one pass",
    r"\bwhole or not at all\b": "atomically",
    r"\blast block but one\b": "second-to-last block",
    r"\bpass(es|ed)? over\b": "skip",
    r"\b(is|are|was|were) not there\b": "does not exist, is missing",
    r"\bwere it\b": "even if",
    r"\blies? (in|at|beside|under|where)\b": "is",
    r"\bstands? (on|at|before|between|there)\b": "is",
    r"\b(tokeni|normali|initiali|discreti|recogni|optimi)s(e|es|ed|ing|ation)\b|\bcolour|\bbehaviour": "US spelling",
    r"—": "a period, colon or comma",
    r"(?<!run )(?<!run-)(?<!\.)\bfolders?\b(?!=)": "directory (or run folder)",
}


def prose(path: Path) -> Iterator[tuple[int, str, bool]]:
    """Line number and text of each line of prose, and whether it is the first line of a docstring."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        previous = tokenize.NEWLINE
        with path.open("rb") as file:
            for token in tokenize.tokenize(file.readline):
                is_text = token.type in STRINGS and " " in token.string  # not a key or a name
                if is_text or token.type == tokenize.COMMENT:
                    docstring = token.type == tokenize.STRING and previous in (tokenize.NEWLINE, tokenize.INDENT)
                    for number, line in enumerate(token.string.split("\n")):
                        yield token.start[0] + number, line, docstring and number == 0
                if token.type not in (tokenize.NL, tokenize.COMMENT, tokenize.ENCODING):
                    previous = token.type
        return
    code = False
    for number, line in enumerate(text.split("\n"), start=1):
        code ^= path.suffix == ".md" and line.startswith("```")
        example = path.name == "CONTRIBUTING.md" and line.startswith("| ")  # the examples show banned phrases
        if path.suffix == ".md" and not (code or example):
            yield number, line, False
        elif path.suffix in (".yaml", ".toml") and "#" in line:
            yield number, line.partition("#")[2], False


def findings(path: Path) -> Iterator[str]:
    """Yield one line for each banned phrase."""
    for number, line, first in prose(path):
        plain = re.sub(r"`[^`]*`|\{[^}]*\}|https?://\S+|\]\([^)]*\)|^ +\w+: ", "`", line)  # code, links, arguments
        for index, (pattern, advice) in enumerate(BANNED.items()):
            if (index > 0 or first) and (match := re.search(pattern, plain, 0 if index == 0 else re.IGNORECASE)):
                yield f"{path}:{number}: {match.group().strip()!r}: {advice}"


def main(names: list[str]) -> int:
    """Print the findings."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    paths = [Path(name).resolve() for name in names or (str(ROOT / name) for name in tracked.splitlines())]
    kinds = (".py", ".md", ".yaml", ".toml")
    found = [line for path in paths if path.suffix in kinds and path not in EXEMPT for line in findings(path)]
    print("\n".join(found) or "no banned phrases")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
