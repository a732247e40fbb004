"""The code blocks of the pages: each has a language, and one that does not run names what runs it, or the reason.

tests/integration/test_blocks.py runs them. docs/reference/blocks.md counts them.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from doc_scripts import blocks

ROOT = Path(__file__).parents[3]


def read(text: str) -> list[blocks.Block]:
    return list(blocks.blocks_of(text, "page.md"))


def test_a_block_has_its_marks_its_language_and_its_place() -> None:
    text = (
        "# Page\n\n<!-- setup: ls -->\n<!-- no-run: it needs a GPU -->\n```bash\nnvidia-smi\n```\n\n```output\nx\n```\n"
    )
    one, two = read(text)
    assert (one.line, one.language, one.setup, one.no_run, one.fate) == (5, "bash", ("ls",), "it needs a GPU", "marked")
    assert (two.language, two.fate) == ("output", "marked"), "the output of a block that is not run"


def test_a_comment_before_a_paragraph_marks_no_block() -> None:
    (block,) = read("<!-- no-run: a reason -->\n\nText.\n\n```bash\nls\n```\n")
    assert block.fate == "runs"


@pytest.mark.parametrize(
    ("text", "file"),
    [
        ("Save this as `first.py`:\n\n```python\npass\n```\n", "first.py"),
        ("State it:\n\n```yaml\n# traffic.yaml\nrate: 1\n```\n", "traffic.yaml"),
        ("Run `first.py`:\n\n```python\npass\n```\n", ""),
    ],
)
def test_a_page_names_the_file_of_a_block(text: str, file: str) -> None:
    assert [block.file for block in read(text)] == [file]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("    make demo\n", "page.md:1: an indented block"),
        ("Text.\n\n```\nls\n```\n", "page.md:3: the language is ''"),
        ("```text\nattnserve models\n```\n", "begins as a command"),
        ("<!-- no-run: a -->\n<!-- run-by: b -->\n```bash\nls\n```\n", "more than one"),
    ],
)
def test_blocks_that_would_escape_the_tests_are_refused(text: str, message: str) -> None:
    with pytest.raises(blocks.WrongBlock, match=message):
        read(text)


def test_what_runs_elsewhere_is_run_there() -> None:
    elsewhere = [block for block in blocks.blocks() if block.run_by]
    assert elsewhere
    for block in elsewhere:
        script = (ROOT / block.run_by).read_text(encoding="utf-8")
        if block.run_by == ".ci/run":
            assert blocks.targets(block.text)
            assert blocks.targets(block.text) <= blocks.targets(script), f"{block.page}:{block.line}"
        else:
            assert Path(block.page).name in script, f"{block.page}:{block.line}"


def test_reasons_name_files_that_exist() -> None:
    named = {name for block in blocks.blocks() for name in re.findall(r"tests/[\w/.-]+\.py", block.no_run)}
    assert named
    assert {name for name in named if not (ROOT / name).is_file()} == set()


def test_extras_that_pages_install_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    texts = [page.read_text(encoding="utf-8") for page in blocks.pages()]
    groups = {group for text in texts for group in re.findall(r"(?:attnserve|\.|\.whl)\[([a-z,-]+)\]'", text)}
    assert groups
    assert {extra for group in groups for extra in group.split(",")} <= set(project["optional-dependencies"])
