"""Attention maps drawn as heatmaps on a terminal: their width, their colours, and which rows they show.

Maps are made by hand, with random weights. No server runs, and nothing raises.
"""

from __future__ import annotations

import re
from importlib.resources import files
from typing import Any

import numpy as np
import pytest
from attnserve_client import AttentionMap, Token
from attnserve_client.cli._heatmap import Ink, heatmap
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
    assert any("48;2;" in line for line in shown)


LUMINANCE = (0.2126, 0.7152, 0.0722)


@pytest.mark.parametrize("colours", ["truecolor", "256"])
@pytest.mark.parametrize("dark", [False, True])
def test_greater_weights_are_ever_darker_and_on_dark_terminals_ever_lighter(colours: Any, dark: bool) -> None:
    ink = Ink(colours, dark)
    shown = [ink.background(place).get_truecolor() for place in np.linspace(0, 1, 9)]
    luminance = [sum(part * share for part, share in zip(each, LUMINANCE, strict=True)) for each in shown]
    steps = np.diff(luminance) * (1 if dark else -1)
    assert (steps > 2).all(), luminance


@pytest.mark.parametrize("dark", [False, True])
def test_true_colours_are_those_of_the_page(dark: bool) -> None:
    script = files("attnserve_client").joinpath("_page", "page.js").read_text(encoding="utf-8")
    line = re.search(rf"{'dark' if dark else 'light'}: \[(.*)\]", script)
    assert line is not None
    stops = re.findall("#([0-9a-f]{6})", line.group(1))
    shown = [Ink("truecolor", dark).background(place).get_truecolor().hex for place in np.linspace(0, 1, len(stops))]
    assert shown == [f"#{stop}" for stop in stops]


@pytest.mark.parametrize(
    ("variable", "dark"), [("15;0", True), ("15;default;0", True), ("0;15", False), ("", False), ("7", False)]
)
def test_terminal_that_names_a_dark_background_gets_the_dark_colours(
    monkeypatch: pytest.MonkeyPatch, variable: str, dark: bool
) -> None:
    monkeypatch.setenv("COLORFGBG", variable)
    assert Ink.of(Console(color_system="256", force_terminal=True)) == Ink("256", dark)


@pytest.mark.parametrize("colours", ["standard", None])
def test_terminal_of_few_colours_gets_characters(colours: Any) -> None:
    assert Ink.of(Console(color_system=colours, force_terminal=True)).colours is None


def test_small_heatmap_has_percentages() -> None:
    found = square(3)
    shown = lines(found, color_system=None)
    rows = [line.split()[2:] for line in shown if line.startswith(("0 word", "1 word", "2 word"))]
    assert rows == [[f"{100 * weight:.0f}" for weight in row] for row in found.weights[0]]


def test_keys_of_another_axis_have_a_legend() -> None:
    assert any("columns: 0 word0  1 word1" in line for line in lines(square(4, "patch"), color_system=None))
