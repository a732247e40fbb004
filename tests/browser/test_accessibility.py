"""axe finds no violation, at the widths of a phone, a tablet and a desk, in light and dark, before a run and after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from explored import INSTALL, Open, png
from serving import RunningServer
from two_sided_graphs import IMAGE

pytestmark = pytest.mark.browser

WIDTHS = (360, 768, 1440)
SOME = ((360, "light"), (768, "dark"), (1440, "light"))
"""For views that differ from the page of the first test in one panel."""
TAGS = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
SENTENCE = "The buyer assumes all liabilities, and the seller keeps all rights to the plant."


def violations(page: Any) -> list[str]:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason=INSTALL)
    found = axe.Axe().run(page, options={"runOnly": {"type": "tag", "values": TAGS}})
    return [
        f"{each['id']}: {[node['target'] for node in each['nodes'][:4]]} {each['nodes'][0]['failureSummary']}"
        for each in found.response["violations"]
    ]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_axe_finds_nothing(minilm: RunningServer, opener: Open, width: int, scheme: str) -> None:
    opened = opener(minilm, "#other=text", viewport={"width": width, "height": 800}, color_scheme=scheme)
    page = opened.page
    assert violations(page) == []
    page.fill("#second", SENTENCE.replace("buyer", "lender"))
    opened.run(SENTENCE)
    page.click("#depth > summary")
    page.wait_for_selector(".thumb")
    page.locator(".board >> nth=0").locator(".token >> text=buyer").click()
    page.click("text=Leave out each word")
    page.wait_for_selector("#leave table")
    page.click("text=as curl")
    assert violations(page) == []
    wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert wide == 0, "nothing reaches beyond the edge"


@pytest.mark.parametrize(("width", "scheme"), SOME)
def test_axe_finds_nothing_in_code_arcs_and_figures(tiny: RunningServer, opener: Open, width: int, scheme: str) -> None:
    opened = opener(tiny, "#model=classifier&arcs=1", viewport={"width": width, "height": 800}, color_scheme=scheme)
    page = opened.page
    opened.run("the cat\n  sat on\n  a mat and\n  looked at the dog")
    page.locator(".token >> text=sat").click()
    page.click("text=Leave out each word")
    page.click("text=Compare with random words")
    page.wait_for_selector("#leave .figures")
    assert violations(page) == []
    wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert wide == 0, "nothing reaches beyond the edge"


@pytest.mark.parametrize(("width", "scheme"), SOME)
def test_axe_finds_nothing_over_an_image(
    sides: RunningServer, opener: Open, tmp_path: Path, width: int, scheme: str
) -> None:
    opened = opener(sides, "#model=clip", viewport={"width": width, "height": 800}, color_scheme=scheme)
    image = tmp_path / "grey.png"
    image.write_bytes(png(np.full((*IMAGE, 3), 128, np.uint8)))
    opened.page.set_input_files("#image", image)
    opened.run("a dog sat")
    opened.page.locator(".token >> text=dog").click()
    assert violations(opened.page) == []


def test_control_axe_notices_a_button_without_a_name(minilm: RunningServer, opener: Open) -> None:
    page = opener(minilm).page
    page.evaluate("document.querySelector('main').append(document.createElement('button'))")
    assert any(one.startswith("button-name") for one in violations(page))
