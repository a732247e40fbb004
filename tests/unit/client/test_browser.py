"""The page of an attention map in a real browser.

Skipped without `chromium` or `chromium-browser` on the PATH.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from attnserve_client import AttentionMap, Token
from attnserve_client.data_types import PatchGrid
from browser import CHROMIUM, HOSTILE, document

pytestmark = [
    pytest.mark.skipif(not CHROMIUM, reason="needs a browser: apt-get install chromium fonts-dejavu-core"),
    pytest.mark.slow,
]


def hostile_map() -> AttentionMap:
    tokens = tuple(Token(index, text, index, index + 1) for index, text in enumerate(HOSTILE))
    weights = np.full((2, 3, 3), 1 / 3, dtype=np.float32)
    return AttentionMap(("s",), 0, "self", "dense", (0, 1), "seq", "seq", tokens, tokens, weights)


def test_page_draws_the_map_and_hostile_tokens_stay_text(tmp_path: Path) -> None:
    page = document(hostile_map().to_html(), tmp_path)
    assert page.tokens == list(HOSTILE), "the script must run under the content policy"
    assert page.tags.count("li") == 6, "3 x 3 links without those from a token to itself"
    assert not {"img", "svg"} & set(page.tags)
    assert page.title == "Attention, layer 0 (s), 2 heads"


def sentence_map(text: str) -> AttentionMap:
    """A map in which every word, punctuation included, looks mostly at itself."""
    words = text.split()
    tokens = tuple(Token(index, word, 2 * index, 2 * index + 1) for index, word in enumerate(words))
    weights = (np.eye(len(words)) + 0.1).astype(np.float32)
    weights /= weights.sum(axis=1, keepdims=True)
    return AttentionMap(("s",), 0, "self", "dense", (0,), "seq", "seq", tokens, tokens, weights[None])


def test_page_table_and_sdk_list_the_same_links_with_positions_of_repeated_words(tmp_path: Path) -> None:
    shown = sentence_map("if done : append ( done )")
    names = shown.names()
    expected = [(names[link.query_token], names[link.key_token]) for link in shown.links(top=None)]
    page = document(shown.to_html(), tmp_path)
    listed = [tuple(item.rsplit(" ", 2)[0].split(" → ")) for item in page.items]
    assert sorted(listed) == sorted(expected), "equal weights in any order"
    assert ("done (1)", "done (5)") in listed
    rows = [f"<td>{query}</td><td>{key}</td>" for query, key in expected]
    assert all(row in shown.to_html() for row in rows), "the table without scripts"
    assert shown.to_html().count("<tr><td>") == len(expected)


@pytest.mark.parametrize(("words", "width", "cut"), [(40, 500, True), (12, 1400, False), (4, 500, False)])
def test_page_marks_a_map_that_does_not_fit(tmp_path: Path, words: int, width: int, cut: bool) -> None:
    shown = sentence_map(" ".join(f"word{place}" for place in range(words)))
    assert document(shown.to_html(), tmp_path, width).cue is cut


def test_page_places_patches_as_in_the_image(tmp_path: Path) -> None:
    words = (Token(0, "dog"),)
    patches = tuple(Token(index, f"p{index}", special=index == 0) for index in range(7))
    weights = np.full((1, 1, 7), 1 / 7, dtype=np.float32)
    shown = AttentionMap(
        ("s",),
        0,
        "cross",
        "dense",
        (0,),
        "seq",
        "patches",
        words,
        patches,
        weights,
        grids={"patches": PatchGrid(2, 3, 1)},
    )
    page = document(shown.to_html(), tmp_path)
    assert page.tokens == ["dog", "p0", *[""] * 6], "patches are cells without a text"
    assert [place.replace(" ", "") for place in page.places] == [
        "grid-area:1/1;", *(f"grid-area:{row}/{column};" for row in (2, 3) for column in (1, 2, 3))
    ]  # fmt: skip


def test_control_browser_runs_unescaped_script(tmp_path: Path) -> None:
    page = document(f"<title>mine</title>{HOSTILE[1]}", tmp_path)
    assert page.title == "owned", "the page tests must notice a script that runs"


def test_content_policy_blocks_an_injected_script(tmp_path: Path) -> None:
    source = hostile_map().to_html().replace("</main>", "<script>document.title='owned'</script></main>")
    assert "owned" not in document(source, tmp_path).title
