"""Ways to read a text in the explorer: as code, with arcs, by sentence, and a part of its map."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pytest
from attnserve_client import AttentionSelection, Client
from explored import Open, Opened
from serving import RunningServer

pytestmark = pytest.mark.browser

CODE = "if processed:\n    result.append(processed)\n"
SENTENCE = "The buyer assumes all liabilities, and the seller keeps all rights to the plant."
LONG = " ".join(
    f"The {who} keeps every document about the property, and the seller pays for damages during the following years."
    for who in (
        "buyer",
        "bank",
        "lender",
        "owner",
        "tenant",
        "builder",
        "agent",
        "court",
        "state",
        "city",
        "user",
        "firm",
    )
)
WORDS = AttentionSelection(layers=-1, heads="mean", unit="word", special_tokens="drop")
INK = "one => one.getContext('2d').getImageData(0, 0, one.width, one.height).data.reduce((sum, each) => sum + each, 0)"


def exported(opened: Opened) -> list[list[str]]:
    """The rows of the map on screen, by its export as CSV."""
    with opened.page.expect_download() as download:
        opened.page.click("#exports >> text=CSV")
    return list(csv.reader(io.StringIO(Path(download.value.path()).read_bytes().decode())))


def test_code_keeps_its_lines_and_its_indentation(minilm: RunningServer, opener: Open) -> None:
    opened = opener(minilm)
    opened.run(CODE)
    lines = opened.page.locator(".code-line")
    assert lines.locator(".line-number").all_text_contents() == ["1", "2"]
    assert "\n".join(lines.locator(".line-text").all_text_contents()).rstrip() == CODE.rstrip()
    family = opened.page.locator(".code-lines .token >> nth=1").evaluate("one => getComputedStyle(one).fontFamily")
    assert "monospace" in family
    ends = {end for link in opened.links for end in link[:2]}
    assert {"processed, line 1, column 4", "processed, line 2, column 19"} & ends
    opened.page.click("#controls >> text=as text")
    assert lines.count() == 0
    opened.run(SENTENCE)
    opened.page.click("#controls >> text=as code")
    assert lines.count() == 1
    assert "reading=code" in opened.page.url


def test_arcs_follow_the_word_that_is_pointed_at(minilm: RunningServer, opener: Open) -> None:
    opened = opener(minilm)
    opened.run(SENTENCE)
    page = opened.page
    opened.expected.add("willReadFrequently")
    assert page.locator("canvas.arcs").count() == 0
    page.click("#controls >> text=arcs")
    drawn = page.locator("canvas.arcs").evaluate(INK)
    assert drawn > 0
    page.hover(".token >> text=buyer")
    pointed = page.locator("canvas.arcs").evaluate(INK)
    assert 0 < pointed != drawn
    page.hover(".token >> text=plant")
    assert page.locator("canvas.arcs").evaluate(INK) != pointed
    page.click("#controls >> text=arcs")
    assert page.locator("canvas.arcs").count() == 0


def test_part_of_the_map_is_chosen_by_dragging_and_by_two_clicks(minilm: RunningServer, opener: Open) -> None:
    opened = opener(minilm)
    opened.run(SENTENCE)
    page = opened.page
    whole = exported(opened)
    cell = page.evaluate("Math.round((document.querySelector('canvas.heatmap').clientHeight - 4) / 16)")
    assert len(whole) == 1 + 16

    def at(row: int, column: int) -> tuple[float, float]:
        page.locator("canvas.heatmap").scroll_into_view_if_needed()
        box = page.locator("canvas.heatmap").bounding_box()
        return box["x"] + (column + 0.5) * cell, box["y"] + (row + 0.5) * cell

    page.mouse.move(*at(1, 2))
    page.mouse.down()
    page.mouse.move(*at(3, 4))
    page.mouse.move(*at(4, 6))
    page.mouse.up()
    part = exported(opened)
    assert part == [[row[0], *row[3:8]] for row in [whole[0], *whole[2:6]]]
    names = {row[0] for row in part[1:]}
    assert opened.links
    assert {link[0] for link in opened.links} <= names
    page.click("text=whole map")
    assert exported(opened) == whole
    page.mouse.click(*at(1, 2))
    page.keyboard.down("Shift")
    page.mouse.click(*at(4, 6))
    page.keyboard.up("Shift")
    assert exported(opened) == part
    page.focus(".scroll")
    page.keyboard.press("Escape")
    assert exported(opened) == whole


def test_long_text_is_shown_by_sentence_and_fetched_as_far_as_it_is_needed(minilm: RunningServer, opener: Open) -> None:
    opened = opener(minilm)
    opened.run(LONG)
    page = opened.page
    assert len(opened.words) == 12
    assert opened.words[1].startswith("The bank keeps every")
    with Client(minilm.target) as client:
        weights = client.infer("minilm", LONG, attention=WORDS).attention[0].weights[0]
    count = len(weights)
    assert count > 160
    share = np.sort(weights, axis=1)[:, -16:].sum() / count
    assert f"the 16 greatest weights of each row. They have {100 * share:.0f}% of all weight" in (
        page.locator("#partial").text_content()
    )
    first = page.locator("#status").text_content()
    page.click("text=Fetch all weights")
    page.locator("#partial").wait_for(state="hidden")
    opened.settled()
    sizes = [float(text.split(", ")[1].split(" ")[0]) for text in (first, page.locator("#status").text_content())]
    # 216 rows of 16 links of 6 bytes, with texts and offsets of the words, and of 216 weights of 2 bytes.
    assert sizes[0] < 0.7 * sizes[1]
    table = exported(opened)
    length = count // 12
    pooled = weights.reshape(12, length, 12, length).sum(axis=3).mean(axis=1)
    # Weights are float16: the error of a sum is at most 2^-12 of it.
    np.testing.assert_allclose(np.array([row[1:] for row in table[1:]], dtype=float), pooled, atol=3e-4)
    assert table[2][0].startswith("2: The bank keeps every")
    page.locator(".token:not([hidden])").nth(1).click()
    page.click("text=Show its words")
    part = exported(opened)
    assert [row[0].split(" (")[0] for row in part[1:4]] == ["The", "bank", "keeps"]
    assert (len(part) - 1, len(part[0]) - 1) == (length, count)


def test_pinned_word_of_a_long_text_gets_all_of_its_weights(minilm: RunningServer, opener: Open) -> None:
    opened = opener(minilm, "#level=words")
    opened.run(LONG)
    page = opened.page
    with page.expect_request(lambda request: request.url.endswith(":infer")) as sent:
        page.click(".token >> text=bank")
    body = sent.value.post_data_json
    assert len(body["attention"]["queries"]) == 1
    assert "top_k" not in body["attention"]
    with Client(minilm.target) as client:
        shown = client.infer("minilm", LONG, attention=WORDS).attention[0]
    row = [token.text for token in shown.query_tokens].index("bank")
    page.wait_for_function("document.querySelectorAll('.token[title=\"0.0%\"]').length < 150")
    titles = page.locator(".token:not([hidden])").evaluate_all("all => all.map(one => parseFloat(one.title))")
    # Percentages have one decimal below 10 %, and none above.
    np.testing.assert_allclose(titles, 100 * shown.weights[0, row], atol=0.55)


def test_thresholds_are_part_of_the_next_request(minilm: RunningServer, opener: Open) -> None:
    opened = opener(minilm, "#top=3&least=0.05")
    with opened.page.expect_request(lambda request: request.url.endswith(":infer")) as sent:
        opened.run(SENTENCE)
    selected = sent.value.post_data_json["attention"]
    assert (selected["top_k"], selected["min_weight"]) == (3, 0.05)
    with Client(minilm.target) as client:
        kept = AttentionSelection(layers=-1, heads="mean", unit="word", special_tokens="drop", top_k=3, min_weight=0.05)
        shown = client.infer("minilm", SENTENCE, attention=kept).attention[0]
    names = shown.names(SENTENCE)
    links = [(names[one.query_token], names[one.key_token], f"{one.weight:.3f}") for one in shown.links(top=14)]
    assert opened.links == links
    before = len(opened.runs)
    opened.page.fill("#controls input >> nth=1", "2")
    opened.page.press("#controls input >> nth=1", "Tab")
    assert len(opened.runs) == before, "fewer weights are here already"
    with opened.page.expect_request(lambda request: request.url.endswith(":infer")) as again:
        opened.page.fill("#controls input >> nth=1", "5")
        opened.page.press("#controls input >> nth=1", "Tab")
    assert again.value.post_data_json["attention"]["top_k"] == 5
    opened.settled()
