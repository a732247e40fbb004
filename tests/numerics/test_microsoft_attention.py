"""onnxruntime's `Attention`, its packed projection recomputed by a tap, against the definition and its own output.

A tap is what conversion adds to a graph so that it returns attention weights. `Packed` and `Quantized` make a graph of
the operator, and its weights in float64; `assert_equals_definition` runs both.
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
from microsoft_graphs import Array, Packed, Quantized, padding_bias
from microsoft_runs import FLOAT32_TOLERANCE, assert_equals_definition, run, run_tap_alone

LENGTH = 5
MASKS = {
    "none": None,
    "ends": np.array([3, 5], np.int32),
    "ends beyond": np.array([9, 1], np.int32),
    "ends and starts": np.array([3, 5, 1, 2], np.int32),
    "cumulated lengths": np.array([3, 5, 0, 3, 8, 0, 5, 10], np.int32),
    "keys": np.array([[1, 1, 0, 1, 0], [2, 1, -1, 1, 1]], np.int32),
    "square": np.random.default_rng(3).integers(0, 2, (2, LENGTH, LENGTH)).astype(np.int32) | np.eye(5, dtype=np.int32),
}


def shifted_rows(case: Packed) -> Array:
    """Where every key is masked by an added number."""
    filter_value = case.attributes.get("mask_filter_value", -10000.0)
    padding = padding_bias(case.mask, case.batch, case.length, case.length, filter_value)
    if case.attributes.get("unidirectional"):
        padding = padding - np.triu(np.full((case.length, case.length), 1e30), 1)
    return padding.max(axis=-1, keepdims=True) <= -1000


@pytest.mark.parametrize("opset", [11, 12, 13, 17, 23])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("unidirectional", [0, 1])
def test_masks_of_every_form_hide_what_the_operator_hides(mask: str, unidirectional: int, opset: int) -> None:
    case = Packed(mask=MASKS[mask], attributes={"unidirectional": unidirectional}, opset=opset)
    assert_equals_definition(case, shifted_rows(case))


def test_mask_of_rank_4_is_cropped_to_the_length() -> None:
    # Only other providers run this form.
    case = Packed(mask=np.tril(np.ones((2, 1, 7, 7), np.int32)))
    np.testing.assert_allclose(run_tap_alone(case, [0, 1]), case.reference(), rtol=0, atol=FLOAT32_TOLERANCE)


@pytest.mark.parametrize("shape", [(2, 2), (1, 2), (2, 1), (1, 1)])
@pytest.mark.parametrize("kind", ["normal", "lowest", "minus infinity"])
def test_biases_are_added_unchanged(shape: tuple[int, int], kind: str) -> None:
    rng = np.random.default_rng(5)
    bias = rng.normal(size=(*shape, LENGTH, LENGTH)).astype(np.float32)
    if kind != "normal":
        bias[bias < 0] = -np.inf if kind == "minus infinity" else np.finfo(np.float32).min
        bias[..., 0] = 1
    if kind == "lowest":
        bias[0, 0, 2] = np.finfo(np.float32).min
    assert_equals_definition(Packed(bias=bias, mask=MASKS["keys"]))


def test_row_of_minus_infinity_is_zeros_where_the_operator_gives_nan() -> None:
    bias = np.zeros((1, 1, LENGTH, LENGTH), np.float32)
    bias[..., 1, :] = -np.inf
    weights, output = run(Packed(bias=bias), [0, 1], ("attention.attention_0", "output"))
    assert not weights[:, :, 1].any()
    assert np.isnan(output[:, 1]).all()
    np.testing.assert_allclose(weights[:, :, 0].sum(axis=-1), 1, rtol=0, atol=FLOAT32_TOLERANCE)


@pytest.mark.parametrize("mask", ["ends", "keys", "square"])
def test_fully_masked_rows_are_the_softmax_of_shifted_scores(mask: str) -> None:
    hidden = {"ends": [0, 5], "keys": [[0] * 5, [1] * 5], "square": np.zeros((2, 5, 5))}[mask]
    case = Packed(mask=np.array(hidden, np.int32))
    assert shifted_rows(case).any()
    assert_equals_definition(case, shifted_rows(case))


@pytest.mark.parametrize(
    "variant",
    [
        {"projection_bias": False},
        {"value_dim": 6},
        {"length": 1},
        {"batch": 1, "mask": np.array([4], np.int32)},
        {"batch": 1, "mask": np.array([4, 1], np.int32)},
        {"attributes": {"scale": 0.3}},
        {"mask": MASKS["keys"], "attributes": {"mask_filter_value": -3.0}},
        {"mask": MASKS["ends"], "attributes": {"mask_filter_value": -3.0, "unidirectional": 1}},
    ],
    ids=str,
)
def test_variants_equal_the_definition(variant: dict[str, Any]) -> None:
    assert_equals_definition(Packed(**variant))


@pytest.mark.parametrize("mask", ["none", "ends", "keys"])
@pytest.mark.parametrize("opset", [11, 17])
def test_softmax_of_float16_is_computed_in_float32(mask: str, opset: int) -> None:
    assert_equals_definition(Packed(mask=MASKS[mask], dtype=np.float16, opset=opset))


@pytest.mark.parametrize("opset", [11, 13, 17])
@pytest.mark.parametrize("items", [[], [1], [1, 0, 1]], ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_only_selected_rows_are_returned_in_their_order(mask: str, items: list[int], opset: int) -> None:
    case = Packed(
        mask=MASKS[mask], bias=np.ones((2, 2, 5, 5), np.float32), attributes={"unidirectional": 1}, opset=opset
    )
    (weights,) = run(case, items)
    assert weights.shape == (len(items), case.heads, LENGTH, LENGTH)
    np.testing.assert_allclose(weights, case.reference()[items], rtol=0, atol=FLOAT32_TOLERANCE)


@pytest.mark.parametrize("mask", ["none", "ends", "keys"])
@pytest.mark.parametrize("by_column", [False, True])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("opset", [11, 17])
def test_integers_are_projected_as_the_operator_projects_them(
    mask: str, by_column: bool, zeros: bool, opset: int
) -> None:
    attributes = {"unidirectional": int(by_column)}
    case = Quantized(mask=MASKS[mask], by_column=by_column, zeros=zeros, opset=opset, attributes=attributes)
    assert_equals_definition(case)
    assert run(case, [])[0].shape == (0, 2, LENGTH, LENGTH)


def test_packed_weights_are_in_the_file_once() -> None:
    model, _ = tapped(checked(Packed(width=64, head_dim=32).model(), "case"))
    sizes = [
        tensor.const_value.nbytes for tensor in model.graph.initializers.values() if tensor.const_value is not None
    ]
    assert sum(size > 4 * 64 * 64 for size in sizes) == 1


def test_tap_with_another_filter_value_differs_from_the_definition() -> None:
    # The positive control: the comparison above fails for a wrong tap.
    case = Packed(mask=MASKS["keys"], attributes={"mask_filter_value": -3.0})
    (weights,) = run(case, [0, 1])
    wrong = replace(case, attributes={}).reference()
    assert np.abs(weights - wrong).max() > 100 * FLOAT32_TOLERANCE


@st.composite
def cases(draw: st.DrawFn) -> Packed:
    batch, heads, length = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    bounds = rng.integers(0, length + 2, 2 * batch)
    mask = {
        "none": None,
        "ends": bounds[:batch],
        "ends and starts": bounds,
        "cumulated": np.concatenate([bounds[:batch], rng.integers(0, length, 2 * batch + 2)]),
        "keys": rng.integers(0, 2, (batch, length)),
        "square": rng.integers(0, 2, (batch, length, length)),
    }[draw(st.sampled_from(["none", "ends", "ends and starts", "cumulated", "keys", "square"]))]
    attributes: dict[str, Any] = {"unidirectional": draw(st.integers(0, 1))}
    if draw(st.booleans()):
        attributes["scale"] = draw(st.floats(0.0625, 2.0, width=32))
    if draw(st.booleans()):
        attributes["mask_filter_value"] = draw(st.sampled_from([-1.0, -100.0, -65504.0]))
    bias = None
    if draw(st.booleans()):
        shape = (draw(st.sampled_from([1, batch])), draw(st.sampled_from([1, heads])), length, length)
        bias = rng.normal(size=shape).astype(np.float32)
    return Packed(
        batch=batch,
        heads=heads,
        length=length,
        width=draw(st.integers(1, 8)),
        head_dim=draw(st.integers(1, 8)),
        value_dim=draw(st.integers(1, 8)),
        mask=None if mask is None else mask.astype(np.int32),
        bias=bias,
        projection_bias=draw(st.booleans()),
        attributes=attributes,
        opset=draw(st.sampled_from([11, 13, 14, 17, 20])),
        seed=draw(st.integers(0, 2**16)),
    )


@settings(max_examples=60)
@given(cases())
def test_any_combination_equals_the_definition(case: Packed) -> None:
    # Rows shifted by -65,504 keep two decimal places, not three.
    if case.attributes.get("mask_filter_value") == -65504.0 and shifted_rows(case).any():
        case = replace(case, attributes={**case.attributes, "mask_filter_value": -10000.0})
    assert_equals_definition(case, shifted_rows(case))
