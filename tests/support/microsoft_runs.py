"""Runs hand-made graphs of onnxruntime's operators with their taps, and compares both with the definition.

A tap is what conversion adds to a graph so that it returns attention weights, for the rows listed in the input `ITEMS`.
Each function fails if the operator cannot be tapped.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import numpy as np
import onnx
from attnserve_server.conversion.graphs.reading import checked, save
from attnserve_server.conversion.rewrite.taps import tapped
from attnserve_server.engine.session import RuntimeSession

Array = np.ndarray[Any, np.dtype[Any]]

ITEMS = "attention_items.attention_0"
WEIGHTS = "attention.attention_0"
# float32 has 24 bits; a softmax over tens of terms loses a few of them.
FLOAT32_TOLERANCE = 1e-5
# float16 has 11 bits: query and key enter rounded, and the operator's own output is rounded again.
FLOAT16_TOLERANCE = 1e-2
# A score to which -10,000 is added keeps three decimal places in float32: where all keys of a row are so masked, two
# sums that round apart differ by 1e-3.
SHIFTED_TOLERANCE = 1e-3


class Case(Protocol):
    """A graph of one operator, and its definition."""

    batch: int
    dtype: type

    def feeds(self) -> dict[str, Array]: ...
    def model(self) -> onnx.ModelProto: ...
    def reference(self) -> Array: ...
    def output_from(self, weights: Array) -> Array: ...


def run(case: Case, items: Sequence[int], fetches: Sequence[str] = (WEIGHTS,)) -> list[Array]:
    """Return the outputs `fetches` of the case's own feeds, with the tap of the rows `items`."""
    model, sites = tapped(checked(case.model(), "case"))
    assert [site.unavailable_reason for site in sites.values()] == [""], sites
    with TemporaryDirectory() as folder:
        save(model, Path(folder) / "model.onnx")
        session = RuntimeSession.load(Path(folder) / "model.onnx", provider="CPUExecutionProvider")
        return list(session.run({**case.feeds(), ITEMS: np.array(items, np.int64)}, list(fetches)))


def run_tap_alone(case: Case, items: Sequence[int]) -> Array:
    """The tap's answer without the operator, where onnxruntime's CPU kernel does not take the operator's form."""
    model, sites = tapped(checked(case.model(), "case"))
    (site,) = sites.values()
    assert site.unavailable_reason == ""
    model.graph.outputs.pop(0)
    model.graph.remove(site.node, safe=True)
    read = {value for node in model.graph for value in node.inputs}
    for value in [value for value in model.graph.inputs if value not in read]:
        model.graph.inputs.remove(value)
    kept = {value.name for value in model.graph.inputs}
    with TemporaryDirectory() as folder:
        save(model, Path(folder) / "model.onnx")
        session = RuntimeSession.load(Path(folder) / "model.onnx", provider="CPUExecutionProvider")
        feeds = {name: array for name, array in case.feeds().items() if name in kept}
        (weights,) = session.run({**feeds, ITEMS: np.array(items, np.int64)}, [WEIGHTS])
    return np.asarray(weights)


def assert_equals_definition(case: Case, shifted: Array | None = None, *, everywhere: bool = True) -> None:
    """Weights against the definition, and weights @ value against what the operator itself answers.

    Args:
        case: the graph.
        shifted: bool, broadcasting to (B, 1, L, 1): rows in which every key is masked by a number added to it.
        everywhere: whether the operator's output counts in rows whose weights are 0 too.
    """
    reference = case.reference()
    weights, output = run(case, range(case.batch), (WEIGHTS, "output"))
    assert weights.dtype == np.float32
    base = FLOAT16_TOLERANCE if case.dtype is np.float16 else FLOAT32_TOLERANCE
    tolerance = np.where(False if shifted is None else shifted, max(base, SHIFTED_TOLERANCE), base)
    assert (np.abs(weights - reference) <= tolerance).all(), np.abs(weights - reference).max()
    loosest = 5 * float(tolerance.max())
    expected = case.output_from(reference)
    if not everywhere:
        heads = reference.shape[1]
        seen = np.repeat(reference.any(axis=-1).transpose(0, 2, 1), expected.shape[2] // heads, axis=2)
        output, expected = np.where(seen, output, 0), np.where(seen, expected, 0)
    np.testing.assert_allclose(output, expected, rtol=0, atol=loosest)
    sums = weights.sum(axis=-1)
    np.testing.assert_allclose(sums, reference.sum(axis=-1), rtol=0, atol=max(base, FLOAT32_TOLERANCE))
