"""The README's commands for classifiers, rerankers and embeddings run as they are written.

Needs torch. A command that ends with an error fails the test, and so does another number of commands.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from serving import serve

pytestmark = [pytest.mark.torch, pytest.mark.slow]

ROOT = Path(__file__).parents[2]


def commands() -> list[str]:
    """Return the commands of the section, in order."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.partition("## Classifiers, rerankers and embeddings")[2].partition("\n## ")[0]
    return [line for line in section.splitlines() if line.startswith(("python ", "attnserve"))]


def run(line: str, folder: Path, **variables: str) -> str:
    """Run one command in a folder, with the environment's own programs, and return what it prints."""
    program, *arguments = shlex.split(line)
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    done = subprocess.run(
        [program, *arguments],
        cwd=folder,
        env={**os.environ, "PATH": path, "COLUMNS": "100", **variables},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_each_checkpoint_goes_to_an_answer_with_attention(tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    lines = commands()
    made = [line for line in lines if not line.startswith("attnserve explain")]
    explained = [line for line in lines if line.startswith("attnserve explain")]
    assert [len(made), len(explained)] == [4, 3]
    for line in made:
        run(line, tmp_path)
    with serve(tmp_path / ".demo/models", tmp_path) as server:
        classifier, reranker, embedder = (run(line, tmp_path, ATTNSERVE_SERVER=server.target) for line in explained)
    assert all(label in classifier for label in ("negative", "neutral", "positive"))
    assert "positive" in (tmp_path / "classifier.html").read_text(encoding="utf-8")
    assert re.search(r"LABEL_0 +0\.\d{4}", reranker)
    assert "float32 32  norm 1.0000" in embedder
    assert all("strongest links" in printed for printed in (classifier, reranker, embedder))
