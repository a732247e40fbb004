"""Operands that the runtime does not broadcast: after the repair, graphs run on a batch and give the defined values.

Operands are masks of Attention, and angles and positions of rotary embeddings. `repaired` returns the graph and whether
it changed; one that onnxruntime takes as it is stays unchanged.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from attnserve_server.conversion.graphs.reading import checked
from attnserve_server.conversion.rewrite.repair import repair
from onnx import numpy_helper
from onnx.parser import parse_model
from opened import runner_of

Array = np.ndarray[Any, np.dtype[Any]]

ROWS, HEADS, QUERIES, KEYS, SIZE = 3, 2, 4, 5, 8
RNG = np.random.default_rng(0)


def repaired(model: onnx.ModelProto) -> tuple[onnx.ModelProto, bool]:
    """The model, and whether the repair changed it."""
    made = ir.from_proto(checked(model, "model"))
    changed = repair(made.graph)
    return checked(ir.to_proto(made), "model"), changed


def attention(mask: str, opset: int = 23) -> onnx.ModelProto:
    """One Attention operator with a mask of this type, such as `bool[B, 1, 1, S]`."""
    return parse_model(f"""
        <ir_version: 10, opset_import: ["": {opset}]>
        attention (float[B, {HEADS}, L, {SIZE}] q, float[B, {HEADS}, S, {SIZE}] k, float[B, {HEADS}, S, {SIZE}] v,
            {mask} mask) => (float[B, {HEADS}, L, {SIZE}] y)
        {{ y = Attention(q, k, v, mask) }}
    """)


def expected(q: Array, k: Array, v: Array, mask: Array) -> Array:
    """Attention in float64 with a mask of shape (B, H, L, S) that keeps where True, or is added."""
    scores = q.astype(np.float64) @ k.astype(np.float64).swapaxes(-1, -2) / np.sqrt(SIZE)
    scores = np.where(mask, scores, -np.inf) if mask.dtype == bool else scores + mask
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return (weights / weights.sum(-1, keepdims=True)) @ v.astype(np.float64)


def operands() -> dict[str, Array]:
    lengths = {"q": QUERIES, "k": KEYS, "v": KEYS}
    return {name: RNG.normal(size=(ROWS, HEADS, n, SIZE)).astype(np.float32) for name, n in lengths.items()}


def drawn(shape: tuple[int, ...], kind: str) -> Array:
    """A mask of a shape that keeps the first key."""
    if kind == "float":
        return RNG.normal(size=shape).astype(np.float32)
    mask = RNG.random(shape) < 0.6
    mask[..., 0] = True
    return mask


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize(
    ("declared", "shape"),
    [
        ("B, 1, 1, S", (ROWS, 1, 1, KEYS)),
        ("1, 1, 1, S", (1, 1, 1, KEYS)),
        (f"B, {HEADS}, 1, S", (ROWS, HEADS, 1, KEYS)),
        (f"{HEADS}, 1, S", (HEADS, 1, KEYS)),
        ("1, S", (1, KEYS)),
        ("S", (KEYS,)),
        ("B, 1, L, 1", (ROWS, 1, QUERIES, 1)),
        ("1, 1", (1, 1)),
    ],
)
def test_masks_that_broadcast_along_queries_or_keys_are_expanded(
    kind: str, declared: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    model, changed = repaired(attention(f"{kind}[{declared}]"))
    feeds, mask = operands(), drawn(shape, kind)
    [found] = runner_of(model, tmp_path).run({**feeds, "mask": mask}, ["y"]).values()
    assert changed
    np.testing.assert_allclose(found, expected(**feeds, mask=mask), atol=1e-6)


@pytest.mark.parametrize(
    ("declared", "shape"),
    [
        ("B, 1, L, S", (ROWS, 1, QUERIES, KEYS)),
        ("L, S", (QUERIES, KEYS)),
        (f"{HEADS}, L, S", (HEADS, QUERIES, KEYS)),
        (f"1, {HEADS}, L, S", (1, HEADS, QUERIES, KEYS)),
    ],
)
def test_masks_that_the_runtime_takes_are_left_as_they_are(
    declared: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    model, changed = repaired(attention(f"bool[{declared}]"))
    feeds, mask = operands(), drawn(shape, "bool")
    [found] = runner_of(model, tmp_path).run({**feeds, "mask": mask}, ["y"]).values()
    assert not changed
    np.testing.assert_allclose(found, expected(**feeds, mask=mask), atol=1e-6)


@pytest.mark.parametrize("rows", [HEADS, ROWS])
def test_mask_whose_first_axis_is_the_batch_is_not_read_as_heads(rows: int, tmp_path: Path) -> None:
    model, changed = repaired(attention("bool[B, L, S]"))
    feeds = {name: array[:rows] for name, array in operands().items()}
    mask = drawn((rows, QUERIES, KEYS), "bool")
    [found] = runner_of(model, tmp_path).run({**feeds, "mask": mask}, ["y"]).values()
    assert changed
    np.testing.assert_allclose(found, expected(**feeds, mask=mask[:, None]), atol=1e-6)


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize(("declared", "shape"), [("L, 3", (QUERIES, 3)), ("B, 1, 1, 3", (ROWS, 1, 1, 3))])
def test_masks_of_fewer_columns_hide_the_further_keys(
    kind: str, declared: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    model, changed = repaired(attention(f"{kind}[{declared}]", opset=24))
    feeds, mask = operands(), drawn(shape, kind)
    [found] = runner_of(model, tmp_path).run({**feeds, "mask": mask}, ["y"]).values()
    hidden = np.full((*shape[:-1], KEYS - 3), False if kind == "bool" else -np.inf)
    whole = np.concatenate([mask, hidden.astype(mask.dtype)], axis=-1)
    assert changed
    np.testing.assert_allclose(found, expected(**feeds, mask=whole), atol=1e-6)


def test_one_row_of_rotary_angles_is_shared_by_the_batch(tmp_path: Path) -> None:
    model, changed = repaired(
        parse_model(f"""
            <ir_version: 10, opset_import: ["": 23]>
            rotary (float[B, {HEADS}, L, {SIZE}] x, float[1, L, {SIZE // 2}] cos, float[1, L, {SIZE // 2}] sin)
                => (float[B, {HEADS}, L, {SIZE}] y)
            {{ y = RotaryEmbedding(x, cos, sin) }}
        """)
    )
    x = RNG.normal(size=(ROWS, HEADS, QUERIES, SIZE)).astype(np.float32)
    angles = RNG.normal(size=(1, QUERIES, SIZE // 2))
    cos, sin = (array.astype(np.float32) for array in (np.cos(angles), np.sin(angles)))
    [found] = runner_of(model, tmp_path).run({"x": x, "cos": cos, "sin": sin}, ["y"]).values()
    one, other = x[..., : SIZE // 2], x[..., SIZE // 2 :]
    rotated = np.concatenate([cos[:, None] * one - sin[:, None] * other, sin[:, None] * one + cos[:, None] * other], -1)
    assert changed
    np.testing.assert_allclose(found, rotated, atol=1e-6)


TABLES = tuple(RNG.normal(size=(9, SIZE // 2)).astype(np.float32) for _ in range(2))


def with_tables(nodes: str) -> onnx.ModelProto:
    """A graph of these nodes over `x` and `positions`, with tables of cos and sin."""
    model = parse_model(f"""
        <ir_version: 10, opset_import: ["": 23]>
        rotary (float[B, {HEADS}, L, {SIZE}] x, int64[1, L] positions) => (float[B, {HEADS}, L, {SIZE}] y) {{ {nodes} }}
    """)
    model.graph.initializer.extend(
        numpy_helper.from_array(table, name) for name, table in zip(("cos", "sin"), TABLES, strict=True)
    )
    return model


@pytest.mark.parametrize("place", ["graph", "branch"])
def test_one_row_of_positions_is_shared_by_the_batch(place: str, tmp_path: Path) -> None:
    rotary = "y = RotaryEmbedding(x, cos, sin, positions)"
    branch = f"""
        yes = Constant<value = bool {{1}}>()
        y = If(yes) <
            then_branch = then () => (y) {{ {rotary} }},
            else_branch = other () => (y2) {{ y2 = Identity(x) }}>
    """
    model, changed = repaired(with_tables(rotary if place == "graph" else branch))
    x = RNG.normal(size=(ROWS, HEADS, QUERIES, SIZE)).astype(np.float32)
    positions = np.array([[3, 0, 8, 1]], np.int64)
    [found] = runner_of(model, tmp_path).run({"x": x, "positions": positions}, ["y"]).values()
    cos, sin = (table[positions][:, None] for table in TABLES)
    one, other = x[..., : SIZE // 2], x[..., SIZE // 2 :]
    assert changed
    np.testing.assert_allclose(found, np.concatenate([cos * one - sin * other, sin * one + cos * other], -1), atol=1e-6)
