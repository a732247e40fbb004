"""Positions that a request leaves out are numbered from 0 in decoders alone, which is learnt by running the graph.

`attention` makes a graph of ids and positions, which runs in `tmp_path`. Positions that may not be numbered stay data,
which a request must send; nothing raises.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from attnserve_server.conversion.inputs.signature import signature_of
from attnserve_server.conversion.learning.positions import with_learnt_positions
from attnserve_server.model.manifest import InputRole
from onnx import numpy_helper
from onnx.parser import parse_model

WIDTH, VOCABULARY, PLACES = 8, 30, 16
CAUSAL = """size = Shape(scores) lows = Expand(low, size) future = Trilu<upper = 1>(lows, next)
    masked = Add(scores, future)"""
WHOLE = "masked = Identity(scores)"


def attention(nodes: str, *, name: str = "position_ids", before: str = "h = Identity(x)") -> onnx.ModelProto:
    """Self-attention of ids (B, T) with a table of positions, to which an input of places (B, T) points."""
    model = parse_model(f"""
        <ir_version: 10, opset_import: ["": 17]>
        placed (int64[B, T] input_ids, int64[B, T] {name}) => (float[B, T, {WIDTH}] y)
        <int64 next = {{1}}, float low = {{-10000.0}}, float scale_of = {{0.1}}>
        {{ words = Gather(table, input_ids) places = Gather(positions, {name}) x = Add(words, places)
           {before}
           ht = Transpose<perm = [0, 2, 1]>(h) products = MatMul(h, ht) scores = Mul(products, scale_of)
           {nodes}
           weights = Softmax(masked) y = MatMul(weights, h) }}
    """)
    rng = np.random.default_rng(2)
    for table, rows in (("table", VOCABULARY), ("positions", PLACES)):
        values = rng.normal(size=(rows, WIDTH)).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(values, table))
    model.graph.initializer.append(numpy_helper.from_array(np.eye(WIDTH, dtype=np.uint8), "eye"))
    return onnx.shape_inference.infer_shapes(model)


QUANTIZED = """steps, scale, zero = DynamicQuantizeLinear(x) whole = MatMulInteger(steps, eye, zero)
    floats = Cast<to = 1>(whole) h = Mul(floats, scale)"""
"""One scale for all positions: a token changes the rounding of all others."""


@pytest.mark.parametrize("before", ["h = Identity(x)", QUANTIZED])
@pytest.mark.parametrize(("nodes", "counted"), [(CAUSAL, True), (WHOLE, False)])
def test_positions_of_a_decoder_are_counted(nodes: str, counted: bool, before: str, tmp_path: Path) -> None:
    model = attention(nodes, before=before)
    spec = with_learnt_positions(model, signature_of(model.graph), tmp_path).inputs[1]
    assert (spec.role, spec.optional) == (InputRole.POSITION_IDS if counted else InputRole.DATA, counted)


def test_an_input_that_is_not_named_after_positions_stays_data(tmp_path: Path) -> None:
    model = attention(CAUSAL, name="places_in_line")
    signature = signature_of(model.graph)
    assert with_learnt_positions(model, signature, tmp_path) == signature


def test_positions_along_another_axis_than_the_ids_are_not_counted(tmp_path: Path) -> None:
    model = attention(CAUSAL)
    model.graph.input[1].type.tensor_type.shape.dim[1].dim_param = "S"
    signature = signature_of(model.graph)
    assert with_learnt_positions(model, signature, tmp_path) == signature
