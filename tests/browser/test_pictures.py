"""Take the pictures of the explorer for the README and the documentation.

With ATTNSERVE_PICTURES=1 they are written to docs/pictures. Their bytes differ between machines with other fonts, so
that no test compares them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from explored import Open, png, save
from serving import RunningServer
from two_sided_graphs import IMAGE

pytestmark = pytest.mark.browser

CONTRACT = (
    "The buyer agrees to assume all liabilities, except those specifically excluded in Schedule B, which includes "
    "environmental damages from the 1995 incident."
)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_picture_of_the_whole_page(minilm: RunningServer, opener: Open, tmp_path: Path, scheme: str) -> None:
    opened = opener(minilm, viewport={"width": 1100, "height": 1300}, color_scheme=scheme)
    opened.run(CONTRACT)
    opened.page.click(".token >> text=excluded")
    opened.page.evaluate("document.activeElement.blur()")
    save(opened.page, f"explorer-{scheme}.png", tmp_path)


def test_picture_of_all_heads(minilm: RunningServer, opener: Open, tmp_path: Path) -> None:
    opened = opener(minilm, viewport={"width": 1100, "height": 860})
    opened.run(CONTRACT)
    opened.page.click("#depth > summary")
    opened.page.wait_for_selector(".thumb")
    opened.page.click(".thumb >> nth=27")
    opened.settled()
    opened.page.mouse.move(2, 2)
    save(opened.page.locator("#depth"), "explorer-heads.png", tmp_path)


def test_picture_of_two_texts(minilm: RunningServer, opener: Open, tmp_path: Path) -> None:
    opened = opener(minilm, "#other=text", viewport={"width": 1100, "height": 1500})
    opened.page.fill("#second", CONTRACT.replace("buyer", "seller"))
    opened.run(CONTRACT)
    opened.page.hover(".token >> text=excluded")
    box = opened.page.locator("#boards").bounding_box()
    clip = {**box, "height": min(box["height"], 620)}
    save(opened.page, "explorer-two-texts.png", tmp_path, full_page=True, clip=clip)


def test_picture_of_words_left_out(minilm: RunningServer, opener: Open, tmp_path: Path) -> None:
    opened = opener(minilm, viewport={"width": 1100, "height": 860})
    opened.run(CONTRACT)
    opened.page.click(".token >> text=excluded")
    opened.page.click("text=Leave out each word")
    opened.page.wait_for_selector("#leave table")
    save(opened.page.locator("#leave"), "explorer-left-out.png", tmp_path)


def test_picture_on_a_phone(minilm: RunningServer, opener: Open, tmp_path: Path) -> None:
    opened = opener(minilm, viewport={"width": 360, "height": 740}, device_scale_factor=2, has_touch=True)
    opened.run("Patient takes metformin for diabetes and reports occasional dizziness.")
    opened.page.tap(".token >> text=dizziness")
    opened.page.locator("#boards").scroll_into_view_if_needed()
    opened.page.evaluate("document.querySelector('#answer').scrollIntoView()")
    save(opened.page, "explorer-phone.png", tmp_path)


def test_picture_of_code_with_arcs(minilm: RunningServer, opener: Open, tmp_path: Path) -> None:
    opened = opener(minilm, "#arcs=1", viewport={"width": 1100, "height": 900})
    opened.run("if processed:\n    result.append(processed)")
    opened.page.click(".token >> text=processed >> nth=1")
    opened.page.evaluate("document.activeElement.blur()")
    save(opened.page.locator("#boards"), "explorer-code.png", tmp_path)


def test_picture_of_an_image(sides: RunningServer, opener: Open, tmp_path: Path) -> None:
    opened = opener(sides, "#model=clip", viewport={"width": 1100, "height": 900})
    height, width = (40 * one for one in IMAGE)
    down, across = np.mgrid[:height, :width]
    colours = np.stack([255 * across / width, 255 * down / height, 160 + 0 * down], axis=-1).astype(np.uint8)
    colours[(down - height * 0.6) ** 2 + (across - width * 0.7) ** 2 < (height / 4) ** 2] = (250, 240, 200)
    image = tmp_path / "drawn.png"
    image.write_bytes(png(colours))
    opened.page.set_input_files("#image", image)
    opened.run("the dog looked at a cat")
    opened.page.click(".token >> text=dog")
    opened.page.evaluate("document.activeElement.blur()")
    save(opened.page.locator("#boards"), "explorer-image.png", tmp_path)
