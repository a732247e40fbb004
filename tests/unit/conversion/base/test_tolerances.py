"""Measures of error, and the checks that compare them with a tolerance.

A conversion measures how far a graph's answers differ from its source's. `judge` raises CheckFailed for an error above
its tolerance, and for one that is not finite.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from attnserve_server.conversion.base.errors import CheckFailed
from attnserve_server.conversion.base.sites import Features, Linear, Operand, Scores
from attnserve_server.conversion.base.tolerances import (
    Tolerances,
    check_report,
    judge,
    max_abs,
    product_error,
    row_sum_error,
)
from attnserve_server.model.manifest import CheckReport

INF = float("inf")
NAN = float("nan")


@pytest.mark.parametrize(
    ("one", "other", "error"),
    [
        ([1.0, 2.0], [1.5, 2.0], 0.5),
        ([INF, -INF], [INF, -INF], 0.0),
        ([INF], [-INF], INF),
        ([INF], [1.0], INF),
        ([NAN], [NAN], 0.0),
        ([NAN], [1.0], INF),
        ([1.0], [1.0, 1.0], INF),
        ([], [], 0.0),
    ],
)
def test_max_abs_is_the_greatest_difference(one: list[float], other: list[float], error: float) -> None:
    assert max_abs(np.array(one, np.float32), np.array(other, np.float32)) == error


def test_max_abs_does_not_overflow_in_the_arrays_type() -> None:
    assert max_abs(np.array([60000], np.float16), np.array([-60000], np.float16)) == 120_000
    assert max_abs(np.array([200], np.uint8), np.array([201], np.uint8)) == 1


def test_rows_of_zeros_have_no_row_sum_error() -> None:
    rows = np.array([[0.5, 0.5], [0.0, 0.0]], np.float32)
    assert row_sum_error(rows) == 0
    assert row_sum_error(rows * np.float32(0.5)) == 0.5


def operand(heads: int, *, packed: bool, order: tuple[int, ...] = ()) -> Operand:
    return Operand(ir.val("value"), heads, packed, order=order)


def scores(heads: int, kv_heads: int, *, packed: bool) -> Scores:
    queries, keys = operand(heads, packed=packed), operand(kv_heads, packed=packed)
    return Scores(queries, keys, keys, queries, head_dim=4, scale=0.5)


@pytest.mark.parametrize("packed", [True, False])
def test_product_error_repeats_the_heads_of_the_value(packed: bool) -> None:
    rng = np.random.default_rng(0)
    weights = rng.dirichlet(np.ones(5), size=(2, 4, 3)).astype(np.float32)
    value = rng.normal(size=(2, 2, 5, 4)).astype(np.float32)
    output = np.einsum("bhls,bhsd->bhld", weights.astype(np.float64), value.astype(np.float64).repeat(2, axis=1))
    if packed:
        value = value.transpose(0, 2, 1, 3).reshape(2, 5, 8)
        output = output.transpose(0, 2, 1, 3).reshape(2, 3, 16)
    attention = scores(4, 2, packed=packed)
    assert product_error(attention, weights, value, output) < 1e-12  # float64 sums
    output = output.copy()
    output[1, ..., -1] += 0.25
    assert product_error(attention, weights, value, output) == pytest.approx(0.25 / max(1, np.abs(value).max()))


def test_product_error_ignores_fully_masked_rows() -> None:
    weights = np.zeros((1, 1, 2, 3), np.float32)
    weights[..., 1, 0] = 1
    output = np.array([[[[9.0], [1.0]]]])
    assert product_error(scores(1, 1, packed=False), weights, np.ones((1, 1, 3, 1), np.float32), output) == 0


def test_product_error_reads_axes_in_the_order_of_the_operand() -> None:
    weights = np.array([[[[0.25, 0.75]]]], np.float32)
    value = np.array([[[1.0, 2.0], [3.0, 4.0]]])  # (S, B = 1, D) without an axis of heads
    value = value.reshape(2, 1, 2)
    parts = operand(1, packed=False, order=(1, 0, 2))
    attention = Linear(Features(ir.val("q"), (0, 1, 2)), Features(ir.val("k"), (0, 1, 2)), parts, parts)
    output = (0.25 * value[0] + 0.75 * value[1]).reshape(1, 1, 2)
    assert product_error(attention, weights, value, output) == 0


def report(**changes: float) -> CheckReport:
    exact = {"output_max_abs_error": 0.0, "weight_max_abs_error": 0.0, "row_sum_max_abs_error": 0.0}
    return check_report(
        against="its source", lengths=(3,), output_tolerance=1e-4, weight_tolerance=1e-5, **{**exact, **changes}
    )


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("output_max_abs_error", "outputs differ from its source by 0.01, more than 0.0001"),
        ("weight_max_abs_error", "attention weights differ from its source by 0.01, more than 1e-05"),
        ("row_sum_max_abs_error", "sums of attention rows differ from its source by 0.01, more than 0.001"),
    ],
)
def test_an_error_above_its_tolerance_fails_the_check(field: str, words: str) -> None:
    judge(report(), 1e-3)
    with pytest.raises(CheckFailed, match=f"{words}; no bundle was written"):
        judge(report(**{field: 0.01}), 1e-3)


@pytest.mark.parametrize("value", [NAN, INF])
def test_a_difference_that_is_not_finite_fails_the_check(value: float) -> None:
    with pytest.raises(CheckFailed, match="only one of the two holds a NaN or an infinity"):
        report(output_max_abs_error=value)


def test_reduced_precisions_have_wider_tolerances() -> None:
    exact, half = Tolerances.of("fp32"), Tolerances.of("fp16")
    assert half == Tolerances.of("int8")
    assert (exact.output, exact.neighbours) == (1e-4, 1e-4)
    assert half.output > exact.output
    assert half.row_sum > exact.row_sum
