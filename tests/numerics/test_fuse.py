"""Fused graphs give the answers of their sources, and their taps the weights of the definition.

Fusing replaces the nodes of attention by one operator. `Plain` makes a source graph by its form, and the weights in
float64. A tap is what returns a site's weights. A site is a place in a graph that computes attention.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from attnserve_server.conversion.graphs.reading import checked
from attnserve_server.conversion.rewrite.fuse.candidates import ATTENTION, MULTI_HEAD, candidates
from attnserve_server.conversion.rewrite.taps import tapped
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_graphs import MASKS, OPSETS, SCALES, TURNS, Array, Plain

# float32 sums in another order; float16 keeps eleven bits.
TOLERANCES = {np.float32: 1e-5, np.float16: 1e-2}


def is_plain(masks: tuple[str, ...]) -> bool:
    """Return whether there is only one fill and no bias is added to it.

    Otherwise a fill that is not very low changes the weights of hidden rows.
    """
    low = masks.index("chosen inverted") if "chosen inverted" in masks else len(masks)
    added = {"lowest", "minus infinity", "-1e4", "bias"} & set(masks[low:])
    return not added and not {"chosen", "chosen inverted"} <= set(masks)


plain = st.builds(
    Plain,
    opset=st.sampled_from(OPSETS),
    scale=st.sampled_from(SCALES),
    divides=st.booleans(),
    turn=st.sampled_from(TURNS),
    masks=st.lists(st.sampled_from(MASKS), max_size=2, unique=True).map(tuple).filter(is_plain),
    guard=st.sampled_from(("", "Identity", "Dropout")),
    cross=st.booleans(),
    packed=st.booleans(),
    shapes_computed=st.booleans(),
)


def session(model: onnx.ModelProto) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def fused(case: Plain, operator: str) -> onnx.ModelProto:
    (found,) = [each for each in candidates(checked(case.model(), "plain")) if each.operator == operator]
    assert found.sites == 1
    assert "Softmax" not in {node.op_type for node in found.proto.graph.node}
    return found.proto


def answers(model: onnx.ModelProto, feeds: dict[str, Array]) -> Array:
    return np.asarray(session(model).run(["answer"], feeds)[0], np.float64)


def worst(found: Array, expected: Array) -> float:
    """Return the greatest difference; rows in which the source is NaN (minus infinity hides every key) do not count."""
    return float(np.abs(np.where(np.isnan(expected), 0, found - expected)).max())


def weights_of(model: onnx.ModelProto, feeds: dict[str, Array]) -> Array:
    """Return the weights of all rows from the tap."""
    tapped_model, sites = tapped(model)
    (name,) = sites
    items = {f"attention_items.{name}": np.arange(len(feeds["queries"]))}
    return np.asarray(session(ir.to_proto(tapped_model)).run([f"attention.{name}"], {**feeds, **items})[0])


@settings(max_examples=60)
@given(case=plain, shape=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)), hide_all=st.booleans())
def test_every_plain_form_is_fused_and_gives_the_same_answers(
    case: Plain, shape: tuple[int, int, int], *, hide_all: bool
) -> None:
    # -1e4 leaves the scores of fully hidden rows without their last ten bits.
    feeds = case.feeds(*shape, hide_all=hide_all and "-1e4" not in case.masks)
    rewritten = fused(case, ATTENTION)
    assert worst(answers(rewritten, feeds), answers(case.model(), feeds)) < TOLERANCES[np.float32]


@settings(max_examples=40)
@given(case=plain, shape=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)))
def test_tap_of_a_fused_site_gives_the_weights_of_the_definition(case: Plain, shape: tuple[int, int, int]) -> None:
    feeds = case.feeds(*shape)
    found = weights_of(fused(case, ATTENTION), feeds)
    assert np.abs(found - case.reference(feeds)).max() < TOLERANCES[np.float32]


@settings(max_examples=15)
@given(case=plain, hide_all=st.booleans())
def test_multi_head_attention_gives_the_same_answers(case: Plain, *, hide_all: bool) -> None:
    feeds = case.feeds(2, 5, 6, hide_all=hide_all and "-1e4" not in case.masks)
    assert worst(answers(fused(case, MULTI_HEAD), feeds), answers(case.model(), feeds)) < TOLERANCES[np.float32]


@pytest.mark.parametrize("masks", [("minus infinity",), ("chosen minus infinity",), ("lowest",), ("chosen", "bias")])
@pytest.mark.parametrize("opset", [13, 23])
def test_guard_against_fully_hidden_rows_is_kept_by_the_operator(masks: tuple[str, ...], opset: int) -> None:
    case = Plain(masks=masks, opset=opset, guard="not a number")
    feeds = case.feeds(3, 6, 6, hide_all=True)
    expected = answers(case.model(), feeds)
    assert not np.isnan(expected).any()
    assert worst(answers(fused(case, ATTENTION), feeds), expected) < TOLERANCES[np.float32]


def test_multi_head_attention_is_not_offered_where_it_would_lose_the_guard() -> None:
    model = checked(Plain(masks=("minus infinity",), guard="not a number").model(), "plain")
    assert [each.operator for each in candidates(model)] == [ATTENTION]


@pytest.mark.parametrize("masks", [(), ("lowest",), ("chosen",), ("bias", "minus infinity")])
def test_float16_is_fused_within_its_tolerance(masks: tuple[str, ...]) -> None:
    case = Plain(masks=masks, dtype=np.float16)
    feeds = case.feeds(2, 7, 7)
    rewritten = fused(case, ATTENTION)
    assert worst(answers(rewritten, feeds), answers(case.model(), feeds)) < TOLERANCES[np.float16]
    assert np.abs(weights_of(rewritten, feeds) - case.reference(feeds)).max() < TOLERANCES[np.float16]


def test_fused_graph_takes_any_batch_and_length(tmp_path: Path) -> None:
    case = Plain(masks=("lowest", "causal"), cross=True)
    rewritten = session(fused(case, ATTENTION))
    for shape in ((1, 1, 1), (4, 3, 17), (2, 150, 2)):
        feeds = case.feeds(*shape)
        found = np.asarray(rewritten.run(["answer"], feeds)[0])
        assert worst(found, answers(case.model(), feeds)) < TOLERANCES[np.float32]


@pytest.mark.parametrize("masks", [(), ("causal",)])
@pytest.mark.parametrize("scale", ["none", "scores"])
@pytest.mark.parametrize("packed", [True, False])
def test_operator_on_split_heads_gets_the_packed_ones(masks: tuple[str, ...], scale: str, packed: bool) -> None:
    case = Plain(opset=23, operator=True, masks=masks, scale=scale, packed=packed, cross=not masks)
    feeds = case.feeds(2, 6, 9)
    (found,) = candidates(checked(case.model(), "split"))
    (node,) = [node for node in found.proto.graph.node if node.op_type == "Attention"]
    assert {attribute.name: attribute.i for attribute in node.attribute}.items() >= {"q_num_heads": 4}.items()
    turned = sum(node.op_type == "Transpose" for node in found.proto.graph.node)
    assert turned == (0 if packed else 1)
    assert worst(answers(found.proto, feeds), answers(case.model(), feeds)) < TOLERANCES[np.float32]
    assert np.abs(weights_of(found.proto, feeds) - case.reference(feeds)).max() < TOLERANCES[np.float32]
    # The result cannot be rewritten again.
    assert list(candidates(found.proto)) == []
