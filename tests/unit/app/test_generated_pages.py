"""The pages that docs/generate.py writes from the code match the code.

A test fails where the script would write a page in another way; `make docs` writes the pages again.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[3] / "docs"


@pytest.mark.slow  # and needs protoc, which the quick tests do without
def test_generated_pages_are_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, str(DOCS / "generate.py"), "--check"], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow  # and needs protoc, which the quick tests do without
def test_check_fails_for_a_changed_page(tmp_path: Path) -> None:
    script = tmp_path / "docs" / "generate.py"
    (tmp_path / "docs" / "reference").mkdir(parents=True)
    for folder in ("helm/attnserve", "prometheus/rules"):
        shutil.copytree(DOCS.parent / "deploy" / folder, tmp_path / "deploy" / folder)
    for name in ("generate", "blocks", "reference_pages"):
        shutil.copy(DOCS / f"{name}.py", script.with_name(f"{name}.py"))
    shutil.copytree(DOCS.parent / "proto", tmp_path / "proto")
    line = [sys.executable, str(script)]
    subprocess.run(line, check=True, timeout=60)
    assert subprocess.run([*line, "--check"], check=False, timeout=60).returncode == 0
    (tmp_path / "docs" / "reference" / "errors.md").write_text("old")
    done = subprocess.run([*line, "--check"], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (1, "out of date: docs/reference/errors.md; run `make docs`\n")


def test_types_of_settings_are_words() -> None:
    page = (DOCS / "reference" / "configuration.md").read_text()
    assert "`--run-overhead-tokens` | `ATTNSERVE_RUN_OVERHEAD_TOKENS` | number, at least 0, at most " in page
    for trace in ("<class", "annotation=", "metadata=", "typing."):
        assert trace not in page
