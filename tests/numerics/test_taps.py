"""Taps against the definition of attention, written in float64, and against the operator's own output.

A tap is what conversion adds to a graph so that it returns attention weights. `Case` makes a graph of one `Attention`
of ai.onnx, and its weights in float64.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import pytest
from attention_graphs import Array, Case
from attnserve_server.conversion.graphs.reading import checked, save
from attnserve_server.conversion.rewrite.taps import tapped
from attnserve_server.engine.session import RuntimeSession
from hypothesis import given, settings
from hypothesis import strategies as st

ITEMS = "attention_items.attention_0"
WEIGHTS = "attention.attention_0"
# float32 has 24 bits; a softmax over tens of terms loses a few of them.
FLOAT32_TOLERANCE = 1e-5
# float16 has 11 bits: query and key enter rounded, and the operator's own output is rounded again.
FLOAT16_TOLERANCE = 1e-2


def run(case: Case, folder: Path, items: Array | list[int], fetches: tuple[str, ...] = (WEIGHTS,)) -> list[Array]:
    model, sites = tapped(checked(case.model(), "case"))
    assert [site.unavailable_reason for site in sites.values()] == [""]
    save(model, folder / "model.onnx")
    session = RuntimeSession.load(folder / "model.onnx", provider="CPUExecutionProvider")
    return session.run({**case.feeds(), ITEMS: np.array(items, np.int64)}, fetches)


def assert_equals_definition(case: Case, folder: Path) -> None:
    tolerance = FLOAT16_TOLERANCE if case.dtype is np.float16 else FLOAT32_TOLERANCE
    weights, output = run(case, folder, np.arange(case.batch), (WEIGHTS, "output"))
    reference = case.reference()
    assert weights.dtype == np.float32
    np.testing.assert_allclose(weights, reference, rtol=0, atol=tolerance)
    np.testing.assert_allclose(output, case.output_from(reference), rtol=0, atol=5 * tolerance)
    sums = weights.sum(axis=-1)
    np.testing.assert_allclose(sums, np.where(reference.any(axis=-1), 1.0, 0.0), rtol=0, atol=FLOAT32_TOLERANCE)


def mask_of(shape: tuple[int, ...], kind: str) -> Array:
    """A mask that hides about a third; every row keeps its first key."""
    rng = np.random.default_rng(7)
    keep = rng.random(shape) > 0.35
    keep[..., 0] = True
    bias = rng.normal(size=shape)
    filled = {
        "bool": keep,
        "bias": bias.astype(np.float32),
        "minus infinity": np.where(keep, bias, -np.inf).astype(np.float32),
        "lowest": np.where(keep, 0, np.finfo(np.float32).min).astype(np.float32),
        "lowest half": np.where(keep, 0, np.finfo(np.float16).min).astype(np.float16),
    }
    return filled[kind]


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"attributes": {"scale": 0.7}},
    "softcap": {"attributes": {"softcap": 1.5, "scale": 2.0}},
    "softcap before the mask": {"attributes": {"softcap": 1.5}, "mask": mask_of((5, 5), "minus infinity")},
    "causal": {"attributes": {"is_causal": 1}},
    "causal with fewer queries": {"attributes": {"is_causal": 1}, "queries": 3, "keys": 6},
    "causal with more queries": {"attributes": {"is_causal": 1}, "queries": 6, "keys": 3},
    "causal and masked": {"attributes": {"is_causal": 1}, "mask": mask_of((3, 1, 5, 5), "bool")},
    "causal and biased": {"attributes": {"is_causal": 1}, "mask": mask_of((5, 5), "bias")},
    "cross": {"queries": 3, "keys": 7},
    "one query": {"queries": 1, "keys": 9},
    "grouped heads": {"kv_heads": 2},
    "one key head": {"kv_heads": 1},
    "one head": {"heads": 1, "kv_heads": 1},
    "wider values": {"value_dim": 12},
    "opset 24": {"opset": 24, "mask": mask_of((3, 4, 5, 5), "bool")},
    "opset 28": {"opset": 28, "mask": mask_of((3, 4, 5, 5), "bool"), "attributes": {"softcap": 1.5}},
    "counts of keys": {"opset": 24, "keys": 7, "counts": np.array([7, 2, 0])},
    "counts of keys and a mask": {"opset": 28, "counts": np.array([5, 3, 1]), "mask": mask_of((3, 1, 5, 5), "bias")},
    "causal, the last query at the last key that counts": {
        "opset": 24,
        "keys": 9,
        "counts": np.array([9, 5, 3]),
        "attributes": {"is_causal": 1},
    },
    "window up to the last key that counts": {
        "opset": 25,
        "keys": 9,
        "counts": np.array([9, 6, 3]),
        "attributes": {"left_window_size": 2, "right_window_size": 1},
    },
}


@pytest.mark.parametrize("packed", [False, True], ids=["4-D", "3-D"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_equal_the_definition(variant: str, packed: bool, tmp_path: Path) -> None:
    assert_equals_definition(Case(packed=packed, **VARIANTS[variant]), tmp_path)


@pytest.mark.parametrize("kind", ["bool", "bias", "minus infinity", "lowest"])
@pytest.mark.parametrize(
    "shape", [(5, 6), (1, 5, 6), (4, 5, 6), (1, 1, 5, 6), (3, 1, 5, 6), (1, 4, 5, 6), (3, 4, 5, 6)]
)
def test_masks_of_every_rank_and_kind_hide_what_the_operator_hides(
    shape: tuple[int, ...], kind: str, tmp_path: Path
) -> None:
    assert_equals_definition(Case(keys=6, mask=mask_of(shape, kind)), tmp_path)


@pytest.mark.parametrize("shape", [(1, 6), (1, 1, 6), (3, 1, 1, 6), (1, 1, 1, 6)])
def test_masks_may_broadcast_over_queries(shape: tuple[int, ...], tmp_path: Path) -> None:
    # The standard allows it and the runtime's operator does not, so the tap runs without the operator.
    case = Case(keys=6, mask=mask_of(shape, "bool"))
    model, sites = tapped(checked(case.model(), "case"))
    model.graph.outputs.pop(0)
    model.graph.remove(sites["attention_0"].node, safe=True)
    model.graph.inputs.remove(next(value for value in model.graph.inputs if value.name == "value"))
    save(model, tmp_path / "model.onnx")
    session = RuntimeSession.load(tmp_path / "model.onnx", provider="CPUExecutionProvider")
    feeds = {name: array for name, array in case.feeds().items() if name != "value"}
    (weights,) = session.run({**feeds, ITEMS: np.arange(3)}, [WEIGHTS])
    np.testing.assert_allclose(weights, case.reference(), rtol=0, atol=FLOAT32_TOLERANCE)


@pytest.mark.parametrize("variant", ["plain", "grouped heads", "causal", "softcap"])
def test_float16_is_computed_in_float32(variant: str, tmp_path: Path) -> None:
    assert_equals_definition(Case(dtype=np.float16, **VARIANTS[variant]), tmp_path)


def test_lowest_float16_is_masked(tmp_path: Path) -> None:
    assert_equals_definition(Case(dtype=np.float16, mask=mask_of((3, 1, 5, 5), "lowest half")), tmp_path)


@pytest.mark.parametrize("kind", ["bool", "minus infinity", "lowest", "lowest half"])
@pytest.mark.parametrize("causal", [0, 1])
def test_fully_masked_rows_are_zeros(kind: str, causal: int, tmp_path: Path) -> None:
    mask = mask_of((3, 1, 5, 5), kind)
    nothing = {"bool": False, "minus infinity": -np.inf}.get(kind, np.finfo(mask.dtype).min if kind != "bool" else 0)
    mask[1, 0, 2] = nothing
    dtype = np.float16 if kind == "lowest half" else np.float32
    case = Case(dtype=dtype, mask=mask, attributes={"is_causal": causal})
    assert_equals_definition(case, tmp_path)
    (weights,) = run(case, tmp_path, [1])
    assert not weights[0, :, 2].any()
    assert weights[0, :, 1].any()


@pytest.mark.parametrize("items", [[], [2], [2, 0], [1, 1, 1], [0, 2, 2, 1]], ids=str)
@pytest.mark.parametrize("variant", ["plain", "grouped heads", "causal and masked", "causal and biased", "softcap"])
@pytest.mark.parametrize("packed", [False, True], ids=["4-D", "3-D"])
def test_only_selected_rows_are_returned_in_their_order(
    variant: str, items: list[int], packed: bool, tmp_path: Path
) -> None:
    case = Case(packed=packed, **VARIANTS[variant])
    (weights,) = run(case, tmp_path, items)
    assert weights.shape == (len(items), case.heads, case.queries, case.keys)
    np.testing.assert_allclose(weights, case.reference()[items], rtol=0, atol=FLOAT32_TOLERANCE)


def test_operator_gives_the_same_bits_with_and_without_a_selection(tmp_path: Path) -> None:
    case = Case(mask=mask_of((3, 1, 5, 5), "bool"))
    (quiet,) = run(case, tmp_path, [], ("output",))
    asked, _ = run(case, tmp_path, [0, 1, 2], ("output", WEIGHTS))
    np.testing.assert_array_equal(quiet, asked)


@pytest.mark.parametrize("shape", [(5, 5), (1, 1, 5, 5), (3, 1, 5, 5)])
def test_sites_that_share_a_mask_return_their_own_selections(shape: tuple[int, ...], tmp_path: Path) -> None:
    case = Case(mask=mask_of(shape, "bool"))
    model = case.model()
    model.graph.node.append(
        onnx.helper.make_node("Attention", ["query", "key", "value", "mask"], ["second"], scale=0.9)
    )
    model.graph.output.append(onnx.helper.make_tensor_value_info("second", onnx.TensorProto.FLOAT, [None] * 4))
    graph, sites = tapped(checked(model, "case"))
    assert list(sites) == ["attention_0", "attention_1"]
    save(graph, tmp_path / "model.onnx")
    session = RuntimeSession.load(tmp_path / "model.onnx", provider="CPUExecutionProvider")
    feeds = {**case.feeds(), ITEMS: np.array([2]), "attention_items.attention_1": np.array([0, 1])}
    first, second = session.run(feeds, [WEIGHTS, "attention.attention_1"])
    other = replace(case, attributes={"scale": 0.9}).reference()
    np.testing.assert_allclose(first, case.reference()[[2]], rtol=0, atol=FLOAT32_TOLERANCE)
    np.testing.assert_allclose(second, other[[0, 1]], rtol=0, atol=FLOAT32_TOLERANCE)


def test_tap_without_its_scale_differs_from_the_definition(tmp_path: Path) -> None:
    # The positive control: the comparison above fails for a wrong tap.
    case = Case(attributes={"scale": 0.7})
    (weights,) = run(case, tmp_path, [0, 1, 2])
    wrong = replace(case, attributes={"scale": 0.71}).reference()
    assert np.abs(weights - wrong).max() > 10 * FLOAT32_TOLERANCE


@st.composite
def cases(draw: st.DrawFn) -> Case:
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    batch, heads = draw(st.integers(1, 4)), kv_heads * draw(st.sampled_from([1, 2, 3]))
    queries, keys = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    mask = None
    kind = draw(st.sampled_from([None, "bool", "bias", "minus infinity", "lowest"]))
    if kind is not None:
        leading = [(), (1,), (heads,), (1, 1), (batch, 1), (1, heads), (batch, heads)]
        mask = mask_of((*draw(st.sampled_from(leading)), queries, keys), kind)
        if kind != "bias" and draw(st.booleans()):
            mask[..., draw(st.integers(0, queries - 1)), :] = mask.dtype.type(
                {"bool": 0, "minus infinity": -np.inf, "lowest": np.finfo(np.float32).min}[kind]
            )
    attributes: dict[str, Any] = {"is_causal": draw(st.integers(0, 1))}
    if draw(st.booleans()):
        attributes["scale"] = draw(st.floats(0.0625, 2.0, width=32))
    if draw(st.booleans()):
        attributes["softcap"] = draw(st.floats(0.5, 30.0, width=32))
    return Case(
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        queries=queries,
        keys=keys,
        head_dim=draw(st.integers(1, 16)),
        value_dim=draw(st.integers(1, 16)),
        packed=draw(st.booleans()),
        mask=mask,
        attributes=attributes,
        opset=draw(st.sampled_from([23, 24])),
        seed=draw(st.integers(0, 2**16)),
    )


@settings(max_examples=150)
@given(cases())
def test_any_combination_equals_the_definition(case: Case) -> None:
    with TemporaryDirectory() as folder:
        assert_equals_definition(case, Path(folder))


@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize(("left", "right"), [(2, 1), (0, 0), (3, -1), (-1, 2)])
def test_windows_of_the_operator_hide_what_is_outside_them(left: int, right: int, causal: int, tmp_path: Path) -> None:
    attributes = {"left_window_size": left, "right_window_size": right, "is_causal": causal}
    assert_equals_definition(Case(queries=7, keys=7, opset=25, attributes=attributes), tmp_path)
