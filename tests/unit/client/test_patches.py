"""Maps over the patches of an image, arranged as in the image: as arrays, on a terminal, a page and a figure.

`answer` makes a received map, whose sides named in `grids` are the patches of a 2 x 3 image. A grid that does not cover
its axis raises BadAnswer. Tests of figures need matplotlib.
"""

from __future__ import annotations

import io
import json
import re

import numpy as np
import pytest
from attnserve.v1 import attention_pb2
from attnserve_client import AttentionMap
from attnserve_client._results import _maps_of
from attnserve_client._tensors import to_tensor
from attnserve_client.cli._heatmap import heatmap
from attnserve_client.data_types import PatchGrid
from attnserve_client.errors import BadAnswer
from rich.console import Console

GRID = PatchGrid(2, 3, 1)
PATCHES = ["[0]", *(f"r{row} c{column}" for row in (1, 2) for column in (1, 2, 3))]
WORDS = ["a", "red", "dog"]


def answer(
    weights: np.ndarray, rows: list[str], columns: list[str], *, grids: str = "columns", **fields: object
) -> AttentionMap:
    """A received map of rows over columns; `grids` lists the sides that are patches."""

    def units(axis: str, texts: list[str], side: str) -> attention_pb2.AxisUnits:
        grid = {"grid_rows": 2, "grid_columns": 3, "leading": len(texts) - 6} if side in grids else {}
        special = [text.startswith("[") for text in texts]
        return attention_pb2.AxisUnits(axis=axis, length=len(texts), texts=texts, special=special, **grid)

    message = attention_pb2.Attention(
        axes=[units("seq", rows, "rows"), units("patches", columns, "columns")],
        maps=[
            attention_pb2.AttentionMap(
                sites=["cross"],
                kind=attention_pb2.ATTENTION_KIND_CROSS,
                form=attention_pb2.ATTENTION_FORM_DENSE,
                heads=range(len(weights)),
                query_axis="seq",
                key_axis="patches",
                weights=to_tensor("", weights.astype(np.float32)),
                **fields,
            )
        ],
    )
    (found,) = _maps_of(message, "clip", None, None)
    return found


def words_over_patches() -> AttentionMap:
    return answer(np.random.default_rng(0).dirichlet(np.ones(7), (2, 3)), WORDS, PATCHES)


def test_to_dict_has_the_image_grid() -> None:
    plain = json.loads(json.dumps(words_over_patches().to_dict()))
    assert plain["grids"] == {"patches": {"rows": 2, "columns": 3, "leading": 1}}


def test_panels_arrange_weights_as_in_the_image() -> None:
    found = words_over_patches()
    assert found.grids == {"patches": GRID}
    panels = found.over_patches(head=1)
    assert [panel.token.text for panel in panels] == WORDS
    np.testing.assert_array_equal(panels[2].weights, found.weights[1, 2, 1:].reshape(2, 3))
    np.testing.assert_array_equal(found.over_patches()[0].weights, found.weights.mean(0)[0, 1:].reshape(2, 3))


def test_unselected_patches_are_nan() -> None:
    found = answer(np.full((1, 3, 2), 0.5), WORDS, PATCHES, key_indices=[2, 6])
    np.testing.assert_array_equal(found.over_patches()[0].weights, [[np.nan, 0.5, np.nan], [np.nan, np.nan, 0.5]])


def test_queries_that_are_patches_give_a_panel_for_each_key() -> None:
    weights = np.random.default_rng(1).random((1, 7, 3))
    found = answer(weights, PATCHES, WORDS, grids="rows")
    assert [panel.token.text for panel in found.over_patches()] == WORDS
    np.testing.assert_allclose(found.over_patches()[1].weights, weights[0, 1:, 1].reshape(2, 3).astype(np.float32))


def test_grid_refuses_weights_without_units_and_units_behind_it() -> None:
    tokens = words_over_patches().key_tokens
    with pytest.raises(ValueError, match="zip"):
        GRID.lay_out(np.ones(2), tokens)
    with pytest.raises(IndexError):
        PatchGrid(1, 3, 1).lay_out(np.ones(7), tokens)


def test_map_without_patches_has_no_panels() -> None:
    assert answer(np.ones((1, 3, 7)) / 7, WORDS, PATCHES, grids="").over_patches() == []


def test_grid_that_does_not_cover_its_axis_is_a_bad_answer() -> None:
    units = attention_pb2.AxisUnits(axis="patches", length=5, grid_rows=2, grid_columns=3)
    with pytest.raises(BadAnswer, match="axis 'patches' has 5 units and a grid of 0 and 2 x 3 patches"):
        _maps_of(attention_pb2.Attention(axes=[units]), "clip", None, None)


@pytest.mark.slow
@pytest.mark.parametrize("count", [3, 40])
def test_figure_has_at_most_24_panels(count: int) -> None:
    words = [f"w{number}" for number in range(count)]
    figure = answer(np.random.default_rng(0).dirichlet(np.ones(7), (2, count)), words, PATCHES).plot()
    pictures = [axes for axes in figure.axes if axes.get_images() and axes.get_title()]
    assert len(pictures) == min(count, 24)
    assert all(axes.get_images()[0].get_array().shape == (2, 3) for axes in pictures)
    assert pictures[0].get_title() == "w0 looks at ..." or count > 24
    assert ("(24 of 40)" in figure.get_suptitle()) == (count > 24)
    figure.savefig(io.BytesIO(), format="png")


def test_terminal_shows_a_panel_for_each_word() -> None:
    weights = np.zeros((1, 3, 7))
    weights[0, 1, 6] = 1.0
    found = answer(weights, WORDS, PATCHES)
    console = Console(width=80, color_system=None)
    lines = [line.plain for line in heatmap(found, found.head_weights(), console)]
    assert re.fullmatch(r"a +red +dog *", lines[0])
    at = lines[0].index("red")
    assert lines[1].strip() == ""
    assert lines[2][at : at + 6] == "    @@"
    assert lines[-1].endswith("1.000")


def test_terminal_shows_at_most_12_panels() -> None:
    words = [f"w{number}" for number in range(30)]
    found = answer(np.full((1, 30, 7), 1 / 7), words, PATCHES)
    lines = [line.plain for line in heatmap(found, found.head_weights(), Console(width=40, color_system="truecolor"))]
    assert "12 of 30 units, those with the strongest links" in lines


def test_page_has_the_image_grid() -> None:
    (data,) = re.findall(r'id="map">(.*?)</script>', words_over_patches().to_html(), re.DOTALL)
    assert json.loads(data)["keyGrid"] == {"rows": 2, "columns": 3, "leading": 1}
    assert json.loads(data)["queryGrid"] is None


def test_cross_map_of_two_texts_has_rows_of_one_and_columns_of_the_other() -> None:
    found = answer(np.full((1, 2, 3), 1 / 3), ["ein", "Hund"], WORDS, grids="")
    axes = found.plot().axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["ein", "Hund"]
    assert [label.get_text() for label in axes.get_xticklabels()] == WORDS
    shown = [line.plain for line in heatmap(found, found.head_weights(), Console(width=80, color_system=None))]
    assert shown[0] == "columns: 0 a  1 red  2 dog"
    assert any(line.startswith("1 Hund") for line in shown)
