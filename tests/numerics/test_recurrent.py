"""The weights that `LinearAttention` implies, against its definition in float64 and the operator's own output.

`LinearOperator` makes a graph of the operator by its update rule, and the weights in float64. `tapped` adds the nodes
that return the weights of the selected rows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attnserve_server.conversion.graphs.reading import checked, save
from attnserve_server.conversion.rewrite.taps import tapped
from attnserve_server.engine.session import RuntimeSession
from recurrent_graphs import RULES, LinearOperator

ITEMS, WEIGHTS = "attention_items.attention_0", "attention.attention_0"


def assert_equals_definition(case: LinearOperator, folder: Path) -> None:
    model, sites = tapped(checked(case.model(), "case"))
    (site,) = sites.values()
    assert (site.unavailable_reason, site.form, site.causal) == ("", "linear", True)
    assert (site.heads, site.kv_heads, site.head_dim, site.rows_sum_to_one) == (4, 2, 4, False)
    save(model, folder / "model.onnx")
    session = RuntimeSession.load(folder / "model.onnx", provider="CPUExecutionProvider")
    expected = case.reference()
    # Sums of at most six products of numbers near 1; float16 operands have 11 bits.
    tolerance = 1e-2 if case.dtype is np.float16 else 2e-6
    for items in ([0, 1, 2], [2], [1, 1, 0], []):
        feeds = {**case.feeds(), ITEMS: np.array(items, np.int64)}
        weights, output = session.run(feeds, [WEIGHTS, "output"])
        assert weights.dtype == np.float32
        np.testing.assert_allclose(weights, expected[items], rtol=0, atol=tolerance)
    value = case.feeds()["value"].astype(np.float64).reshape(3, case.length, case.kv_heads, case.value_dim)
    product = np.einsum("bhqk,bkhd->bqhd", expected, np.repeat(value, case.heads // case.kv_heads, axis=2))
    np.testing.assert_allclose(output, product.reshape(output.shape), rtol=0, atol=2 * tolerance)


@pytest.mark.parametrize("domain", ["", "com.microsoft"], ids=["ai.onnx", "com.microsoft"])
@pytest.mark.parametrize("rule", RULES)
def test_weights_equal_the_definition(rule: str, domain: str, tmp_path: Path) -> None:
    assert_equals_definition(LinearOperator(rule, domain), tmp_path)


@pytest.mark.parametrize(
    "more",
    [{"per_feature": True}, {"shared_rate": True}, {"scale": 0.3}, {"length": 1}, {"dtype": np.float16}],
    ids=lambda more: next(iter(more)),
)
def test_weights_equal_the_definition_in_every_form(more: dict[str, Any], tmp_path: Path) -> None:
    assert_equals_definition(LinearOperator("gated_delta", **more), tmp_path)


def test_weights_of_another_rule_differ() -> None:
    # The positive control: without the decay, the comparison above fails.
    gated, plain = LinearOperator("gated").reference(), LinearOperator("linear").reference()
    assert np.abs(gated - plain).max() > 1e-2
