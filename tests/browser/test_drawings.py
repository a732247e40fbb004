"""Drawings of `to_svg()` in Chromium: words are inside the canvas and do not overlap, and the image has a name.

The widths of letters are estimates in the client; here a browser with real fonts measures them.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from attnserve_client import AttentionMap, Token

pytestmark = pytest.mark.browser

SENTENCE = (
    "Patient takes metformin for diabetes , started lisinopril last month for hypertension , and reports occasional "
    "dizziness since then . The buyer agrees to assume all liabilities , except those specifically excluded in "
    "Schedule B , which includes environmental damages from the 1995 incident . WWWWWWWWWWWWWWWWWWWWWWWWWWWWWW "
    "責任責任責任 iiii Käufer übernimmt antidisestablishmentarianism if processed : result . append ( processed ) end"
)
MEASURE = """
() => {
  const svg = document.querySelector("svg").getBoundingClientRect();
  return [...document.querySelectorAll("svg text")].map((text) => {
    const box = text.getBoundingClientRect();
    return {
      text: text.textContent, rotated: (text.getAttribute("transform") || "").includes("rotate"),
      left: box.left - svg.left, top: box.top - svg.top, right: svg.right - box.right, bottom: svg.bottom - box.bottom,
      height: box.height, x: text.getAttribute("x"), anchor: text.getAttribute("text-anchor"),
    };
  });
}
"""


def sentence_map(count: int, key_axis: str = "seq") -> AttentionMap:
    words = SENTENCE.split()[-count:]
    tokens = tuple(Token(index, word, 2 * index, 2 * index + 1) for index, word in enumerate(words))
    weights = np.random.default_rng(1).dirichlet(np.full(count, 0.2), size=(1, count)).astype(np.float32)
    return AttentionMap(
        sites=("encoder.layer.5.attention",),
        layer=5,
        kind="self",
        form="dense",
        heads=(0,),
        query_axis="seq",
        key_axis=key_axis,
        query_tokens=tokens,
        key_tokens=tokens,
        raw=weights,
        model="minilm",
    )


@pytest.mark.parametrize("count", [1, 5, 60])
@pytest.mark.parametrize("view", ["heatmap", "bipartite", "arcs"])
def test_words_are_inside_the_canvas_and_do_not_overlap(chromium: Any, view: Any, count: int) -> None:
    page = chromium.new_page(viewport={"width": 1600, "height": 1600})
    try:
        drawing = sentence_map(count).to_svg(view)
        page.set_content(f"<!doctype html><body style='margin:0'>{drawing}")
        measured = page.evaluate(MEASURE)
        assert len(measured) >= count
        outside = [each for each in measured if min(each["left"], each["top"], each["right"], each["bottom"]) < -1]
        assert outside == []
        columns: dict[tuple[str, str], list[Any]] = {}
        for each in measured:
            if not each["rotated"]:
                columns.setdefault((each["x"], each["anchor"]), []).append(each)
        for column in columns.values():
            column.sort(key=lambda each: each["top"])
            for above, below in pairwise(column):
                # Boxes of lines include the room between them: letters themselves take three quarters.
                assert below["top"] - above["top"] >= 0.75 * above["height"], (above, below)
        name = "minilm: layer 5 (encoder.layer.5.attention), head 0"
        assert page.get_by_role("img", name=name).count() == 1
    finally:
        page.close()


def test_names_of_both_sides_are_inside_the_canvas(chromium: Any) -> None:
    page = chromium.new_page()
    try:
        drawing = sentence_map(2, "source_seq").to_svg("bipartite", caption="")
        page.set_content(f"<!doctype html><body style='margin:0'>{drawing}")
        measured = page.evaluate(MEASURE)
        assert {"looks … (seq)", "… at (source_seq)"} <= {each["text"] for each in measured}
        assert min(min(each["left"], each["right"]) for each in measured) >= -1
    finally:
        page.close()


def test_control_a_word_outside_the_canvas_is_noticed(chromium: Any) -> None:
    page = chromium.new_page()
    try:
        drawing = sentence_map(5).to_svg("arcs").replace('text-anchor="middle"', 'text-anchor="middle" dx="-400"', 1)
        page.set_content(f"<!doctype html><body style='margin:0'>{drawing}")
        assert min(each["left"] for each in page.evaluate(MEASURE)) < -1
    finally:
        page.close()
