"""Drawings of attention maps as SVG: what they show, that token texts stay text, and what they refuse.

`map_of` makes a map by hand. A drawing that is no XML fails in `Drawn`.
"""

from __future__ import annotations

import re
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from attnserve_client import AttentionMap, Client, Token
from attnserve_client._svg import RAMP, colour, css, ink_on
from attnserve_client.data_types import PatchGrid, RawLinks
from attnserve_client.testing import FakeServer

SVG = "{http://www.w3.org/2000/svg}"
VIEWS = ("heatmap", "bipartite", "arcs")
HOSTILE = (
    "<script>alert(1)</script>",
    "\"><svg onload='alert(1)'>",
    "' onmouseover='alert(1)",
    "]]></desc><desc>",
    "<!--",
    "&lt;b&gt;",
    "&#0;&#xffff;",
    "\x00\x08\x0b\x1b\x7f\x85\u2028\u202e\ufffe\uffff\ud800",
    "{name}%s\\",
)


def map_of(texts: tuple[str, ...], keys: tuple[str, ...] = (), heads: int = 1, **changes: Any) -> AttentionMap:
    queries = tuple(Token(index, text, 10 * index, 10 * index + 5) for index, text in enumerate(texts))
    columns = tuple(Token(index, text, 10 * index, 10 * index + 5) for index, text in enumerate(keys)) or queries
    generator = np.random.default_rng(len(texts))
    weights = generator.dirichlet(np.full(len(columns), 0.3), size=(heads, len(queries))).astype(np.float32)
    fields = {
        "sites": ("encoder.0",),
        "layer": 0,
        "kind": "cross" if keys else "self",
        "form": "dense",
        "heads": tuple(range(heads)),
        "query_axis": "seq",
        "key_axis": "source_seq" if keys else "seq",
        "query_tokens": queries,
        "key_tokens": columns,
        "raw": weights,
        "model": "minilm",
        **changes,
    }
    return AttentionMap(**fields)


def words(count: int) -> tuple[str, ...]:
    return tuple(f"word{number}" for number in range(count))


class Drawn:
    """Elements, texts and hovered texts of a drawing."""

    def __init__(self, source: str) -> None:
        self.root = ET.fromstring(source.encode())
        self.elements = list(self.root.iter())
        self.tags = [element.tag.removeprefix(SVG) for element in self.elements]
        self.attributes = {name for element in self.elements for name in element.attrib}
        self.texts = [element.text or "" for element in self.root.iter(f"{SVG}text")]
        inner = list(self.root.iter(f"{SVG}title"))
        self.hovered = [element.text or "" for element in inner[1:]]
        self.title = inner[0].text or ""
        (description,) = self.root.iter(f"{SVG}desc")
        self.description = description.text or ""

    def of(self, tag: str) -> list[ET.Element]:
        return list(self.root.iter(f"{SVG}{tag}"))


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("count", [1, 5, 60, 150])
def test_every_view_fits_its_canvas_and_names_its_words(view: Any, count: int) -> None:
    drawn = Drawn(map_of(words(count)).to_svg(view))
    width, height = (float(drawn.root.get(name, 0)) for name in ("width", "height"))
    assert drawn.root.get("viewBox") == f"0 0 {drawn.root.get('width')} {drawn.root.get('height')}"
    assert 100 < width < 2500
    assert 50 < height < 3500
    named = [text for text in drawn.texts if text.startswith("word")]
    assert len(set(named)) == count or count == 150
    sizes = [float(text.get("font-size", 0)) for text in drawn.of("text")]
    assert min(sizes) >= 10


@pytest.mark.parametrize("view", VIEWS)
def test_a_screen_reader_gets_a_title_and_the_strongest_links(view: Any) -> None:
    found = map_of(words(5), heads=3)
    drawn = Drawn(found.to_svg(view))
    assert drawn.root.get("role") == "img"
    named = drawn.root.get("aria-labelledby", "").split()
    assert [element.get("id") for element in drawn.elements if element.get("id")] == named
    assert drawn.title == "minilm: layer 0 (encoder.0), 3 heads, their mean"
    assert drawn.title in drawn.texts
    mean = found.weights.mean(axis=0)
    np.fill_diagonal(mean, 0)
    row, column = np.unravel_index(mean.argmax(), mean.shape)
    assert f"word{row} looks at word{column}, {mean.max():.3f}" in drawn.description


def test_ids_of_different_drawings_differ_and_equal_drawings_are_equal() -> None:
    first, second = map_of(words(3)).to_svg(), map_of(words(4)).to_svg()
    assert first == map_of(words(3)).to_svg()
    assert Drawn(first).root.get("aria-labelledby") != Drawn(second).root.get("aria-labelledby")


@pytest.mark.parametrize("view", VIEWS)
def test_hostile_tokens_add_no_element_and_no_attribute(view: Any) -> None:
    source = map_of(HOSTILE, sites=(HOSTILE[0],), model=HOSTILE[1]).to_svg(
        view, exclude_punctuation=False, include_self=True, caption=HOSTILE[3]
    )
    harmless = map_of(words(len(HOSTILE))).to_svg(view, exclude_punctuation=False, include_self=True)
    hostile = Drawn(source)
    assert hostile.tags == Drawn(harmless).tags
    assert hostile.attributes == Drawn(harmless).attributes
    assert not {"script", "style", "a", "image", "use", "foreignObject"} & set(hostile.tags)
    assert not any(name.startswith("on") or "href" in name for name in hostile.attributes)
    assert any("<script>" in text for text in hostile.texts)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u202e\ufffe\uffff\ud800]", source)


def test_control_unescaped_text_is_no_xml() -> None:
    source = map_of(words(2)).to_svg().replace(">word0<", f">{HOSTILE[1]}<")
    with pytest.raises(ET.ParseError):
        Drawn(source)


def cells(drawn: Drawn, rows: int, columns: int) -> np.ndarray:
    """Return the colour of each cell of a heatmap, as text, from its paths."""
    (group,) = [each for each in drawn.of("g") if "scale" in each.get("transform", "")]
    filled = np.full((rows, columns), group.find(f"{SVG}rect").get("fill"), dtype=object)  # type: ignore[union-attr]
    for path in group.iter(f"{SVG}path"):
        for column, row, wide in re.findall(r"M(\d+) (\d+)h(\d+)v1h-\d+z", path.get("d", "")):
            filled[int(row), int(column) : int(column) + int(wide)] = path.get("fill")
    return filled


@pytest.mark.parametrize(("rows", "columns"), [(5, 5), (60, 60), (4, 7)])
def test_cells_have_the_colours_of_their_weights(rows: int, columns: int) -> None:
    found = map_of(words(rows), words(columns) if rows != columns else ())
    shares = found.weights[0] / found.weights[0].max()
    expected = [[css(colour(float(np.rint(share * 64)) / 64)) for share in row] for row in shares]
    assert cells(Drawn(found.to_svg()), rows, columns).tolist() == expected


def test_small_heatmaps_have_percentages_and_links_under_the_pointer() -> None:
    found = map_of(words(4))
    drawn = Drawn(found.to_svg())
    numbers = [text for text in drawn.texts if text.isdigit()]
    assert numbers[:16] == [f"{100 * weight:.0f}" for weight in found.weights[0].ravel()]
    assert f"word1 looks at word2: {found.weights[0, 1, 2]:.4f}" in drawn.hovered
    assert len(Drawn(map_of(words(60)).to_svg()).hovered) == 0


def test_one_head_is_drawn_alone() -> None:
    found = map_of(words(4), heads=3)
    drawn = Drawn(found.to_svg(head=2))
    assert drawn.title.endswith("3 heads, head 2")
    assert [text for text in drawn.texts if text.isdigit()][:4] == [f"{100 * w:.0f}" for w in found.weights[2, 0]]
    with pytest.raises(ValueError, match="head 9 is not in this map"):
        found.to_svg(head=9)


@pytest.mark.parametrize("view", ["bipartite", "arcs"])
def test_lines_are_the_strongest_links_of_the_mean(view: Any) -> None:
    found = map_of(words(6), heads=2)
    mean = found.weights.mean(axis=0)
    np.fill_diagonal(mean, 0)
    order = np.argsort(-mean.ravel(), kind="stable")[:7]
    expected = {f"word{at // 6} looks at word{at % 6}: {mean.ravel()[at]:.4f}" for at in order.tolist()}
    drawn = Drawn(found.to_svg(view, top=7))
    assert set(drawn.hovered) == expected
    widths = [float(path.get("stroke-width", 0)) for path in drawn.of("path")]
    assert widths == sorted(widths), "the strongest line lies on top"
    assert any(note.startswith("The 7 strongest links") for note in drawn.texts)


def ends_of(path: ET.Element) -> tuple[float, float, float, float]:
    """Return the first and the last point of a curve."""
    numbers = [float(number) for number in re.findall(r"-?[\d.]+", path.get("d", ""))]
    return (*numbers[:2], *numbers[-2:])  # type: ignore[return-value]


def test_lines_of_a_cross_map_lead_from_its_query_to_its_key() -> None:
    weights = np.zeros((1, 2, 3), dtype=np.float32)
    weights[0, 0, 2] = weights[0, 1, 0] = 1
    found = map_of(("a", "dog"), ("ein", "roter", "Hund"), raw=weights)
    drawn = Drawn(found.to_svg("bipartite"))
    height = {text.text: float(text.get("y", 0)) for text in drawn.of("text")}
    column = {text.text: float(text.get("x", 0)) for text in drawn.of("text")}
    assert drawn.hovered == ["dog looks at ein: 1.0000", "a looks at Hund: 1.0000"]
    for path, (query, key) in zip(drawn.of("path"), [("dog", "ein"), ("a", "Hund")], strict=True):
        x0, y0, x1, y1 = ends_of(path)
        assert column[query] < x0 < x1 < column[key]
        # A baseline is a third of a letter below the middle of its line.
        assert abs(y0 - height[query]) < 6
        assert abs(y1 - height[key]) < 6
    assert {"looks … (seq)", "… at (source_seq)", "Without special tokens and punctuation."} <= set(drawn.texts)


def test_arcs_are_on_the_right_where_a_word_looks_ahead_and_on_the_left_where_it_looks_back() -> None:
    weights = np.zeros((1, 3, 3), dtype=np.float32)
    weights[0, 0, 2], weights[0, 2, 1], weights[0, 1, 1] = 0.9, 0.5, 0.4
    drawn = Drawn(map_of(("a", "b", "c"), raw=weights).to_svg("arcs", include_self=True))
    centre = {text.text: float(text.get("x", 0)) for text in drawn.of("text")}["a"]
    by_link = dict(zip(drawn.hovered, drawn.of("path"), strict=True))
    right, left = ends_of(by_link["a looks at c: 0.9000"]), ends_of(by_link["c looks at b: 0.5000"])
    assert right[0] == right[2] > centre > left[0] == left[2]
    assert right[1] < right[3]
    assert left[1] > left[3]
    dots = {(float(dot.get("cx", 0)), float(dot.get("cy", 0))) for dot in drawn.of("circle")}
    assert {right[2:], left[2:]} <= dots
    assert "b looks at b: 0.4000" in by_link


def test_arcs_of_two_sides_are_refused() -> None:
    with pytest.raises(ValueError, match=r"this map has two sides \(seq and source_seq\); draw it as bipartite"):
        map_of(("a",), ("b", "c")).to_svg("arcs")


def test_arcs_of_one_row_have_all_words() -> None:
    tokens = tuple(Token(index, text) for index, text in enumerate(("[CLS]", "a", "dog")))
    found = map_of(("dog",), query_tokens=tokens[2:], key_tokens=tokens, raw=np.array([[[0, 0.9, 0.1]]], np.float32))
    drawn = Drawn(found.to_svg("arcs"))
    assert drawn.hovered == ["dog looks at a: 0.9000"]
    assert {"[CLS]", "a", "dog"} <= set(drawn.texts)


@pytest.mark.parametrize("view", ["bipartite", "arcs"])
def test_long_texts_show_only_words_with_links(view: Any) -> None:
    drawn = Drawn(map_of(words(300)).to_svg(view, top=5))
    assert len(drawn.hovered) == 5
    shown = {text for text in drawn.texts if text.startswith("word")}
    assert shown == {word for link in drawn.hovered for word in re.findall(r"word\d+", link)}
    assert "⋮" in drawn.texts


def test_links_follow_the_rule_of_links() -> None:
    tokens = (Token(0, "[CLS]", special=True), Token(1, "dog", 0, 3), Token(2, ".", 3, 4), Token(3, "sat", 5, 8))
    found = map_of(("",) * 4, query_tokens=tokens, key_tokens=tokens)
    hovered = Drawn(found.to_svg("bipartite")).hovered
    assert {text.split(":")[0] for text in hovered} == {"dog looks at sat", "sat looks at dog"}
    every = Drawn(
        found.to_svg("bipartite", top=16, include_self=True, exclude_special=False, exclude_punctuation=False)
    )
    assert len(every.hovered) == int((found.weights > 0).sum())


def test_a_map_of_links_states_the_omitted_weight() -> None:
    raw = RawLinks(np.array([0, 1, 2]), np.array([1, 0], dtype=np.int32), np.array([0.75, 0.75], dtype=np.float32))
    found = map_of(("a", "b"), raw=raw, residual=np.array([[0.25, 0.25]], dtype=np.float32))
    note = "Strongest links only; the omitted ones sum to 25.0% of a row on average."
    assert all(note in Drawn(found.to_svg(view)).texts for view in VIEWS)


def test_keys_outside_a_window_are_grey_and_have_no_number() -> None:
    keys = np.array([[0, 1], [1, 2], [2, -1]], dtype=np.int32)
    found = map_of(words(3), raw=np.full((1, 3, 2), 0.5, np.float32), band_keys=keys, form="windowed")
    drawn = Drawn(found.to_svg())
    grey = cells(drawn, 3, 3) == "#d9dce1"
    np.testing.assert_array_equal(grey, found.outside)
    assert len([text for text in drawn.texts if text == "50"]) == 5
    assert any("outside the window" in text for text in drawn.texts)


def test_weights_below_zero_have_another_colour_and_the_scale_names_them() -> None:
    found = map_of(("a", "b"), raw=np.array([[[1.0, -0.5], [0.5, 0.0]]], np.float32), form="linear")
    drawn = Drawn(found.to_svg())
    filled = cells(drawn, 2, 2)
    red, _, blue = (int(filled[0, 1][at : at + 2], 16) for at in (1, 3, 5))
    assert blue > red
    assert filled[0, 0] == css(RAMP[-1])
    assert "-0.5" in drawn.texts


def test_patches_are_drawn_as_in_the_image() -> None:
    columns = tuple(Token(index, f"p{index}") for index in range(6))
    weights = np.zeros((1, 2, 6), dtype=np.float32)
    weights[0, 1, 5] = 1
    found = map_of(("a", "dog"), words(6), key_tokens=columns, raw=weights, grids={"source_seq": PatchGrid(2, 3)})
    drawn = Drawn(found.to_svg())
    panels = [group for group in drawn.of("g") if "scale" in group.get("transform", "")]
    assert len(panels) == 2
    assert [path.get("d") for path in panels[1].iter(f"{SVG}path")] == ["M2 1h1v1h-1z"]
    assert "The word above a panel looks at its patches." in drawn.texts


def test_text_of_other_scripts_is_unchanged(shared_server: FakeServer) -> None:
    with Client(shared_server.target) as client:
        found = client.infer("fake", "Käufer übernimmt 責任 🙂", attention=True).attention[0]
    assert {"責任", "Käufer"} <= set(Drawn(found.to_svg()).texts)


def test_a_notebook_draws_a_drawing_and_stores_short_maps_as_svg() -> None:
    found = map_of(words(5))
    drawing = found.to_svg("arcs")
    assert drawing._repr_svg_() == str(drawing) == drawing
    assert repr(drawing) == f"<SVG of {len(drawing)} characters>"
    assert found._repr_svg_() == found.to_svg()
    assert map_of(words(101))._repr_svg_() is None
    scores = map_of(words(3), values="scores")
    assert scores._repr_svg_() is None
    with pytest.raises(ValueError, match="holds scores"):
        scores.to_svg()


def test_unknown_views_and_maps_that_are_too_large_are_refused() -> None:
    with pytest.raises(ValueError, match="view is 'fan'; it must be one of heatmap, bipartite, arcs"):
        map_of(words(3)).to_svg("fan")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a heatmap of 700 x 700 cells is beyond 360000; select fewer `queries`"):
        map_of(words(700)).to_svg()


def test_a_caption_can_be_chosen_and_left_out() -> None:
    assert "Figure 1" in Drawn(map_of(words(3)).to_svg(caption="Figure 1")).texts
    bare = Drawn(map_of(words(3)).to_svg(caption=""))
    assert bare.title not in bare.texts
    assert bare.title


@pytest.mark.parametrize("share", [step / 20 for step in range(-20, 21)])
def test_numbers_have_a_contrast_of_at_least_four_and_a_half(share: float) -> None:
    """Source: WCAG 2.2, success criterion 1.4.3."""

    def luminance(rgb: tuple[int, ...]) -> float:
        linear = [
            part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in (c / 255 for c in rgb)
        ]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    background = colour(share)
    ink = 0.0 if ink_on(background) == "#000000" else 1.0
    low, high = sorted((luminance(background), ink))
    assert (high + 0.05) / (low + 0.05) >= 4.5
