"""Cross-attention in the explorer: a model of two texts has a line of words for each of its sides."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest
from attnserve_client import AttentionSelection, Client
from explored import Open
from onnx_files import saved
from serving import RunningServer, command, serve
from tiny_bundle import VOCABULARY, tiny_tokenizer
from two_sided_graphs import encoder_decoder

pytestmark = pytest.mark.browser

SOURCE, TARGET = "the cat sat", "the dog looked at a cat"


@pytest.fixture(scope="module")
def translator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("sides")
    tokenizer = folder / "tokenizer.json"
    tiny_tokenizer().save(str(tokenizer))
    file = saved(encoder_decoder(len(VOCABULARY)), folder / "translator.onnx")
    line = [command("attnserve-server"), "prepare", str(file), "--name", "translator", "--pair-start", "[SEP]"]
    line += ["--repository", str(folder / "models"), "--tokenizer", str(tokenizer)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    with serve(folder / "models", folder, "--isolation", "none", "--instances", "1") as running:
        yield running


def test_words_of_one_side_look_at_those_of_the_other(translator: RunningServer, opener: Open) -> None:
    opened = opener(translator)
    opened.page.click("#pair-button")
    opened.page.fill("#pair", TARGET)
    opened.run(SOURCE)
    sides = opened.page.locator(".sentence").all()
    assert [[one.text_content() for one in side.locator(".token:not([hidden])").all()] for side in sides] == [
        TARGET.split(),
        SOURCE.split(),
    ]
    with Client(translator.target) as client:
        choice = AttentionSelection(layers=-1, heads="mean", unit="word", special_tokens="drop")
        shown = client.infer("translator", (SOURCE, TARGET), attention=choice).attention[0]
    names = shown.names(SOURCE, TARGET)
    links = [(names[one.query_token], names[one.key_token], f"{one.weight:.3f}") for one in shown.links(top=14)]
    assert opened.links == links
    assert any(query == key for query, key, _ in links), "equal words of two sides are two words"
    sides[0].locator(".token >> text=dog").hover()
    strongest = next(key for query, key, _ in links if query == "dog")
    assert opened.page.locator(".summary >> nth=-1").text_content().startswith(f"dog looks at {strongest} ")
    opened.page.click("#depth > summary")
    opened.page.wait_for_selector(".thumb")
    layers = opened.page.locator(".heads .line .name").all_text_contents()
    assert layers == ["layer 1"], "the heads whose maps have the same two sides"
