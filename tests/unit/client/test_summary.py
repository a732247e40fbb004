"""The printed forms of results, maps and clients, and the error for a map that was not selected."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from attnserve_client import AsyncClient, AttentionMap, AttentionSelection, Client, Token
from attnserve_client.testing import FakeServer

SELECTION = AttentionSelection(layers=-1, heads="mean", unit="word", special_tokens="drop")


@pytest.fixture
def client(shared_server: FakeServer) -> Any:
    with Client(shared_server.target) as made:
        yield made


def test_a_result_is_one_short_line_with_shapes_and_digest(client: Client) -> None:
    result = client.infer("fake", "some words " * 50, attention=SELECTION)
    digest = result.receipt.digest[:19]
    assert repr(result) == (
        "InferenceResult(fake 1; embedding float32 (16,); last_hidden_state float32 (102, 16); "
        f"1 attention maps, the first (1, 100, 100); {digest})"
    )
    assert repr(result.attention[0]) == (
        "AttentionMap(fake, layer 1 (layer.1), 4 heads joined, self, dense, weights (1, 100, 100))"
    )


def test_features_and_labels_are_in_the_line(client: Client) -> None:
    result = client.infer("fake", "a text", outputs=[], attention=AttentionSelection(features="entropy"))
    assert "; features entropy of 2 sites; sha256:" in repr(result)
    with FakeServer(labels=("good", "bad")) as server, Client(server.target) as labelled:
        assert "; Labels(" in repr(labelled.infer("fake", "a text"))


def test_a_client_prints_its_addresses_and_no_token(shared_server: FakeServer) -> None:
    with Client("localhost", token="secret") as client:
        assert repr(client) == "Client('localhost:8001')"
    assert repr(AsyncClient(["a:1", "10.0.0.1:2"], token="secret")) == "AsyncClient('a:1, ipv4:10.0.0.1:2')"


def test_a_notebook_shows_the_line_and_the_first_map(client: Client) -> None:
    page = client.infer("fake", "<b> words", attention=SELECTION)._repr_html_()
    assert page.startswith("<p><code>InferenceResult(")
    assert "<iframe sandbox=" in page
    plain = client.infer("fake", "a text")._repr_html_()
    assert plain.endswith("</code></p>")


def test_missing_map_names_what_to_select(client: Client) -> None:
    with pytest.raises(IndexError, match=r"selected none; pass attention=AttentionSelection\(layers=\[-1\]\)"):
        client.infer("fake", "a text").attention[0]
    with pytest.raises(IndexError, match=r"attention\[2\] of 2 maps"):
        client.infer("fake", "a text", attention=True).attention[2]
    assert client.infer("fake", "a text").attention == []
    assert len(client.infer("fake", "a text", attention=True).attention[:1]) == 1


def units(text: str) -> tuple[Token, ...]:
    tokens, at = [], 0
    for index, word in enumerate(text.split()):
        at = text.index(word, at)
        tokens.append(Token(index, word, at, at + len(word)))
        at += len(word)
    return tuple(tokens)


def of(text: str) -> AttentionMap:
    tokens = units(text)
    weights = np.full((1, len(tokens), len(tokens)), 1 / len(tokens), dtype=np.float32)
    return AttentionMap(("s",), 0, "self", "dense", (0,), "seq", "seq", tokens, tokens, weights)


def test_only_repeated_words_have_positions() -> None:
    assert list(of("if done append done").names().values()) == ["if", "done (1)", "append", "done (3)"]


def test_positions_in_several_lines_are_line_and_column() -> None:
    text = "if done\n  append done"
    assert list(of(text).names(text).values()) == ["if", "done, line 1, column 4", "append", "done, line 2, column 10"]
    assert "done (1)" in of(text).names().values(), "without the text, there are no lines"


def test_links_leave_out_self_links_and_punctuation_by_default() -> None:
    found = of("a , b")
    assert [(link.query, link.key) for link in found.links(top=None)] == [("a", "b"), ("b", "a")]
    assert len(found.links(top=None, include_self=True, exclude_punctuation=False)) == 9
