"""Every Python example of the pages in `PAGES` runs unchanged against the fake server.

An example fails if it raises. A page without an example fails when tests are collected.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from attnserve_client.testing import FakeServer

ROOT = Path(__file__).parents[3]
PAGES = (
    "README.md",
    "docs/explanation/attention.md",
    "docs/how-to/call-from-python.md",
    "docs/how-to/draw-attention.md",
    "docs/tutorial/first-model.md",
)
PATIENT = (
    "Patient takes metformin for diabetes, started lisinopril last month for hypertension, and reports occasional "
    "dizziness since then."
)


def examples() -> Iterator[object]:
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        found = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        assert found, page
        for number, example in enumerate(found, start=1):
            yield pytest.param(example, id=f"{page}-{number}")


@pytest.mark.parametrize("example", list(examples()))
def test_example_runs(example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # some write files
    with FakeServer(model="minilm", dimensions=384, layers=6, heads=12) as server:
        server.tokenizer_file = b'{"version": "1.0"}'
        program = example.replace("localhost:8001", server.target)
        names = {"__name__": "example", "text": PATIENT}  # the text that docs/explanation/attention.md quotes in words
        exec(compile(program, "example", "exec"), names)
        assert server.requests or server.metadata or "FakeServer" in example, "the example must call a server"
