"""Cross-attention in the explorer: a model of two texts has a line of words for each of its sides."""

from __future__ import annotations

import pytest
from attnserve_client import AttentionSelection, Client
from explored import Open
from serving import RunningServer

pytestmark = pytest.mark.browser

SOURCE, TARGET = "the cat sat", "the dog looked at a cat"


def test_field_of_a_second_text_opens_by_the_model(tiny: RunningServer, sides: RunningServer, opener: Open) -> None:
    assert opener(sides, "#model=translator").page.is_visible("#pair")
    opened = opener(tiny, "#model=tiny")
    assert not opened.page.is_visible("#pair")
    opened.page.click("#pair-button")
    assert opened.page.is_visible("#pair"), "a model of one axis may take pairs"
    opened.page.click("#pair-button")
    assert not opened.page.is_visible("#pair")


def test_words_of_one_side_look_at_those_of_the_other(sides: RunningServer, opener: Open) -> None:
    opened = opener(sides, "#model=translator")
    opened.page.fill("#pair", TARGET)
    opened.run(SOURCE)
    lines = opened.page.locator(".sentence").all()
    assert [[one.text_content() for one in side.locator(".token:not([hidden])").all()] for side in lines] == [
        TARGET.split(),
        SOURCE.split(),
    ]
    with Client(sides.target) as client:
        choice = AttentionSelection(layers=-1, heads="mean", unit="word", special_tokens="drop")
        shown = client.infer("translator", (SOURCE, TARGET), attention=choice).attention[0]
    names = shown.names(SOURCE, TARGET)
    links = [(names[one.query_token], names[one.key_token], f"{one.weight:.3f}") for one in shown.links(top=14)]
    assert opened.links == links
    assert any(query == key for query, key, _ in links), "equal words of two sides are two words"
    lines[0].locator(".token >> text=dog").hover()
    strongest = next(key for query, key, _ in links if query == "dog")
    assert opened.page.locator(".summary >> nth=-1").text_content().startswith(f"dog looks at {strongest} ")
    opened.page.click("#depth > summary")
    opened.page.wait_for_selector(".thumb")
    layers = opened.page.locator(".heads .line .name").all_text_contents()
    assert layers == ["layer 1"], "the heads whose maps have the same two sides"
