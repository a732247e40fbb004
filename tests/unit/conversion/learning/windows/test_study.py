"""Windows, read from a run on the numbers of the positions.

The numbers show which query each row of windowed weights is, and which key each column. `studied` returns the windows
of a graph with one site, or `Untappable` with the reason. A site is a place in a graph that computes attention.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from attnserve_server.conversion.base.sites import Factor, Layout, Untappable, WeightAxes, Windows
from attnserve_server.conversion.graphs.contraction import Contraction
from attnserve_server.conversion.inputs.signature import signature_of
from attnserve_server.conversion.learning.windows.study import columns_of, rows_of, windows_of
from attnserve_server.conversion.probing.feeds import Sampler
from attnserve_server.model.bands import BandSpec, BlockBand
from batch_graphs import graph
from onnx import helper

Array = np.ndarray[Any, np.dtype[Any]]

WINDOWED: WeightAxes = ((Factor("batch"),), (Factor("window", 3),), (Factor("query"),), (Factor("key"),))
ATTEND = """
    kt = Transpose<perm=[0, 1, 3, 2]>(k)
    raw = MatMul(q, kt)
    {masked}
    p = Softmax<axis=-1>(s)
    out = MatMul(p, k)
"""
OWN_BLOCK = f"q = Reshape(x, cut) k = Identity(q) {ATTEND} z = Reshape(out, back)"
BLOCK_AND_BEFORE = f"""
    q = Reshape(x, cut)
    padded = Pad(q, pads)
    before = Slice(padded, start, end, middle)
    k = Concat<axis=2>(before, q)
    {ATTEND}
    z = Reshape(out, back)
"""


def model_of(nodes: str, masked: str = "s = Identity(raw)") -> onnx.ModelProto:
    """Six positions in three windows of two queries."""
    constants = {
        "cut": np.array([0, 3, 2, 4]),
        "back": np.array([0, 6, 4]),
        "pads": np.array([0, 1, 0, 0, 0, 0, 0, 0]),
        "start": np.array([0]),
        "end": np.array([3]),
        "middle": np.array([1]),
        "depth": np.array(3),
        "reverse": np.array([2, 1, 0]),
        "twice": np.array([0, 1, 1]),
        "causal": np.where(np.tri(2, dtype=bool), 0, -np.inf).astype(np.float32),
    }
    body = nodes.replace("{masked}", masked)
    return graph(f"g (float[b, 6, 4] x, float[b, 6, 4] y) => (float[b, 6, 4] z) {{ {body} }}", **constants)


def studied(nodes: str, folder: Path, masked: str = "s = Identity(raw)") -> Windows | Untappable:
    model = onnx.shape_inference.infer_shapes(model_of(nodes, masked))
    layout = Layout(WINDOWED, kv_heads=1, head_dim=4)
    (found,) = windows_of(model, {"attention_0": layout}, Sampler(signature_of(model.graph)), folder).values()
    return found


@pytest.mark.parametrize(
    ("nodes", "band"),
    [
        (OWN_BLOCK, BlockBand(block=2, before=0, after=0)),
        (BLOCK_AND_BEFORE, BlockBand(block=2, before=1, after=0)),
    ],
    ids=["own block", "own block and the one before"],
)
def test_blocks_are_read_from_the_numbers(nodes: str, band: BandSpec, tmp_path: Path) -> None:
    assert studied(nodes, tmp_path) == Windows(band, anchor="x", key=6)


def test_windows_in_which_no_query_attends_ahead_are_causal(tmp_path: Path) -> None:
    found = studied(OWN_BLOCK, tmp_path, masked="s = Add(raw, causal)")
    assert isinstance(found, Windows)
    assert found.causal


def cut_and_taken(windows: str) -> str:
    """Windows of a sequence, of which those of the given numbers are taken."""
    return OWN_BLOCK.replace("q = Reshape(x, cut)", f"c = Reshape(x, cut) q = Gather<axis=1>(c, {windows})")


def test_rows_in_another_order_are_recorded(tmp_path: Path) -> None:
    found = studied(cut_and_taken("reverse"), tmp_path)
    band = BlockBand(block=2, before=0, after=0)
    assert found == Windows(band, anchor="x", key=6, order=(4, 5, 2, 3, 0, 1))


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [
        (cut_and_taken("twice"), "its rows are not its queries, each once"),
        (
            OWN_BLOCK.replace("k = Identity(q)", "y4 = Reshape(y, cut) k = CumSum(y4, depth)"),
            "nothing that its key comes from is a sequence",
        ),
    ],
    ids=["windows twice", "keys that are not traced"],
)
def test_windows_that_cannot_be_read_have_a_reason(nodes: str, reason: str, tmp_path: Path) -> None:
    assert studied(nodes, tmp_path) == Untappable(f"which keys its windows hold is not known: {reason}")


def test_a_layout_without_windows_is_not_studied(tmp_path: Path) -> None:
    model = model_of(OWN_BLOCK)
    dense = Layout((WINDOWED[0], (Factor("head", 3),), *WINDOWED[2:]), kv_heads=3, head_dim=4)
    assert windows_of(model, {"attention_0": dense}, Sampler(signature_of(model.graph)), tmp_path) == {}


def product(op_type: str, **attributes: object) -> Contraction:
    node = helper.make_node(op_type, ["one", "other"], ["out"], **attributes)
    found = Contraction.of(ir.from_proto(node))
    assert found is not None
    return found


NUMBERS = np.broadcast_to(np.arange(1, 4)[:, np.newaxis], (2, 3, 5))
"""The numbers of three vectors of five channels, (B, T, D)."""


@pytest.mark.parametrize(
    ("op_type", "attributes", "keys"),
    [
        ("MatMul", {}, (2, 5, 7)),
        ("Einsum", {"equation": "bid,bjd->bij"}, (2, 7, 5)),
        ("Einsum", {"equation": "bid,bjd->bji"}, (2, 7, 5)),
    ],
)
def test_each_score_has_the_number_of_its_query(
    op_type: str, attributes: dict[str, str], keys: tuple[int, ...]
) -> None:
    rows = rows_of(product(op_type, **attributes), NUMBERS, np.zeros(keys))
    expected = np.broadcast_to(np.arange(1, 4)[:, np.newaxis], (2, 3, 7))
    np.testing.assert_array_equal(rows, expected.transpose(0, 2, 1) if "ji" in str(attributes) else expected)


@pytest.mark.parametrize(
    ("op_type", "attributes", "position"),
    [("MatMul", {}, 1), ("Einsum", {"equation": "bjd,bij->bid"}, 0)],
)
def test_each_weight_has_the_number_of_its_key(op_type: str, attributes: dict[str, str], position: int) -> None:
    columns = columns_of(product(op_type, **attributes), position, NUMBERS, np.zeros((2, 7, 3)))
    np.testing.assert_array_equal(columns, np.broadcast_to(np.arange(1, 4), (2, 7, 3)))
