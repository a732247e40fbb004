"""The page and the figure of an attention map; token texts stay inert on the page.

Without matplotlib, the whole module is skipped.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from attnserve_client import AttentionMap, Client, Token
from attnserve_client.data_types import RawLinks
from attnserve_client.testing import FakeServer

HOSTILE = (
    "<img src=x onerror=alert(1)>",
    "</script><script>alert(1)</script>",
    "\"><svg onload='alert(1)'>",
    "' onmouseover='alert(1)",
    "<!--",
    "]]>",
    "&lt;b&gt;&#x3c;i&#x3e;",
    "{policy}",
    "\u2028\u2029\x00\x1b[31m",
)


class Page(HTMLParser):
    """Tags, attributes and texts of a page as a browser parses them."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: dict[str, dict[str, str | None]] = {}
        self.names: set[str] = set()
        self.bodies: dict[str, list[str]] = {}
        self.comments = 0
        self._open = ""
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.names |= {name for name, _ in attrs}
        self.attributes.setdefault(f"{tag}#{dict(attrs).get('id', '')}", dict(attrs))
        self._open = tag

    def handle_data(self, data: str) -> None:
        self.bodies.setdefault(self._open, []).append(data)

    def handle_comment(self, data: str) -> None:
        self.comments += 1


def map_of(texts: tuple[str, ...], **changes: Any) -> AttentionMap:
    count = len(texts)
    tokens = tuple(Token(index, text, index, index + 1) for index, text in enumerate(texts))
    weights = np.full((1, count, count), 1 / count, dtype=np.float32)
    fields = {
        "sites": ("s",),
        "layer": 0,
        "kind": "self",
        "form": "dense",
        "heads": (0,),
        "query_axis": "seq",
        "key_axis": "seq",
        "query_tokens": tokens,
        "key_tokens": tokens,
        "raw": weights,
        **changes,
    }
    return AttentionMap(**fields)


def test_hostile_tokens_add_no_tag_and_no_attribute() -> None:
    harmless, hostile = Page(map_of(("a",) * len(HOSTILE)).to_html()), Page(map_of(HOSTILE).to_html())
    assert hostile.tags == harmless.tags
    assert hostile.names == harmless.names
    assert hostile.comments == 0
    assert not any(name.startswith("on") for name in hostile.names)


def test_control_unescaped_text_is_found() -> None:
    source = map_of(("a",)).to_html().replace("<h1>", f"<h1>{HOSTILE[0]}")
    assert "onerror" in Page(source).names, "the page tests must notice markup"


def test_hostile_model_and_site_names_stay_text() -> None:
    page = Page(map_of(("a",), sites=(HOSTILE[0],), model=HOSTILE[1]).to_html())
    assert page.tags == Page(map_of(("a",)).to_html()).tags
    assert HOSTILE[1] in "".join(page.bodies["h1"])


def test_tokens_are_stored_unchanged_as_data() -> None:
    source = map_of(HOSTILE).to_html()
    (data,) = re.findall(r'<script type="application/json" id="map">(.*?)</script>', source, flags=re.DOTALL)
    assert not set("<>&") & set(data)
    assert [token["text"] for token in json.loads(data)["keys"]] == list(HOSTILE)


def test_page_weights_equal_the_maps_to_16_bits() -> None:
    weights = np.random.default_rng(7).dirichlet(np.ones(5), size=(3, 5)).astype(np.float32)
    source = map_of(tuple("abcde"), raw=weights, heads=(0, 1, 2)).to_html()
    (data,) = re.findall(r'id="map">(.*?)</script>', source, flags=re.DOTALL)
    described = json.loads(data)
    steps = np.frombuffer(base64.b64decode(described["weights"]), dtype="<u2").reshape(described["shape"])
    # Half of one of the 65535 steps, and float32 rounding.
    np.testing.assert_allclose(steps / 65535 * described["scale"], weights, rtol=0, atol=1e-5)
    assert described["heads"] == [0, 1, 2]


def test_page_keeps_the_sign_of_weights_of_a_linear_site() -> None:
    weights = np.array([[[1.5, -0.5], [0.25, -0.25]]], dtype=np.float32)
    source = map_of(("a", "b"), raw=weights, form="linear").to_html()
    (data,) = re.findall(r'id="map">(.*?)</script>', source, flags=re.DOTALL)
    described = json.loads(data)
    steps = np.frombuffer(base64.b64decode(described["weights"]), dtype="<u2").reshape(described["shape"])
    least, most = described["least"], described["scale"]
    # Half of one of the 65535 steps of a range of 2, and float32 rounding.
    np.testing.assert_allclose(least + steps / 65535 * (most - least), weights, rtol=0, atol=2e-5)


def test_content_policy_allows_only_the_pages_script_and_style() -> None:
    source = map_of(("a", "b")).to_html()
    page = Page(source)
    (content,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', source)
    assert content.startswith("default-src 'none'")
    assert "unsafe" not in content
    for tag, directive in (("script", "script-src"), ("style", "style-src")):
        (body,) = re.findall(rf"<{tag}>(.*?)</{tag}>", source, flags=re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}'" in content
    assert not {"src", "href", "style", "action"} & page.names
    assert not {"link", "img", "iframe", "object"} & set(page.tags)
    assert "http" not in source.replace("http-equiv", "")


def test_page_without_scripts_lists_the_strongest_links() -> None:
    page = Page(map_of(("alpha", "beta")).to_html())
    assert "alpha" in page.bodies["td"]
    assert "noscript" in page.tags


def test_page_of_links_states_the_omitted_weight() -> None:
    raw = RawLinks(np.array([0, 1, 2]), np.array([1, 0], dtype=np.int32), np.array([0.75, 0.75], dtype=np.float32))
    found = map_of(("a", "b"), raw=raw, residual=np.array([[0.25, 0.25]], dtype=np.float32))
    assert "the omitted ones sum to 25.0% of a row" in found.to_html()
    assert "omitted" not in map_of(("a", "b")).to_html()


def test_map_of_zeros_has_a_page() -> None:
    assert "<h1>" in map_of(("a", "b"), raw=np.zeros((1, 2, 2), dtype=np.float32)).to_html()


def test_notebook_shows_the_page_in_a_sandboxed_iframe() -> None:
    frame = Page(map_of(HOSTILE)._repr_html_())
    assert frame.tags == ["iframe"]
    attributes = frame.attributes["iframe#"]
    assert attributes["sandbox"] == "allow-scripts"
    assert attributes["srcdoc"] == map_of(HOSTILE).to_html()


def test_text_in_other_scripts_is_unchanged_on_the_page(shared_server: FakeServer) -> None:
    with Client(shared_server.target) as client:
        found = client.infer("fake", "Käufer übernimmt 責任 🙂", attention=True).attention[0]
    data = found.to_html().split('id="map">')[1].split("</script>")[0]
    assert "責任" in [token["text"] for token in json.loads(data)["keys"]]


pytest.importorskip("matplotlib", reason="pip install 'attnserve[plot]'")


def test_figure_labels_its_axes_with_the_tokens() -> None:
    found = map_of(("cost", "$x^2$", "a" * 50), sites=("$s$",))
    figure = found.plot()
    axes = figure.axes[0]
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels[:2] == ["cost", r"\$x^2\$"]
    assert len(labels[2]) == 24
    np.testing.assert_array_equal(axes.images[0].get_array(), found.weights[0])
    figure.canvas.draw()


def test_figure_of_one_head_names_it() -> None:
    found = map_of(("a", "b"), raw=np.stack([np.eye(2), np.ones((2, 2)) / 2]).astype(np.float32), heads=(0, 5))
    figure = found.plot(head=5)
    assert "head 5" in figure.axes[0].get_title()
    np.testing.assert_array_equal(figure.axes[0].images[0].get_array(), found.weights[1])


def test_figure_of_many_tokens_has_no_labels() -> None:
    axes = map_of(tuple(str(number) for number in range(100))).plot().axes[0]
    assert "99" not in [label.get_text() for label in axes.get_xticklabels()]
