"""onnxruntime's `GroupQueryAttention` without a past, against the definition and its own output.

A tap is what conversion adds to a graph so that it returns attention weights. `GroupQuery` makes a graph of the
operator, and its weights in float64; `assert_equals_definition` runs both.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from attnserve_server.conversion.graphs.reading import checked
from attnserve_server.conversion.rewrite.taps import tapped
from hypothesis import given, settings
from hypothesis import strategies as st
from microsoft_graphs import LOWEST, GroupQuery
from microsoft_runs import FLOAT32_TOLERANCE, assert_equals_definition, run

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one head for each": {"kv_heads": 4},
    "one head for all": {"kv_heads": 1},
    "both ways": {"attributes": {"causal": 0}},
    "both ways and short": {"attributes": {"causal": 0}, "lengths": (3, 5)},
    "empty past": {"empty_past": True},
    "scale": {"attributes": {"scale": 0.3}},
    "softcap": {"attributes": {"softcap": 1.5}},
    "short": {"lengths": (2, 4)},
    "lengths in a column": {"lengths": (2, 4), "ends_shape": (2, 1)},
    "lengths in a row": {"lengths": (2, 4), "ends_shape": (1, 2)},
    "lengths of rank 3": {"lengths": (2, 4), "ends_shape": (2, 1, 1), "attributes": {"causal": 0}},
    "window of one": {"attributes": {"local_window_size": 1}},
    "window": {"attributes": {"local_window_size": 3}},
    "wide window": {"attributes": {"local_window_size": 9}},
    "rotated": {"rotary": 16},
    "half rotated": {"rotary": 16, "head_dim": 32},
    "neighbours rotated": {"rotary": 16, "attributes": {"rotary_interleaved": 1}},
    "rotated from further on": {"rotary": 16, "positions": np.array([[7, 8, 9, 10, 11], [0, 1, 2, 3, 4]])},
    "sinks": {"sink": True},
    "sinks and window": {"sink": True, "attributes": {"local_window_size": 2, "softcap": 1.5}},
    "one sink for all": {"attributes": {"smooth_softmax": 1}},
    "everything": {
        "sink": True,
        "rotary": 16,
        "head_dim": 32,
        "lengths": (3, 5),
        "bias": np.random.default_rng(4).normal(size=(2, 1, 5, 5)).astype(np.float32),
        "attributes": {"local_window_size": 2, "softcap": 2.0, "rotary_interleaved": 1},
    },
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_equal_the_definition(variant: str, packed: bool) -> None:
    case = GroupQuery(packed=packed, **VARIANTS[variant])
    assert_equals_definition(case, everywhere=variant != "everything")


@pytest.mark.parametrize("opset", [11, 13, 23])
@pytest.mark.parametrize("variant", ["plain", "everything"])
def test_every_opset_is_tapped(variant: str, opset: int) -> None:
    case = GroupQuery(opset=opset, packed=True, presents=True, **VARIANTS[variant])
    assert_equals_definition(case, everywhere=variant != "everything")


@pytest.mark.parametrize("variant", ["plain", "softcap", "window", "rotated"])
def test_float16_is_computed_in_float32(variant: str) -> None:
    assert_equals_definition(GroupQuery(dtype=np.float16, **VARIANTS[variant]))


@pytest.mark.parametrize("shape", [(2, 4), (1, 4), (2, 1), (1, 1)])
@pytest.mark.parametrize("lowest", [LOWEST, -np.inf])
def test_biases_are_added_and_rows_of_the_lowest_number_are_zeros(shape: tuple[int, int], lowest: float) -> None:
    rng = np.random.default_rng(5)
    bias = rng.normal(size=(*shape, 5, 5)).astype(np.float32)
    bias[bias < 0] = lowest
    bias[0, 0, 2] = lowest
    case = GroupQuery(bias=bias)
    assert not case.reference()[0, 0, 2].any()
    assert_equals_definition(case, everywhere=False)
    # The kernel that also returns the present gives 0 there; the other one gives the mean of the values, or NaN:
    # findings/group_query_connected_present.sh.
    assert_equals_definition(replace(case, presents=True))


def test_rows_of_sites_with_sinks_are_reported_not_to_sum_to_one() -> None:
    for case, whole in ((GroupQuery(), True), (GroupQuery(sink=True), False)):
        _, sites = tapped(checked(case.model(), "case"))
        assert [site.rows_sum_to_one for site in sites.values()] == [whole]
        (weights,) = run(case, [0, 1])
        assert (weights.sum(axis=-1).min() > 0.999) == whole


def test_rows_of_low_numbers_above_the_lowest_are_uniform() -> None:
    bias = np.full((1, 1, 5, 5), -2e38, np.float32)
    (weights,) = run(GroupQuery(bias=bias), [0, 1])
    even = np.tril(np.ones((5, 5))) / np.arange(1, 6)[:, None]
    np.testing.assert_allclose(weights, np.broadcast_to(even, weights.shape), rtol=0, atol=FLOAT32_TOLERANCE)
    _, output = run(GroupQuery(bias=bias), [], ("attention.attention_0", "output"))
    expected = GroupQuery(bias=bias).output_from(np.broadcast_to(even, weights.shape))
    np.testing.assert_allclose(output, expected, rtol=0, atol=5 * FLOAT32_TOLERANCE)


@pytest.mark.parametrize("shape", [(-1,), (2, 1), (1, 2)], ids=str)
def test_queries_behind_their_end_have_no_weights_under_a_window(shape: tuple[int, ...]) -> None:
    case = GroupQuery(lengths=(1, 5), ends_shape=shape, attributes={"local_window_size": 2})
    assert not case.reference()[0, :, 1:].any()
    assert_equals_definition(case, everywhere=False)


@pytest.mark.parametrize("items", [[], [1], [1, 0, 1]], ids=str)
@pytest.mark.parametrize("opset", [11, 17])
@pytest.mark.parametrize("variant", ["plain", "everything"])
def test_only_selected_rows_are_returned_in_their_order(variant: str, items: list[int], opset: int) -> None:
    case = GroupQuery(opset=opset, **VARIANTS[variant])
    (weights,) = run(case, items)
    assert weights.shape == (len(items), 4, 5, 5)
    np.testing.assert_allclose(weights, case.reference()[items], rtol=0, atol=FLOAT32_TOLERANCE)


def test_tap_without_rotation_differs_from_the_definition() -> None:
    # The positive control: the comparison above fails for a wrong tap.
    case = GroupQuery(rotary=16)
    (weights,) = run(case, [0, 1])
    wrong = replace(case, rotary=0).reference()
    assert np.abs(weights - wrong).max() > 100 * FLOAT32_TOLERANCE


@st.composite
def cases(draw: st.DrawFn) -> GroupQuery:
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    kv_heads = draw(st.sampled_from([1, 2]))
    heads = kv_heads * draw(st.sampled_from([1, 2, 3]))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    attributes: dict[str, Any] = {"causal": draw(st.sampled_from([1, 1, 0]))}
    if draw(st.booleans()):
        attributes["scale"] = draw(st.floats(0.0625, 2.0, width=32))
    if draw(st.booleans()):
        attributes["softcap"] = draw(st.floats(0.5, 30.0, width=32))
    if attributes["causal"] and draw(st.booleans()):
        attributes["local_window_size"] = draw(st.integers(1, 7))
    bias = None
    if draw(st.booleans()):
        shape = (draw(st.sampled_from([1, batch])), draw(st.sampled_from([1, heads])), length, length)
        bias = rng.normal(size=shape).astype(np.float32)
    if draw(st.booleans()):
        attributes["smooth_softmax"] = 1
    head_dim = draw(st.sampled_from([16, 32]))
    rotary = draw(st.sampled_from([0, 16, head_dim]))
    if rotary:
        attributes["rotary_interleaved"] = draw(st.integers(0, 1))
    positions = None
    if rotary and draw(st.booleans()):
        positions = np.tile(np.arange(length), (batch, 1)) + draw(st.integers(0, 9))
    lengths = tuple(int(number) for number in rng.integers(1, length + 1, batch)) if draw(st.booleans()) else None
    return GroupQuery(
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        length=length,
        head_dim=head_dim,
        packed=draw(st.booleans()),
        lengths=lengths,
        ends_shape=draw(st.sampled_from([(-1,), (-1, 1), (1, -1)])),
        rotary=rotary,
        positions=positions,
        bias=bias,
        empty_past=draw(st.booleans()),
        sink=draw(st.booleans()),
        presents=draw(st.booleans()),
        attributes=attributes,
        opset=draw(st.sampled_from([11, 13, 14, 17, 20])),
        seed=draw(st.integers(0, 2**16)),
    )


@settings(max_examples=60)
@given(cases())
def test_any_combination_equals_the_definition(case: GroupQuery) -> None:
    assert_equals_definition(case, everywhere=False)
