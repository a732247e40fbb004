"""docs/protocols.md has each method of the Open Inference Protocol, each path of REST, parameter and datatype."""

from __future__ import annotations

import re
from pathlib import Path

from attnserve_server.transport.oip.layout import DATATYPES
from attnserve_server.transport.oip.servicer import METHODS
from attnserve_server.transport.oip.wanted import FINAL
from attnserve_server.transport.rest.server import endpoints

PAGE = (Path(__file__).parents[3] / "docs" / "protocols.md").read_text(encoding="utf-8")


def test_every_method_has_a_row_and_is_served() -> None:
    rows = re.findall(r"^\| `(\w+)` \| served", PAGE, re.MULTILINE)
    assert sorted(rows) == sorted(METHODS)


def test_every_parameter_has_a_row() -> None:
    for name in ("priority", "timeout", "prompt_name", "top_k", FINAL):
        assert f"| `{name}` |" in PAGE


def test_every_datatype_is_named() -> None:
    assert all(name in PAGE for name in [*DATATYPES.values(), "BF16", "BYTES"])


def test_every_path_of_rest_has_one_row() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith(("| `GET", "| `POST"))]
    named = [path for row in rows for path in re.findall(r"`((?:GET|POST) /[^`]*)`", row.split(" | ")[0])]
    assert sorted(named) == sorted(f"{one.method} {one.path}" for one in endpoints())
    assert all(row.split(" | ")[1].startswith("served") and len(row.split(" | ")) == 3 for row in rows)
