"""Every example of the pages runs as it stands, against the fake server in the place of a real one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from attnserve_client.testing import FakeServer

ROOT = Path(__file__).parents[3]
PATIENT = (
    "Patient takes metformin for diabetes, started lisinopril last month for hypertension, and reports occasional "
    "dizziness since then."
)


def examples() -> Iterator[object]:
    for page in ("README.md", "docs/attention.md", "docs/client.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        found = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        assert found, page
        for number, example in enumerate(found, start=1):
            yield pytest.param(example, id=f"{page}-{number}")


@pytest.mark.parametrize("example", list(examples()))
def test_example_runs(example: str) -> None:
    with FakeServer(model="minilm", dimensions=384, layers=6, heads=12) as server:
        program = example.replace("localhost:8001", server.target)
        names = {"__name__": "example", "text": PATIENT}  # the text that docs/attention.md quotes in words
        exec(compile(program, "example", "exec"), names)
        assert server.requests or server.metadata or "FakeServer" in example, "it asked a server"


def test_every_page_can_be_reached_from_the_readme() -> None:
    seen, left = set[Path](), [ROOT / "README.md"]
    while left:
        page = left.pop()
        if page in seen or not page.exists():
            continue
        seen.add(page)
        targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
        found = [(page.parent / target).resolve() for target in targets]
        missing = [str(target.relative_to(ROOT)) for target in found if not target.exists()]
        assert not missing, f"{page.name} links to what is not there"
        left += [target for target in found if target.suffix == ".md"]
    pages = {*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "deploy").rglob("*.md")}
    orphans = pages - seen
    assert {str(page.relative_to(ROOT)) for page in orphans} <= set(), "no page links to them"
