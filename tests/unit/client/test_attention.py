"""Attention maps: weights, links, tokens, and the checks of received maps.

A link is one weight with its query and its key. Maps come from the fake server, or are made by hand to contradict
themselves: `results_of` then raises BadAnswer.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from attnserve.v1 import attention_pb2, tensor_pb2
from attnserve.v1 import inference_service_pb2 as wire
from attnserve_client import AttentionMap, AttentionSelection, Client
from attnserve_client._results import results_of
from attnserve_client._tensors import to_tensor
from attnserve_client.data_types import RawLinks
from attnserve_client.errors import BadAnswer
from attnserve_client.testing import FakeServer

TEXT = "The wonderful buyer agrees"
# float32 sums of rows of at most ten weights.
SUM_TOLERANCE = 1e-5


def map_from(server: FakeServer, *inputs: Any, **selection: Any) -> AttentionMap:
    with Client(server.target) as client:
        one = inputs if len(inputs) == 2 else inputs[0] if inputs else TEXT
        return client.infer("fake", one, attention=AttentionSelection(**selection)).attention[-1]


def test_rows_sum_to_one_and_columns_have_tokens(shared_server: FakeServer) -> None:
    found = map_from(shared_server)
    assert found.weights.shape == (4, 7, 7)
    np.testing.assert_allclose(found.weights.sum(axis=-1), 1.0, rtol=0, atol=SUM_TOLERANCE)
    assert [token.text for token in found.tokens] == [
        "[CLS]",
        "The",
        "wonder",
        "##ful",
        "buyer",
        "agrees",
        "[SEP]",
    ]
    third = found.query_tokens[2]
    assert TEXT[third.start : third.end] == third.text == "wonder"
    assert found.key_tokens[0].special
    assert found.axis_tokens["seq"] == found.key_tokens
    assert found.title == "layer 1 (layer.1), 4 heads"


def test_words_have_the_text_and_positions_of_the_input(shared_server: FakeServer) -> None:
    found = map_from(shared_server, unit="word", special_tokens="drop", heads="mean")
    assert [token.text for token in found.tokens] == ["The", "wonderful", "buyer", "agrees"]
    assert [TEXT[token.start : token.end] for token in found.tokens] == ["The", "wonderful", "buyer", "agrees"]
    assert [token.index for token in found.tokens] == [1, 2, 3, 4]
    np.testing.assert_allclose(found.weights.sum(axis=-1), 1.0, rtol=0, atol=SUM_TOLERANCE)
    assert found.is_joined
    assert found.title == "layer 1 (layer.1), 4 heads joined"


def test_tokens_of_a_pair_have_their_segment(shared_server: FakeServer) -> None:
    found = map_from(shared_server, "one", "two")
    assert [token.segment for token in found.tokens if not token.special] == [0, 1]


def test_tokens_of_ids_have_the_id_as_text(shared_server: FakeServer) -> None:
    assert [token.text for token in map_from(shared_server, [7, 8]).tokens] == ["7", "8"]


# Half a step of each type: float16 has 11 bits, uint8 steps of 1/255.
@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 2**-12), ("uint8", 1 / 510 + 1e-7)])
def test_small_dtypes_are_decoded_to_float32(shared_server: FakeServer, dtype: Any, tolerance: float) -> None:
    exact, rounded = map_from(shared_server), map_from(shared_server, dtype=dtype)
    assert rounded.raw.dtype == np.dtype(dtype)
    assert rounded.weights.dtype == np.float32
    assert not rounded.weights.flags.writeable
    np.testing.assert_allclose(rounded.weights, exact.weights, rtol=0, atol=tolerance)


@pytest.mark.parametrize("selection", [{}, {"special_tokens": "drop"}, {"queries": [2, -1]}, {"unit": "word"}])
def test_links_scatter_to_the_strongest_weights_of_the_full_map(
    shared_server: FakeServer, selection: dict[str, Any]
) -> None:
    full = map_from(shared_server, **selection)
    sparse = map_from(shared_server, top_k=3, **selection)
    assert isinstance(sparse.raw, RawLinks)
    assert sparse.is_sparse
    assert not full.is_sparse
    threshold = np.sort(full.weights, axis=-1)[..., -3:-2]
    expected = np.where(full.weights >= threshold, full.weights, 0)
    np.testing.assert_array_equal(sparse.weights, expected)
    np.testing.assert_allclose(sparse.residual, full.weights.sum(-1) - expected.sum(-1), rtol=0, atol=SUM_TOLERANCE)


def test_min_weight_keeps_weights_of_at_least_that(shared_server: FakeServer) -> None:
    full, sparse = map_from(shared_server), map_from(shared_server, min_weight=0.2, dtype="uint8")
    assert np.array_equal(sparse.weights > 0, full.weights >= 0.2)


def test_links_are_sorted_and_omit_special_tokens(shared_server: FakeServer) -> None:
    found = map_from(shared_server)
    links = found.links(top=5)
    assert [link.weight for link in links] == sorted((link.weight for link in links), reverse=True)
    assert not any(link.query_token.special or link.key_token.special for link in links)
    first = links[0]
    assert first.head is not None
    assert first.weight == found.weights[first.head, first.query_token.index, first.key_token.index]
    assert (first.query, first.key) == (first.query_token.text, first.key_token.text)
    inner = found.weights[:, 1:-1, 1:-1]
    assert first.weight == inner[:, ~np.eye(inner.shape[1], dtype=bool)].max()


def test_links_filter_by_head_special_tokens_and_self(shared_server: FakeServer) -> None:
    found = map_from(shared_server)
    everything = found.links(top=None, exclude_special=False, head=2, include_self=True)
    assert len(everything) == found.weights.shape[1] ** 2
    assert {link.head for link in everything} == {2}
    others = found.links(top=None, exclude_special=False)
    assert all(link.query_token != link.key_token for link in others)
    assert found.links(top=0) == []


def test_links_of_punctuation_can_be_excluded(shared_server: FakeServer) -> None:
    with Client(shared_server.target) as client:
        found = client.infer("fake", "Stop, now!", attention=True).attention[0]
    assert {",", "!"} <= {link.key for link in found.links(top=None, exclude_punctuation=False)}
    words = found.links(top=None)
    assert words
    assert {text for link in words for text in (link.query, link.key)} == {"Stop", "now"}


def test_missing_head_raises_an_error_that_lists_the_heads(shared_server: FakeServer) -> None:
    chosen, joined = map_from(shared_server, heads=[1, 3]), map_from(shared_server, heads="max")
    assert chosen.heads == (1, 3)
    np.testing.assert_array_equal(chosen.head_weights(3), chosen.weights[1])
    with pytest.raises(ValueError, match="head 0 is not in this map, which has heads 1, 3"):
        chosen.links(head=0)
    with pytest.raises(ValueError, match="joined"):
        joined.head_weights(1)
    assert joined.links()[0].head is None


def test_joined_layers_list_all_their_sites(shared_server: FakeServer) -> None:
    rollout = map_from(shared_server, layer_reduction="rollout")
    assert rollout.layer == -1
    assert rollout.sites == ("layer.0", "layer.1")
    assert rollout.title == "2 layers joined, 4 heads joined"
    np.testing.assert_allclose(rollout.weights.sum(axis=-1), 1.0, rtol=0, atol=SUM_TOLERANCE)


def test_to_dict_has_tokens_weights_and_residual(shared_server: FakeServer) -> None:
    plain = map_from(shared_server, top_k=2).to_dict()
    assert plain["keys"][2] == {"index": 2, "text": "wonder", "start": 4, "end": 10, "special": False, "segment": 0}
    assert np.shape(plain["weights"]) == (4, 7, 7)
    assert np.shape(plain["residual"]) == (4, 7)


def answer(**changes: Any) -> wire.InferResponse:
    """An answer with one map of 1 head, 2 queries and 2 keys, with some of its fields changed."""
    axis = changes.pop("axis", {"axis": "seq", "length": 2, "texts": ["a", "b"]})
    fields = {
        "sites": ["s"],
        "heads": [0],
        "query_axis": "seq",
        "key_axis": "seq",
        "weights": to_tensor("", np.ones((1, 2, 2), dtype=np.float32)),
        **changes,
    }
    attention = attention_pb2.Attention(
        axes=[attention_pb2.AxisUnits(**axis)], maps=[attention_pb2.AttentionMap(**fields)]
    )
    return wire.InferResponse(
        results=[wire.SequenceResult(attention=attention)], receipt=wire.Receipt(request_id="mine")
    )


def links(offsets: list[int], keys: list[int], weights: list[float], residual: Any) -> attention_pb2.Links:
    return attention_pb2.Links(
        row_offsets=to_tensor("", np.array(offsets, dtype=np.int64)),
        keys=to_tensor("", np.array(keys, dtype=np.int32)),
        weights=to_tensor("", np.array(weights, dtype=np.float32)),
        residual=to_tensor("", np.array(residual, dtype=np.float32)),
    )


def test_well_formed_maps_pass_the_checks() -> None:
    assert results_of(answer(), 1, validate_only=False)[0].attention[0].kind == "unknown"
    sparse = answer(links=links([0, 1, 2], [1, 0], [0.5, 0.25], [[0.5, 0.75]]))
    (found,) = results_of(sparse, 1, validate_only=False)[0].attention
    assert found.weights.tolist() == [[[0, 0.5], [0.25, 0]]]


@pytest.mark.parametrize(
    "changes",
    [
        {"axis": {"axis": "seq", "length": 2, "texts": ["a"]}},
        {"key_axis": "other"},
        {"key_indices": [5, 6]},
        {"weights": to_tensor("", np.ones((1, 2, 3), dtype=np.float32))},
        {"weights": to_tensor("", np.ones((3, 2, 2), dtype=np.float32))},
        {"weights": tensor_pb2.Tensor(dtype=tensor_pb2.DATA_TYPE_FLOAT32, data=b"1234")},
        {"links": links([0, 1, 2], [1, 7], [0.5, 0.5], [[0, 0]])},
        {"links": links([0, 2, 1], [1, 0], [0.5, 0.5], [[0, 0]])},
        {"links": links([0, 1, 3], [1, 0], [0.5, 0.5], [[0, 0]])},
        {"links": links([0, 1, 2], [1, 0], [0.5, 0.5], [[0, 0, 0]])},
        {"links": links([0, 1, 2], [1, 0], [0.5, 0.5], [0, 0])},
        {"links": links([], [], [], [[0, 0]])},
    ],
)
def test_inconsistent_map_is_a_bad_answer(changes: dict[str, Any]) -> None:
    with pytest.raises(BadAnswer) as caught:
        results_of(answer(**changes), 1, validate_only=False)
    assert caught.value.request_id == "mine"
