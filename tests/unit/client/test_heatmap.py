"""Attention maps drawn as heatmaps on a terminal: their width, their colours, and which rows they show.

Maps are made by hand, with random weights. No server runs, and nothing raises.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from attnserve_client import AttentionMap, Token
from attnserve_client.cli._heatmap import heatmap
from rich.console import Console


def square(count: int, key_axis: str = "seq") -> AttentionMap:
    tokens = tuple(Token(index, f"word{index}") for index in range(count))
    weights = np.random.default_rng(3).dirichlet(np.ones(count), size=(1, count)).astype(np.float32)
    return AttentionMap(
        ("s",), 0, "self", "dense", (0,), "seq", key_axis, tokens, tokens, weights, axis_tokens={}, model="m"
    )


def lines(found: AttentionMap, **console: Any) -> list[str]:
    shown = Console(width=80, **console)
    with shown.capture() as capture:
        for line in heatmap(found, found.head_weights(), shown):
            shown.print(line)
    return capture.get().splitlines()


@pytest.mark.parametrize("count", [1, 5, 30, 60, 200])
def test_heatmap_fits_into_eighty_columns(count: int) -> None:
    shown = lines(square(count), color_system=None)
    assert max(map(len, shown)) <= 80
    numbered = "".join(line for line in shown if line.startswith("  ") and not line.strip().startswith("word"))
    assert numbered


def test_long_heatmap_shows_its_strongest_rows_and_counts_them() -> None:
    shown = lines(square(200), color_system=None)
    assert "40 of 200 rows, those with the strongest links" in [line.strip() for line in shown]


def test_heatmap_uses_colours_of_the_terminal() -> None:
    shown = lines(square(5), color_system="truecolor", force_terminal=True, no_color=False)
    assert any("\x1b[48;2;" in line for line in shown)


def test_keys_of_another_axis_have_a_legend() -> None:
    assert any("columns: 0 word0  1 word1" in line for line in lines(square(4, "patch"), color_system=None))
