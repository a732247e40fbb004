"""The prose check: it finds listed words in prose, and leaves code, quotations and exceptions alone.

The script is docs/prose.py. `FOUND` has files in which it must find a word, and `LEFT_ALONE` files in which it must
not. An exception without a reason makes it exit with 2.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[3] / "docs" / "prose.py"

FOUND = {
    "docstring.py": 'def f():\n    """Return\n    what somebody sent."""\n',
    "comment.py": "x = 1  # whoever calls\n",
    "comment_lines.py": "# A request is given\n# up here.\nx = 1\n",
    "message.py": 'raise ValueError(f"{name} is told to the caller")\n',
    "joined_message.py": 'raise ValueError("a request is given "\n    "up here")\n',
    "test_name.py": "def test_nobody_waits() -> None: ...\n",
    "paragraph.md": "A paragraph\nabout whoever reads.\n",
    "table.md": "| word | nobody |\n",
    "code_comment.md": "Text:\n\n    make check  # for everybody\n",
    "contract.proto": "int32 x = 1; // Told to the caller.\n",
    "script.sh": "#!/bin/sh\n# Nobody runs this.\n",
    "output.sh": 'echo "nobody runs this"\n',
    "rules.yml": "summary: nobody is served\n",
    "settings.toml": "x = 1 # what nobody sets\n",
    "Makefile": "all: ## Run for nobody\n",
}
LEFT_ALONE = {
    "identifiers.py": "nobody = told.mates(whoever)\ndef tell_nobody(): ...\n",
    "key.py": 'x = {"nobody": "told"}\n',
    "code.py": "# The field `told` is set.\nx = 1\n",
    "quotation.py": '"""The log has "nobody told the server", in these words."""\n',
    "field.py": 'x = f"the value is {whoever} of these"\n',
    "onnx_text.py": 'x = "m (x) => (y) { told = Relu(x) }"\n',
    "bytes.py": 'x = b"nobody is told"\n',
    "code.md": "Call `told` here.\n\n    nobody = told\n\n```\nnobody told\n```\n",
    "block_quote.md": "> Nobody was told.\n",
    "address.md": "See [the page](https://example.org/told).\n",
    "word_parts.md": "It automates estimates, recommends and retells what was returned.\n",
    "contract.proto": "int32 told = 1;\n",
    "tell_apart.md": "These two are easy to tell apart.\n",
}


@pytest.fixture(scope="module")
def check() -> Iterator[Callable[[str, str], list[Any]]]:
    """The check of one file against the project's own list."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPT.parent))
        prose = importlib.import_module("prose")
        yield prose.WordList.read(prose.LIST).check


@pytest.mark.parametrize("name", FOUND)
def test_a_planted_word_is_found(name: str, check: Callable[[str, str], list[Any]]) -> None:
    hits = check(f"room/{name}", FOUND[name])
    assert [hit.path for hit in hits] == [f"room/{name}"], hits
    assert hits[0].instead


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_code_and_quotations_are_not_prose(name: str, check: Callable[[str, str], list[Any]]) -> None:
    assert check(f"room/{name}", LEFT_ALONE[name]) == []


def test_a_hit_names_the_line_on_which_the_word_begins(tmp_path: Path) -> None:
    files = {"a.py": FOUND["docstring.py"], "b.py": FOUND["joined_message.py"], "c.md": FOUND["paragraph.md"]}
    _, hits = _check(tmp_path, files)
    assert [(hit["path"], hit["line"], hit["found"]) for hit in hits] == [
        ("a.py", 3, "somebody"),
        ("b.py", 1, "given up"),
        ("c.md", 2, "whoever"),
    ]


def test_an_exception_covers_its_text_in_its_files_only(tmp_path: Path) -> None:
    allowed = '[[allowed]]\npath = "kept/*"\ntext = "told apart"\nwhy = "an idiom"\n'
    files = {"kept/a.md": "Two are told apart.\n", "kept/b.md": "One is told.\n", "c.md": "Two are told apart.\n"}
    _, hits = _check(tmp_path, files, allowed)
    assert [hit["path"] for hit in hits] == ["c.md", "kept/b.md"]


def test_an_exception_without_a_reason_is_an_error(tmp_path: Path) -> None:
    done = _run(tmp_path, {"a.md": "Text.\n"}, '[[allowed]]\npath = "*"\ntext = "told"\n')
    assert done.returncode == 2
    assert "has no reason; add `why`" in done.stderr


def test_an_exempt_folder_is_read_with_all_only(tmp_path: Path) -> None:
    files = {"old/a.md": "Nobody reads.\n", "old/deep/b.md": "Nobody reads.\n"}
    exempt = 'exempt = ["old"]\n'
    assert [hit["path"] for hit in _check(tmp_path, files, exempt=exempt)[1]] == ["old/deep/b.md"]
    assert len(_check(tmp_path, files, "", "--all", exempt=exempt)[1]) == 2


def test_the_text_form_names_file_line_and_replacement_and_counts_by_folder(tmp_path: Path) -> None:
    done = _run(tmp_path, {"room/a.md": "Nobody reads.\n"})
    lines = done.stdout.splitlines()
    assert lines[0].startswith("room/a.md:1: 'Nobody': write the actor")
    assert lines[1].split() == ["1", "room"]


@pytest.mark.parametrize("paths", [(), ("room",), ("room/a.md",)], ids=["all", "a folder", "a file"])
def test_a_tree_without_git_is_read_without_its_hidden_folders(tmp_path: Path, paths: tuple[str, ...]) -> None:
    files = {"room/a.md": "Nobody waits.\n", ".cache/b.md": "Nobody waits.\n"}
    code, hits = _check(tmp_path, files, "", *paths, git=False)
    assert code == 1
    assert [hit["path"] for hit in hits] == ["room/a.md"]


def _check(
    root: Path, files: dict[str, str], exceptions: str = "", *options: str, exempt: str = "", git: bool = True
) -> tuple[int, list[dict[str, str | int]]]:
    done = _run(root, files, exceptions, "--json", *options, exempt=exempt, git=git)
    assert not done.stderr, done.stderr
    return done.returncode, json.loads(done.stdout)


def _run(
    root: Path, files: dict[str, str], exceptions: str = "", *options: str, exempt: str = "", git: bool = True
) -> subprocess.CompletedProcess[str]:
    """The script over a tree of its own, with the project's words and these exceptions."""
    words = (SCRIPT.parent / "prose.toml").read_text(encoding="utf-8")
    words = exempt + words[words.index("\n[[word]]") : words.index("\n[[skipped]]")] + "\n" + exceptions
    listed, tree = root / "list.toml", root / "tree"
    listed.write_text(words, encoding="utf-8")
    for name, text in files.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(text, encoding="utf-8")
    if git:
        subprocess.run(["git", "init", "-q", str(tree)], check=True, timeout=30)
    line = [sys.executable, str(SCRIPT), "--root", str(tree), "--list", str(listed), *options]
    return subprocess.run(line, capture_output=True, text=True, check=False, timeout=60)
