"""Images in the explorer: patches over the picture, coloured by what a word or patch attends to, and left out."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from attnserve_client import AttentionSelection, Client
from explored import Open, Opened, png
from serving import RunningServer
from two_sided_graphs import IMAGE, PATCH

pytestmark = pytest.mark.browser

TEXT = "a dog sat"
COLOURS = np.random.default_rng(3).integers(0, 256, (*IMAGE, 3), dtype=np.uint8)
CHOICE = AttentionSelection(layers=-1, heads="mean", unit="word", special_tokens="drop")


def pixels(colours: np.ndarray, mean: float = 0.5, deviation: float = 0.5) -> np.ndarray:
    """The input of the models, float32 (3, height, width), as the page states it."""
    return ((colours / 255 - mean) / deviation).astype(np.float32).transpose(2, 0, 1)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "noise.png"
    path.write_bytes(png(COLOURS))
    return path


def patches_of(opened: Opened) -> list[str]:
    """The opacity of each patch."""
    script = "all => all.map(one => one.style.backgroundColor.match(/[\\d.]+(?=\\))/)?.[0] ?? '0')"
    return opened.page.locator(".patches .token:not([hidden])").evaluate_all(script)


def test_word_colours_the_patches_that_it_attends_to(sides: RunningServer, opener: Open, image: Path) -> None:
    opened = opener(sides, "#model=clip")
    opened.page.set_input_files("#image", image)
    opened.run(TEXT)
    with Client(sides.target) as client:
        result = client.infer("clip", (TEXT, {"pixel_values": pixels(COLOURS)}), attention=CHOICE)
    shown = result.attention[0]
    names = shown.names(TEXT)
    links = [(names[one.query_token], names[one.key_token], f"{one.weight:.3f}") for one in shown.links(top=14)]
    assert opened.links == links
    picture = opened.page.locator(".patches .picture")
    drawn = picture.evaluate("one => [...one.getContext('2d').getImageData(0, 0, one.width, one.height).data]")
    assert (np.array(drawn).reshape(*IMAGE, 4)[..., :3] == COLOURS).all(), "the image is below its patches"
    opened.page.hover(".token >> text=dog")
    weights = shown.weights[0, 1]
    opacity = np.array([float(one) for one in patches_of(opened)])
    assert len(opacity) == len(weights) == 6
    assert opacity.argmax() == weights.argmax()
    # Colours have 40 steps.
    np.testing.assert_allclose(opacity, 0.85 * weights / weights.max(), atol=0.85 / 40)


def test_arrow_keys_move_among_patches_as_in_the_image(sides: RunningServer, opener: Open, image: Path) -> None:
    opened = opener(sides, "#model=vision")
    page = opened.page
    assert not page.is_visible("#text"), "the model takes no text"
    page.click("#run")
    page.locator("#status", has_text="Choose one first").wait_for()
    page.set_input_files("#image", image)
    page.click("#run")
    opened.settled()
    patches = page.locator(".patches .token:not([hidden])")
    patches.nth(1).focus()
    page.keyboard.press("ArrowDown")
    focused = page.evaluate("document.activeElement.getAttribute('aria-label')")
    assert focused == patches.nth(1 + IMAGE[1] // PATCH).get_attribute("aria-label")
    assert page.locator(".summary >> nth=-1").text_content().startswith(f"{focused} looks at ")


def test_leaving_a_patch_out_gives_it_the_mean_colour(sides: RunningServer, opener: Open, image: Path) -> None:
    opened = opener(sides, "#model=vision")
    page = opened.page
    page.set_input_files("#image", image)
    page.click("#run")
    opened.settled()
    page.locator(".patches .token:not([hidden])").nth(4).click()
    page.click("text=Leave it out")
    page.wait_for_selector("#leave p")
    without = COLOURS.copy()
    without[PATCH:, PATCH : 2 * PATCH] = np.rint(COLOURS.reshape(-1, 3).mean(axis=0))
    with Client(sides.target) as client:
        inputs = [{"pixel_values": pixels(one)} for one in (COLOURS, without)]
        one, other = (each.outputs["embedding"] for each in client.infer("vision", inputs))
    cosine = float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))
    assert f"is {cosine:.3f} instead of 1.000" in page.locator("#leave p").text_content()
    page.click("text=Leave out each patch")
    page.wait_for_selector("#leave table")
    assert page.locator("#leave tr").count() == 1 + 6


def test_program_of_an_image_reads_the_pixels_that_the_page_saves(
    sides: RunningServer, opener: Open, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = opener(sides, "#model=clip&scale=unit")
    opened.page.set_input_files("#image", image)
    opened.run(TEXT)
    with opened.page.expect_download() as download:
        opened.page.click("text=as Python")
    download.value.save_as(tmp_path / "pixels.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "pixels.npy"), pixels(COLOURS, 0, 1))
    program = opened.page.locator(".code").text_content().replace('Client("127.0.0.1")', f'Client("{sides.target}")')
    monkeypatch.chdir(tmp_path)
    printed = io.StringIO()
    exec(compile(program, "program", "exec"), {"print": lambda line: printed.write(line + "\n")})
    assert printed.getvalue().splitlines()[0].split(": ")[1] == opened.links[0][2]


def test_file_that_is_no_image_is_refused_with_the_remedy(sides: RunningServer, opener: Open, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image", encoding="utf-8")
    opened = opener(sides, "#model=clip")
    opened.page.set_input_files("#image", tmp_path / "text.png")
    opened.page.locator("#status", has_text="text.png is no image that this browser reads").wait_for()
