"""axe finds no violation, at the widths of a phone, a tablet and a desk, in light and dark, before a run and after."""

from __future__ import annotations

from typing import Any

import pytest
from explored import INSTALL, Open
from serving import RunningServer

pytestmark = pytest.mark.browser

WIDTHS = (360, 768, 1440)
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


def test_control_axe_notices_a_button_without_a_name(minilm: RunningServer, opener: Open) -> None:
    page = opener(minilm).page
    page.evaluate("document.querySelector('main').append(document.createElement('button'))")
    assert any(one.startswith("button-name") for one in violations(page))
