"""Taps of operators that take a past: weights over past and new keys, against their definition in float64.

A past is the keys and values of earlier positions. A tap is what conversion adds to a graph so that it returns
attention weights.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from attnserve_server.conversion.graphs.reading import save
from attnserve_server.conversion.probing.runtime import GraphRunner
from attnserve_server.conversion.rewrite.taps import tapped
from onnx import TensorProto, helper, numpy_helper

Array = np.ndarray[Any, np.dtype[Any]]
BATCH, HEADS, KV_HEADS, HEAD_DIM, PAST = 2, 4, 2, 16, 3
NEW = 4
"""More new positions than past ones, and fewer than all together."""
POSITIONS = 16
FLOAT, INT32 = TensorProto.FLOAT, TensorProto.INT32


def rotated(heads: Array, first: int) -> Array:
    """Rotate (..., T, D) by the angles of positions from `first` on: Su et al. 2021, eq. 34, in halves."""
    half = HEAD_DIM // 2
    places = np.arange(first, first + heads.shape[-2])
    angles = places[:, None] * 100.0 ** -(np.arange(half) / half)
    one, other = heads[..., :half], heads[..., half:]
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([one * cos - other * sin, other * cos + one * sin], axis=-1)


def weights_of(query: Array, keys: Array, window: int = 0) -> Array:
    """Return causal weights (B, H, T, P + T) in float64; query i stands at position P + i."""
    keys = np.repeat(keys, query.shape[1] // keys.shape[1], axis=1)
    scores = query @ keys.swapaxes(-1, -2) * HEAD_DIM**-0.5
    rows, columns = PAST + np.arange(NEW)[:, None], np.arange(PAST + NEW)[None, :]
    allowed = (columns <= rows) & ((columns > rows - window) if window else True)
    exponents = np.where(allowed, np.exp(scores - scores.max(axis=-1, keepdims=True)), 0.0)
    return exponents / exponents.sum(axis=-1, keepdims=True)


def heads_first(flat: Array, heads: int) -> Array:
    return flat.reshape(BATCH, NEW, heads, HEAD_DIM).transpose(0, 2, 1, 3)


def graph(
    operator: str,
    domain: str,
    inputs: list[str],
    shapes: dict[str, list[Any]],
    kinds: dict[str, int],
    **attributes: Any,
) -> onnx.ModelProto:
    """One operator that returns its present keys and values."""
    node = helper.make_node(operator, inputs, ["output", "present_key", "present_value"], domain=domain, **attributes)
    constants = {}
    if "cos" in inputs:
        half = HEAD_DIM // 2
        angles = np.arange(POSITIONS)[:, None] * 100.0 ** -(np.arange(half) / half)
        constants = {"cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32)}
    made = helper.make_graph(
        [node],
        "past",
        [helper.make_tensor_value_info(name, kinds.get(name, FLOAT), shape) for name, shape in shapes.items()],
        [helper.make_tensor_value_info(name, FLOAT, None) for name in ("output", "present_key", "present_value")],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(made, opset_imports=opsets, ir_version=10)


def flat(heads: int) -> list[Any]:
    return ["batch", "new", heads * HEAD_DIM]


def attention() -> tuple[onnx.ModelProto, int, bool]:
    cache = ["batch", KV_HEADS, "past", HEAD_DIM]
    shapes = {
        "query": flat(HEADS),
        "key": flat(KV_HEADS),
        "value": flat(KV_HEADS),
        "past_key": cache,
        "past_value": cache,
    }
    inputs = ["query", "key", "value", "", "past_key", "past_value"]
    attributes = {"is_causal": 1, "q_num_heads": HEADS, "kv_num_heads": KV_HEADS}
    return graph("Attention", "", inputs, shapes, {}, **attributes), KV_HEADS, False


def multi_head() -> tuple[onnx.ModelProto, int, bool]:
    cache = ["batch", HEADS, "past", HEAD_DIM]
    shapes = {name: flat(HEADS) for name in ("query", "key", "value")} | {"past_key": cache, "past_value": cache}
    inputs = ["query", "key", "value", "", "", "", "past_key", "past_value"]
    model = graph("MultiHeadAttention", "com.microsoft", inputs, shapes, {}, num_heads=HEADS, unidirectional=1)
    return model, HEADS, False


def group_query(*, rotary: bool, window: int = -1) -> tuple[onnx.ModelProto, int, bool]:
    cache = ["batch", KV_HEADS, "past", HEAD_DIM]
    shapes = {
        "query": flat(HEADS),
        "key": flat(KV_HEADS),
        "value": flat(KV_HEADS),
        "past_key": cache,
        "past_value": cache,
        "ends": ["batch"],
        "total": [],
    }
    inputs = [
        *("query", "key", "value", "past_key", "past_value", "ends", "total"),
        *(("cos", "sin") if rotary else ()),
    ]
    attributes = {"num_heads": HEADS, "kv_num_heads": KV_HEADS, "do_rotary": int(rotary), "local_window_size": window}
    model = graph("GroupQueryAttention", "com.microsoft", inputs, shapes, {"ends": INT32, "total": INT32}, **attributes)
    return model, KV_HEADS, rotary


CASES: dict[str, tuple[Callable[[], tuple[onnx.ModelProto, int, bool]], int, int]] = {
    # Rows of the batch, and the window. The kernel of GroupQueryAttention takes several new positions after a past only
    # alone: findings/group_query_past_of_several_rows.sh.
    "Attention": (attention, BATCH, 0),
    "MultiHeadAttention": (multi_head, BATCH, 0),
    "GroupQueryAttention": (lambda: group_query(rotary=False), 1, 0),
    "GroupQueryAttention, rotary": (lambda: group_query(rotary=True), 1, 0),
    "GroupQueryAttention, window": (lambda: group_query(rotary=True, window=3), 1, 3),
}


@pytest.mark.parametrize("name", CASES)
def test_weights_run_over_past_and_new_keys(tmp_path: Path, name: str) -> None:
    make, rows, window = CASES[name]
    model, kv_heads, rotary = make()
    rng = np.random.default_rng(5)
    query, key, value = (
        rng.normal(size=(BATCH, NEW, heads * HEAD_DIM)).astype(np.float32) for heads in (HEADS, kv_heads, kv_heads)
    )
    past_key, past_value = (rng.normal(size=(BATCH, kv_heads, PAST, HEAD_DIM)).astype(np.float32) for _ in range(2))
    graph_, found = tapped(onnx.shape_inference.infer_shapes(model))
    (site,) = found.values()
    assert site.tappable, site.unavailable_reason
    save(ir.from_proto(ir.to_proto(graph_)), tmp_path / "tapped.onnx")
    feeds = {"query": query, "key": key, "value": value, "past_key": past_key, "past_value": past_value}
    feeds = {name: array[:rows] for name, array in feeds.items()}
    if "Group" in name:
        feeds |= {"ends": np.full(rows, PAST + NEW - 1, np.int32), "total": np.array(PAST + NEW, np.int32)}
    (tap,) = (f"attention.{own}" for own in found)
    answer = GraphRunner(tmp_path / "tapped.onnx").run(feeds, ["output", tap])
    new_query, new_key = heads_first(query.astype(float), HEADS), heads_first(key.astype(float), kv_heads)
    if rotary:
        new_query, new_key = rotated(new_query, PAST), rotated(new_key, PAST)
    # A cache of the operator holds rotated keys.
    keys = np.concatenate([past_key, new_key], axis=2)
    values = np.concatenate([past_value, heads_first(value.astype(float), kv_heads)], axis=2)
    expected = weights_of(new_query, keys, window)[:rows]
    # float32 sums in another order.
    np.testing.assert_allclose(answer[tap], expected, atol=1e-5)
    product = expected @ np.repeat(values, HEADS // kv_heads, axis=1)[:rows]
    own = answer["output"].reshape(rows, NEW, HEADS, HEAD_DIM).transpose(0, 2, 1, 3)
    np.testing.assert_allclose(own, product, atol=1e-5)
