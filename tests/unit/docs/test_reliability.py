"""docs/reliability.md states the constants of the formula of memory, and the limits of each row's canary."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from attnserve_server.config_bounds import MIB
from attnserve_server.transport import peak

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT))

from faults.lab import WITHIN_DEADLINE  # noqa: E402
from faults.rows import ROWS  # noqa: E402

PAGE = " ".join((ROOT / "docs" / "reliability.md").read_text(encoding="utf-8").split())


def numbers(text: str) -> set[int]:
    """Return the numbers of a list such as `1, 3 to 5 and 7`."""
    found = set()
    for first, last in re.findall(r"(\d+)(?: to (\d+))?", text):
        found |= set(range(int(first), int(last or first) + 1))
    return found


def test_formula_states_the_constants_of_processes() -> None:
    front, engine, arenas = (size // MIB for size in (peak.FRONT_BYTES, peak.ENGINE_BYTES, peak.ARENAS_BYTES))
    assert f"(fronts + 1) x {front} MiB + engines x {engine} MiB + fronts x engines x {arenas} MiB" in PAGE
    assert f"libraries, connections and pools | {engine} MiB |" in PAGE


def test_page_lists_the_rows_whose_canary_has_other_limits() -> None:
    (stated,) = re.findall(r"takes the cores: rows ([\d, toand]+)\.", PAGE)
    (loaded,) = re.findall(r"beyond its capacity \(rows ([\d, toand]+)\)", PAGE)
    assert numbers(loaded) == {row.number for row in ROWS if row.canary == WITHIN_DEADLINE}
    free = {row.number for row in ROWS if row.canary is not None and row.canary.factor is None}
    assert numbers(stated) == free - numbers(loaded)
