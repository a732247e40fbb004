"""The table of docs/behaviours.md names its sources, tests that exist, and every script of findings/.

A row states a behaviour of a library, its source with a link, and what attnserve does. A script of findings/ shows one
behaviour. A test fails with the rows, tests or scripts that are missing.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "behaviours.md"
LEAST_ROWS = 50
_TEST = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`")
_LINK = re.compile(r"\[[^\]]+\]\(([^)]+)\)")


def rows_of(text: str) -> list[list[str]]:
    """Return the cells of each row, without headings and rules."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in lines
        if not line.startswith("| behaviour |")
    ]


def functions_of(path: Path) -> set[str]:
    """Return the names of a module's functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def test_each_row_states_behaviour_source_and_what_attnserve_does() -> None:
    rows = rows_of(PAGE.read_text(encoding="utf-8"))
    assert len(rows) >= LEAST_ROWS
    assert [row for row in rows if len(row) != 3 or not all(row)] == []
    assert [behaviour for behaviour, source, _ in rows if not _LINK.search(source)] == []
    behaviours = [behaviour for behaviour, _, _ in rows]
    assert len(set(behaviours)) == len(behaviours)


def test_named_tests_exist() -> None:
    named = _TEST.findall(PAGE.read_text(encoding="utf-8"))
    assert len(named) >= LEAST_ROWS / 2
    missing = [
        f"{path}::{name}"
        for path, name in named
        if not (ROOT / path).is_file() or (name and name not in functions_of(ROOT / path))
    ]
    assert missing == []


def test_every_script_has_a_row() -> None:
    linked = {Path(link).name for link in _LINK.findall(PAGE.read_text(encoding="utf-8")) if link.endswith(".sh")}
    assert linked == {script.name for script in (ROOT / "findings").glob("*.sh")}
