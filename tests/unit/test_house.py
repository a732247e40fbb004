"""The number and the size of modules stay within the limits that CONTRIBUTING.md states.

The sources of the server and the client are read. A module with nothing but a docstring does not count.
"""

from __future__ import annotations

import ast
import statistics
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
SERVER = ROOT / "server" / "attnserve_server"
CLIENT = ROOT / "client" / "attnserve_client"
PROOF = SERVER / "conversion" / "proof"
MAX_MODULES = 324
"""Of the server, outside the proof. More means that a reader follows one subject through too many files."""
MAX_LINES = 350
MEDIAN_LINES = range(100, 156)


@cache
def lines_of(*folders: Path) -> dict[str, int]:
    """Lines of each module that holds more than a docstring, by its path from the root."""
    modules = {path: path.read_text(encoding="utf-8") for folder in folders for path in folder.rglob("*.py")}
    full = {path: text for path, text in modules.items() if not is_empty(text)}
    return {str(path.relative_to(ROOT)): len(text.splitlines()) for path, text in full.items()}


def is_empty(text: str) -> bool:
    """Return whether a module holds nothing but a docstring."""
    return all(isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant) for part in ast.parse(text).body)


def test_a_docstring_alone_is_no_module() -> None:
    assert is_empty('"""What lives here."""\n')
    assert not is_empty('"""What lives here."""\n\nX = 1\n')


def test_no_module_is_longer_than_the_limit() -> None:
    long = {path: count for path, count in lines_of(SERVER, CLIENT).items() if count > MAX_LINES}
    assert long == {}, f"split these; the limit is {MAX_LINES} lines"


def counted() -> dict[str, int]:
    """The server's modules outside the proof, whose rules follow the list of ONNX's operators."""
    return {path: count for path, count in lines_of(SERVER).items() if not (ROOT / path).is_relative_to(PROOF)}


def test_the_server_has_few_enough_modules() -> None:
    assert len(counted()) <= MAX_MODULES, "merge a small module into the module of its noun"


def test_the_median_module_is_neither_a_fragment_nor_a_monolith() -> None:
    assert statistics.median_low(counted().values()) in MEDIAN_LINES
