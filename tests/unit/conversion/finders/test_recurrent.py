"""Sites of `LinearAttention`: what is read, and which states leave it without weights.

The operator adds keys times values to a state. If it starts from a state that may not be zeros, the site is listed
without weights, with the reason. `with_state` makes such a graph.
"""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from attnserve_server.conversion.base.sites import FoundSite, Recurrent
from onnx import TensorProto, helper, numpy_helper
from opened import sites_of
from recurrent_graphs import LinearOperator

ZEROS = np.zeros((3, 2, 4, 3), np.float32)


def site_of(model: onnx.ModelProto) -> FoundSite:
    (site,) = sites_of(model).values()
    return site


def with_state(*nodes: onnx.NodeProto, constant: np.ndarray | None = None) -> onnx.ModelProto:
    """Return a graph whose operator starts from `past`, the last of `nodes` or a constant; else the test adds it."""
    model = LinearOperator().model()
    model.graph.node[0].input[3] = "past"
    last = model.graph.node[0]
    kept = onnx.NodeProto()
    kept.CopyFrom(last)
    del model.graph.node[:]
    model.graph.node.extend([*nodes, kept])
    if constant is not None:
        model.graph.initializer.append(numpy_helper.from_array(constant, "past"))
    return model


@pytest.mark.parametrize(("domain", "operator"), [("", "ai.onnx.LinearAttention-27"), ("com.microsoft", "")])
def test_sites_of_both_domains_are_named(domain: str, operator: str) -> None:
    site = site_of(LinearOperator(domain=domain).model())
    assert site.operator == (operator or "com.microsoft.LinearAttention-1")
    assert isinstance(site.attention, Recurrent)


def test_zeros_of_the_graph_are_no_state() -> None:
    shape = helper.make_node("Constant", [], ["sizes"], value=numpy_helper.from_array(np.array([3, 2, 4, 3])))
    filled = helper.make_node("ConstantOfShape", ["sizes"], ["past"])
    wide = helper.make_node("Expand", ["nought", "sizes"], ["past"])
    assert site_of(with_state(constant=ZEROS)).tappable
    assert site_of(with_state(shape, filled)).tappable
    expanded = with_state(shape, wide)
    expanded.graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.float32), "nought"))
    assert site_of(expanded).tappable


def test_a_state_that_may_hold_something_is_refused() -> None:
    given = with_state()
    given.graph.input.append(helper.make_tensor_value_info("past", TensorProto.FLOAT, ["batch", 2, 4, 3]))
    shape = helper.make_node("Constant", [], ["sizes"], value=numpy_helper.from_array(np.array([3, 2, 4, 3])))
    ones = numpy_helper.from_array(np.ones(1, np.float32))
    filled = with_state(shape, helper.make_node("ConstantOfShape", ["sizes"], ["past"], value=ones))
    for model in (given, filled, with_state(constant=ZEROS + 1)):
        assert "it takes past_state" in site_of(model).unavailable_reason


def test_uneven_heads_are_refused() -> None:
    model = LinearOperator().model()
    node = model.graph.node[0]
    next(each for each in node.attribute if each.name == "kv_num_heads").i = 3
    assert "4 query heads are no multiple of 3" in site_of(model).unavailable_reason
