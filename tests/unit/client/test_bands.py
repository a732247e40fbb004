"""Windowed maps: the received band, its weights over all keys, and how it is drawn.

A band lists which key each column of each query is; -1 is no key. `results_of` raises BadAnswer for a band that does
not fit its map. One test draws a figure and needs matplotlib.
"""

from __future__ import annotations

import base64
import json
import re

import numpy as np
import pytest
from attnserve.v1 import attention_pb2
from attnserve.v1 import inference_service_pb2 as wire
from attnserve_client import AttentionMap, AttentionSelection, Client, Token
from attnserve_client._results import results_of
from attnserve_client._tensors import to_tensor
from attnserve_client.cli._heatmap import heatmap
from attnserve_client.errors import BadAnswer
from attnserve_client.testing import FakeServer
from rich.console import Console

TEXT = "one two three four five"
TOKENS = tuple(Token(index, text) for index, text in enumerate("abc"))
KEYS = np.array([[-1, 0, 1], [2, 1, 0], [1, 2, -1]], dtype=np.int32)
BAND = np.array([[[0.0, 0.75, 0.25], [0.25, 0.5, 0.25], [0.5, 0.5, 0.0]]], dtype=np.float32)


def banded(raw=BAND, **fields):
    return AttentionMap(
        sites=("encoder.0",),
        layer=0,
        kind="self",
        form="windowed",
        heads=(0,),
        query_axis="seq",
        key_axis="seq",
        query_tokens=TOKENS,
        key_tokens=TOKENS,
        raw=raw,
        band_keys=KEYS,
        **fields,
    )


def wire_map(keys=KEYS, raw=BAND):
    message = attention_pb2.AttentionMap(
        sites=["encoder.0"],
        kind=attention_pb2.ATTENTION_KIND_SELF,
        form=attention_pb2.ATTENTION_FORM_WINDOWED,
        heads=[0],
        query_axis="seq",
        key_axis="seq",
    )
    message.weights.CopyFrom(to_tensor("", raw))
    message.band_keys.CopyFrom(to_tensor("", keys))
    axes = [attention_pb2.AxisUnits(axis="seq", length=3, texts=["a", "b", "c"])]
    sequence = wire.SequenceResult(attention=attention_pb2.Attention(axes=axes, maps=[message]))
    [result] = results_of(wire.InferResponse(results=[sequence]), 1, validate_only=False)
    return result.attention[0]


def test_band_is_kept_and_scattered_on_access():
    [each] = [wire_map()]
    np.testing.assert_array_equal(each.band, BAND)
    np.testing.assert_array_equal(each.band_keys, KEYS)
    np.testing.assert_array_equal(each.weights, [[[0.75, 0.25, 0], [0.25, 0.5, 0.25], [0, 0.5, 0.5]]])
    np.testing.assert_array_equal(each.outside, [[False, False, True], [False] * 3, [True, False, False]])


def test_uint8_band_is_decoded_to_weights():
    each = banded(np.rint(BAND * 255).astype(np.uint8))
    np.testing.assert_allclose(each.weights.sum(axis=2), 1, atol=3 / 510)  # each of a row's weights is off by 1/510
    np.testing.assert_allclose(each.band, BAND, atol=1 / 510)


def test_dense_map_has_no_band():
    with FakeServer() as server, Client(server.target) as client:
        [each, *_] = client.infer("fake", TEXT, attention=True).attention
    assert each.band is None
    assert each.band_keys is None
    assert each.outside is None


@pytest.mark.parametrize(
    ("keys", "fault"),
    [
        (KEYS[:2], "shape"),
        (KEYS.astype(np.int64), "int64"),
        (KEYS + 1, "-1 to 2"),
        (KEYS - 1, "-1 to 2"),
        (KEYS[:, :2], "3 queries and 2 keys"),
    ],
)
def test_inconsistent_band_is_a_bad_answer(keys, fault):
    with pytest.raises(BadAnswer, match=fault):
        wire_map(keys)


def test_links_of_a_band_equal_those_of_the_scattered_map():
    with FakeServer(window=1) as server, Client(server.target) as client:
        [each, *_] = client.infer("fake", TEXT, attention=True).attention
    dense = AttentionMap(
        **{name: getattr(each, name) for name in ("sites", "layer", "kind", "form", "heads", "query_axis", "key_axis")},
        query_tokens=each.query_tokens,
        key_tokens=each.key_tokens,
        raw=each.weights,
    )
    for choice in ({}, {"top": None}, {"include_self": False}, {"exclude_special": False}, {"head": 2, "top": 3}):
        assert each.links(**choice) == dense.links(**choice)


def test_equal_links_are_sorted_by_key():
    assert [(link.query, link.key) for link in banded().links(top=4, include_self=True)] == [
        ("a", "a"),
        ("b", "b"),
        ("c", "b"),
        ("c", "c"),
    ]


@pytest.mark.parametrize(
    "selection",
    [AttentionSelection(), AttentionSelection(queries=[1, -1]), AttentionSelection(heads="mean", dtype="uint8")],
)
def test_fake_server_returns_bands_for_windowed_sites(selection):
    with FakeServer(window=2) as server, Client(server.target) as client:
        result = client.infer("fake", TEXT, attention=selection)
        assert {site.form for site in client.model("fake").sites} == {"windowed"}
    for each in result.attention:
        assert each.form == "windowed"
        assert each.band.shape[1:] == each.band_keys.shape == (len(each.query_tokens), 5)
        np.testing.assert_allclose(each.band.sum(axis=2), 1, atol=5 / 510)  # of bytes; float32 is far closer


def test_fake_server_returns_whole_rows_where_a_reduction_needs_them():
    with FakeServer(window=1) as server, Client(server.target) as client:
        for selection in (
            AttentionSelection(unit="word"),
            AttentionSelection(special_tokens="drop"),
            AttentionSelection(layer_reduction="rollout"),
        ):
            assert {each.band is None for each in client.infer("fake", TEXT, attention=selection).attention} == {True}
        [links, *_] = client.infer("fake", TEXT, attention=AttentionSelection(top_k=9)).attention
    assert np.diff(links.raw.row_offsets).max() == 3  # a row has no more keys than its window


def test_to_dict_has_the_band_and_its_keys():
    plain = json.loads(json.dumps(banded().to_dict()))
    assert plain["band_keys"] == KEYS.tolist()
    assert np.shape(plain["weights"]) == (1, 3, 3)
    assert plain["weights"] == BAND.tolist()


def test_page_has_one_bit_for_each_cell_outside_the_window():
    page = banded().to_html()
    [data] = re.findall(r'id="map">(.*?)</script>', page)
    bits = np.unpackbits(np.frombuffer(base64.b64decode(json.loads(data)["outside"]), np.uint8))[:9]
    assert bits.reshape(3, 3).astype(bool).tolist() == banded().outside.tolist()


def test_figure_masks_cells_outside_the_window():
    image = banded().plot().axes[0].images[0]
    np.testing.assert_array_equal(np.ma.getmaskarray(image.get_array()), banded().outside)


def test_terminal_marks_cells_outside_the_window():
    each = banded()
    console = Console(width=60, color_system=None)
    lines = [line.plain for line in heatmap(each, each.head_weights(), console)]
    assert [line.count("·") for line in lines[1:4]] == [1, 0, 1]
    assert lines[-1] == "· outside the window"
