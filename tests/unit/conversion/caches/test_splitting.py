"""Which inputs are recognised as a cache, and the graph of whole sequences that is made without them.

A cache holds the keys and values of a decoder's earlier positions. `decoder_of` returns the two graphs of a decoder
with a cache, and None for a graph without one. It raises BuildRefused for a file that takes the encoder's keys as
inputs.
"""

from __future__ import annotations

import onnx
import pytest
from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.caches.splitting import decoder_of
from attnserve_server.conversion.graphs.reading import checked
from cache_graphs import HEAD_DIM, HEADS, NEW, PAST, TOTAL, CachedDecoder
from crossed_caches import KEPT, CrossedDecoder
from genai_graphs import HEAD_DIM as SIZE_OF_HEADS
from genai_graphs import KV_HEADS, GroupedDecoder
from onnx import TensorProto, helper

GROUPED = [GroupedDecoder(), GroupedDecoder(int4=True, packed=True), GroupedDecoder(normed=True)]


def test_a_cache_is_described_by_its_tensors_and_axes() -> None:
    decoder = decoder_of(checked(CachedDecoder(layers=1).model(), "decoder.onnx"), "decoder.onnx")
    assert decoder is not None
    cache = decoder.cache
    assert (cache.past_axis, cache.new_axis, cache.total_axis) == (PAST, NEW, TOTAL)
    assert (cache.masks, cache.positions) == (("attention_mask",), "position_ids")
    assert [(past.name, past.present, past.shape, past.axis, past.dtype) for past in cache.pasts] == [
        (f"past_key_values.0.{kind}", f"present.0.{kind}", (HEADS, PAST, HEAD_DIM), 1, "float32")
        for kind in ("key", "value")
    ]


@pytest.mark.parametrize("total", [TOTAL, "total_sequence_length"])
def test_the_graph_of_whole_sequences_has_no_cache_and_one_axis(total: str) -> None:
    decoder = decoder_of(checked(CachedDecoder(total=total).model(), "decoder.onnx"), "decoder.onnx")
    assert decoder is not None
    prompt = decoder.prompt.graph
    assert [value.name for value in prompt.input] == ["input_ids", "attention_mask", "position_ids"]
    assert [[axis.dim_param for axis in value.type.tensor_type.shape.dim] for value in prompt.input] == [
        ["batch_size", NEW]
    ] * 3
    assert [node.op_type for node in prompt.node if "past_key_values" in "".join(node.input)] == []
    assert [value.name for value in decoder.continuing.graph.input if "past" in value.name] == [
        past.name for past in decoder.cache.pasts
    ]


def joined(
    *,
    rank: int = 4,
    length: str | int = "frames",
    attended: bool = True,
    returned: bool = True,
    first: bool = True,
    name: str = "buffer",
) -> onnx.ModelProto:
    """A float input that is joined with projected features along the axis before the last."""
    features = ["batch", 2, "new", 4][-rank:]
    buffer = [*features[:-2], length, features[-1]]
    turn = [*range(rank - 2), rank - 1, rank - 2]
    node = helper.make_node
    nodes = [
        node("Tanh", ["features"], ["made"]),
        node("Concat", [name, "made"] if first else ["made", name], ["longer"], axis=rank - 2),
        node("Transpose", ["longer"], ["turned"], perm=turn),
        node("MatMul", ["made", "turned"], ["scores"]) if attended else node("Neg", ["longer"], ["scores"]),
    ]
    inputs = [
        helper.make_tensor_value_info(each, TensorProto.FLOAT, shape)
        for each, shape in ((name, buffer), ("features", features))
    ]
    names = ["scores", "longer"] if returned else ["scores"]
    outputs = [helper.make_tensor_value_info(each, TensorProto.FLOAT, [None] * rank) for each in names]
    graph = helper.make_graph(nodes, "joined", inputs, outputs)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


@pytest.mark.parametrize(
    ("changes", "is_cache"),
    [
        ({}, True),
        ({"returned": False}, False),
        ({"attended": False}, False),
        ({"first": False}, False),
        ({"length": 3}, False),
        ({"rank": 2}, False),
        ({"returned": False, "name": "past_key.0"}, True),
        ({"attended": False, "name": "past_key.0"}, True),
        ({"attended": False, "returned": False, "name": "past_key.0"}, False),
    ],
    ids=[
        *("attended and returned", "not returned", "not attended", "behind the new ones", "fixed length", "two axes"),
        *("named and attended", "named and returned", "named alone"),
    ],
)
def test_a_cache_is_a_tensor_of_any_length_that_is_joined_and_returned(changes: dict, is_cache: bool) -> None:
    found = decoder_of(onnx.shape_inference.infer_shapes(joined(**changes)), "joined.onnx")
    assert (found is not None) is is_cache


@pytest.mark.parametrize("cached_first", [True, False])
def test_the_branches_of_a_merged_file_are_two_graphs(cached_first: bool) -> None:
    file = checked(CrossedDecoder().merged(cached_first=cached_first), "merged.onnx")
    decoder = decoder_of(file, "merged.onnx")
    assert decoder is not None
    shared = ["encoder_attention_mask", "input_ids"]
    assert [value.name for value in decoder.prompt.graph.input] == [*shared, "encoder_hidden_states"]
    pasts = [past.name for past in decoder.cache.pasts]
    assert pasts == [f"past_key_values.0.{kind}" for kind in KEPT]
    assert [value.name for value in decoder.continuing.graph.input] == [*shared, *pasts]
    assert [(past.crossed, past.present) for past in decoder.cache.pasts] == [
        ("encoder" in kind, f"present.0.{kind}") for kind in KEPT
    ]
    # The branch with a cache computes no keys of the encoder: its outputs of them are a constant.
    presents = [f"present.0.{kind}" for kind in KEPT]
    assert [value.name for value in decoder.prompt.graph.output] == ["logits", *presents]
    assert [value.name for value in decoder.continuing.graph.output] == ["logits", *presents[:2]]


def test_a_decoder_that_takes_the_encoders_keys_is_refused() -> None:
    file = checked(CrossedDecoder().apart(cached=True), "decoder_with_past_model.onnx")
    with pytest.raises(BuildRefused, match=r"'past_key_values.0.encoder.key' holds keys or values of an encoder"):
        decoder_of(file, "decoder_with_past_model.onnx")


def test_a_decoder_without_a_cache_stays_as_it_is() -> None:
    assert decoder_of(checked(CrossedDecoder().apart(cached=False), "decoder.onnx"), "decoder.onnx") is None


@pytest.mark.parametrize("case", GROUPED)
def test_head_sizes_that_the_file_only_names_become_numbers(case: GroupedDecoder) -> None:
    decoder = decoder_of(checked(case.model(), "model.onnx"), "model.onnx")
    assert decoder is not None
    assert {past.shape for past in decoder.cache.pasts} == {(KV_HEADS, PAST, SIZE_OF_HEADS)}
    for graph in (decoder.prompt.graph, decoder.continuing.graph):
        sizes = {value.type.tensor_type.shape.dim[3].dim_value for value in graph.output if "present" in value.name}
        assert sizes == {SIZE_OF_HEADS}


def test_heads_leave_the_batch_axis_of_a_cache() -> None:
    decoder = decoder_of(checked(CachedDecoder(layers=1, form="folded").model(), "model.onnx"), "model.onnx")
    assert decoder is not None
    assert [(past.shape, past.axis) for past in decoder.cache.pasts] == [
        ((HEADS, HEAD_DIM, PAST), 2),
        ((HEADS, PAST, HEAD_DIM), 1),
    ]
    inputs = {value.name: value.type.tensor_type.shape.dim for value in decoder.continuing.graph.input}
    assert [len(inputs[past.name]) for past in decoder.cache.pasts] == [4, 4]
    assert {inputs[past.name][0].dim_param for past in decoder.cache.pasts} == {"batch_size"}
