"""The scores of taps against their definition in float64: after scale, softcap and bias, before the masks.

A tap is what conversion adds to a graph so that it returns attention weights. Scores are what softmax makes weights of.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import pytest
from attention_graphs import Case
from attnserve_server.conversion.learning.scores import softmax_error
from attnserve_server.model.manifest import LOWEST_SCORE
from microsoft_graphs import GroupQuery, MultiHead
from microsoft_runs import WEIGHTS, run

Array = np.ndarray[Any, np.dtype[Any]]

SCORES = "attention_scores.attention_0"
# Scores are sums of 8 products of normal numbers in float32: below 20, with a spacing of 2e-6.
TOLERANCE = 1e-5


class Scored(Protocol):
    """A graph of one operator with the definition of its scores."""

    batch: int

    def scores(self) -> Array: ...


def kept(shape: tuple[int, ...]) -> Array:
    """A mask that hides about a third; every row keeps its first key."""
    keep = np.random.default_rng(7).random(shape) > 0.35
    keep[..., 0] = True
    return keep


def biased(shape: tuple[int, ...], hidden: float = -np.inf) -> Array:
    bias = np.random.default_rng(8).normal(size=shape)
    return np.where(kept(shape), bias, hidden).astype(np.float32)


NOTHING = kept((3, 1, 5, 5))
NOTHING[1, 0, 2] = False
CASES: dict[str, Any] = {
    "plain": Case(),
    "packed": Case(packed=True, attributes={"scale": 0.7}),
    "softcap before the bias": Case(attributes={"softcap": 1.5}, mask=biased((5, 5))),
    "boolean mask": Case(mask=kept((3, 1, 5, 5))),
    "a row without a key": Case(mask=NOTHING),
    "lowest number as mask": Case(mask=biased((3, 4, 5, 5), float(np.finfo(np.float32).min))),
    "causal with more keys": Case(queries=3, keys=6, attributes={"is_causal": 1}),
    "grouped heads": Case(kv_heads=2, attributes={"is_causal": 1}),
    "padded keys": MultiHead(keys=6, mask=np.array([[1, 1, 0, 1, 0, 1], [0, 0, 0, 0, 0, 0]], np.int32)),
    "ends of keys": MultiHead(keys=6, mask=np.array([3, 6], np.int32), attributes={"mask_filter_value": -50.0}),
    "causal but the last": MultiHead(keys=6, attributes={"unidirectional": 1}),
    "attention bias": MultiHead(bias=biased((2, 2, 5, 5)), attributes={"unidirectional": 1}),
    "window": GroupQuery(attributes={"local_window_size": 2}),
    "sink": GroupQuery(sink=True),
    "smooth softmax and softcap": GroupQuery(attributes={"smooth_softmax": 1, "softcap": 1.5}),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_scores_equal_the_definition_and_softmax_makes_the_weights_of_them(case: Any) -> None:
    weights, scores = run(case, range(case.batch), (WEIGHTS, SCORES))
    reference = case.scores()
    assert scores.dtype == np.float32
    np.testing.assert_array_equal(scores == np.float32(LOWEST_SCORE), np.isneginf(reference))
    shown = np.where(scores <= LOWEST_SCORE, -np.inf, scores)
    np.testing.assert_allclose(shown, reference, rtol=0, atol=TOLERANCE)
    if case is not CASES["ends of keys"]:  # whose hidden keys keep a share of e^-50
        assert softmax_error(scores, weights) <= TOLERANCE


@pytest.mark.parametrize("items", [[], [1], [1, 0, 1]], ids=str)
def test_scores_of_the_selected_rows_only(items: Sequence[int]) -> None:
    case = CASES["attention bias"]
    (scores,) = run(case, items, (SCORES,))
    assert scores.shape == (len(items), 2, 5, 5)
    reference = case.scores()[np.array(items, int)]
    np.testing.assert_allclose(np.where(scores <= LOWEST_SCORE, -np.inf, scores), reference, rtol=0, atol=TOLERANCE)


def test_the_check_of_scores_notices_a_wrong_scale() -> None:
    weights, scores = run(CASES["sink"], range(2), (WEIGHTS, SCORES))
    assert softmax_error(scores, weights) <= TOLERANCE
    halved = np.where(scores <= LOWEST_SCORE, scores, scores / 2)
    assert softmax_error(halved, weights) > 1e-2
