"""onnxruntime's `MultiHeadAttention` in all its forms, against the definition and its own output.

A tap is what conversion adds to a graph so that it returns attention weights. `MultiHead` makes a graph of the
operator, and its weights in float64; `assert_equals_definition` runs both.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from attnserve_server.engine.session import RunFailed
from hypothesis import given, settings
from hypothesis import strategies as st
from microsoft_graphs import Array, MultiHead, padding_bias
from microsoft_runs import FLOAT32_TOLERANCE, assert_equals_definition, run, run_tap_alone

PADDINGS = {
    "none": None,
    "ends": np.array([3, 6], np.int32),
    "cumulated lengths": np.array([3, 6, 0, 5, 10, 0, 3, 9], np.int32),
    "keys": np.array([[1, 1, 0, 1, 0, 1], [2, 1, -1, 1, 1, 0]], np.int32),
    "square": np.random.default_rng(3).integers(0, 2, (2, 5, 6)).astype(np.int32) | np.eye(5, 6, dtype=np.int32),
}


def shifted_rows(case: MultiHead) -> Array:
    """Where every key is masked by an added number."""
    filter_value = case.attributes.get("mask_filter_value", -10000.0)
    padding = padding_bias(case.mask, case.batch, case.queries, case.keys, filter_value)
    if case.attributes.get("unidirectional"):
        behind = np.triu(np.full((case.queries, case.keys), 1e30), 1)
        behind[-1] = 0
        padding = padding - behind
    return padding.max(axis=-1, keepdims=True) <= -1000


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("form", ["apart", "heads first"])
@pytest.mark.parametrize("projection_bias", [False, True])
@pytest.mark.parametrize("opset", [11, 13, 17])
def test_paddings_hide_what_the_operator_hides(form: str, padding: str, projection_bias: bool, opset: int) -> None:
    case = MultiHead(keys=6, form=form, mask=PADDINGS[padding], projection_bias=projection_bias, opset=opset)
    assert_equals_definition(case, shifted_rows(case))


@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (5, 6), (6, 5), (1, 4), (4, 1), (1, 1)])
@pytest.mark.parametrize("masked", [False, True])
def test_causal_mask_counts_from_the_first_and_leaves_out_the_last_query(queries: int, keys: int, masked: bool) -> None:
    mask = np.tile(np.arange(keys) % 3 != 1, (2, 1)).astype(np.int32) if masked else None
    case = MultiHead(queries=queries, keys=keys, mask=mask, attributes={"unidirectional": 1})
    assert_equals_definition(case, shifted_rows(case))


@pytest.mark.parametrize("form", ["key and value packed", "all packed"])
@pytest.mark.parametrize("projection_bias", [False, True])
@pytest.mark.parametrize("opset", [11, 17])
def test_packed_operands_are_split(form: str, projection_bias: bool, opset: int) -> None:
    # Only other providers run these forms.
    case = MultiHead(form=form, projection_bias=projection_bias, mask=np.array([3, 5], np.int32), opset=opset)
    np.testing.assert_allclose(run_tap_alone(case, [0, 1]), case.reference(), rtol=0, atol=FLOAT32_TOLERANCE)
    assert run_tap_alone(case, []).shape == (0, 2, 5, 5)


@pytest.mark.parametrize("form", ["key and value packed", "all packed"])
def test_runtime_still_refuses_packed_operands_on_the_cpu(form: str) -> None:
    # When it runs them, the test above should compare with the operator too.
    with pytest.raises(RunFailed) as fault:
        run(MultiHead(form=form), [0], ("output",))
    assert "not implemented for CPU" in str(fault.value.__cause__)


@pytest.mark.parametrize("shape", [(2, 2), (1, 2), (2, 1), (1, 1)])
@pytest.mark.parametrize("kind", ["normal", "lowest", "minus infinity"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_biases_are_added_unchanged(shape: tuple[int, int], kind: str, dtype: type) -> None:
    rng = np.random.default_rng(5)
    bias = rng.normal(size=(*shape, 5, 5)).astype(dtype)
    if kind != "normal":
        bias[bias < 0] = -np.inf if kind == "minus infinity" else np.finfo(dtype).min
        bias[..., 0] = 1
    assert_equals_definition(MultiHead(bias=bias, dtype=dtype, attributes={"unidirectional": 1}))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_rows_of_the_lowest_number_are_their_softmax(dtype: type) -> None:
    bias = np.zeros((1, 1, 5, 5), dtype)
    bias[..., 1, :] = np.finfo(dtype).min
    shifted = np.arange(5)[None, None, :, None] == 1
    # In float32, scores are not negligible beside the lowest float16.
    assert_equals_definition(MultiHead(bias=bias, dtype=dtype), shifted if dtype is np.float32 else None)


@pytest.mark.parametrize("items", [[], [1], [1, 0, 1]], ids=str)
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("opset", [11, 17])
def test_only_selected_rows_are_returned_in_their_order(padding: str, items: list[int], opset: int) -> None:
    case = MultiHead(keys=6, mask=PADDINGS[padding], projection_bias=True, opset=opset)
    (weights,) = run(case, items)
    assert weights.shape == (len(items), 2, 5, 6)
    np.testing.assert_allclose(weights, case.reference()[items], rtol=0, atol=FLOAT32_TOLERANCE)


def test_tap_without_a_bias_differs_from_the_definition() -> None:
    # The positive control: the comparison above fails for a wrong tap.
    case = MultiHead(projection_bias=True)
    (weights,) = run(case, [0, 1])
    wrong = replace(case, projection_bias=False).reference()
    assert np.abs(weights - wrong).max() > 100 * FLOAT32_TOLERANCE


@st.composite
def cases(draw: st.DrawFn) -> MultiHead:
    batch, heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    queries, keys = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    ends = rng.integers(0, keys + 2, batch)
    mask = {
        "none": None,
        "ends": ends,
        "cumulated": np.concatenate([ends, rng.integers(0, keys, 2 * batch + 2)]),
        "keys": rng.integers(0, 2, (batch, keys)),
        "square": rng.integers(0, 2, (batch, queries, keys)),
    }[draw(st.sampled_from(["none", "ends", "cumulated", "keys", "square"]))]
    attributes: dict[str, Any] = {"unidirectional": draw(st.integers(0, 1))}
    if draw(st.booleans()):
        attributes["scale"] = draw(st.floats(0.0625, 2.0, width=32))
    if draw(st.booleans()):
        attributes["mask_filter_value"] = draw(st.sampled_from([-1.0, -100.0]))
    bias = None
    if draw(st.booleans()):
        shape = (draw(st.sampled_from([1, batch])), draw(st.sampled_from([1, heads])), queries, keys)
        bias = rng.normal(size=shape).astype(np.float32)
    form = draw(st.sampled_from(["apart", "heads first"]))
    head_dim = draw(st.integers(1, 8))
    return MultiHead(
        batch=batch,
        heads=heads,
        queries=queries,
        keys=keys,
        head_dim=head_dim,
        # Key and value of rank 4 come from a cache, whose heads are of one size.
        value_dim=head_dim if form == "heads first" else draw(st.integers(1, 8)),
        form=form,
        mask=None if mask is None else mask.astype(np.int32),
        bias=bias,
        projection_bias=draw(st.booleans()),
        attributes=attributes,
        opset=draw(st.sampled_from([11, 13, 14, 17, 20])),
        seed=draw(st.integers(0, 2**16)),
    )


@settings(max_examples=60)
@given(cases())
def test_any_combination_equals_the_definition(case: MultiHead) -> None:
    assert_equals_definition(case, shifted_rows(case))
