"""Attention in unusual forms is tapped, and equal to its definition in float64.

A site is a place in a graph that computes attention; it is tapped if the converted graph returns its weights. Each form
is a function that adds its nodes to `Steps`, and returns its output and its definition.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from attnserve_server.conversion.assemble import assemble
from attnserve_server.conversion.base.steps import Steps as Progress
from attnserve_server.conversion.convert import PrepareRequest, prepare_bundle
from attnserve_server.conversion.inputs.signature import signature_of
from attnserve_server.conversion.probing.feeds import Sampler
from attnserve_server.engine.session import RuntimeSession
from step_graphs import WIDTH, Steps

Array = np.ndarray[Any, np.dtype[Any]]


def axes(steps: Steps, *places: int) -> str:
    return steps.const(kind=np.int64, value=list(places))


def softmax(scores: Array) -> Array:
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def weights_of(steps: Steps, keys: str = "y") -> str:
    return steps.op("Softmax", steps.op("MatMul", "x", steps.turned(keys)), axis=-1)


def bahdanau(steps: Steps) -> tuple[str, Callable[[Array, Array], Array]]:
    """Each score a function of the sum of query and key."""
    table = steps.const(WIDTH, 1)
    both = steps.op("Add", steps.op("Unsqueeze", "x", axes(steps, 2)), steps.op("Unsqueeze", "y", axes(steps, 1)))
    scores = steps.op("Squeeze", steps.op("MatMul", steps.op("Tanh", both), table), axes(steps, 3))
    one = steps.constants[table].astype(np.float64)
    return (
        steps.op("MatMul", steps.op("Softmax", scores, axis=-1), "y"),
        lambda x, y: softmax((np.tanh(x[:, :, None] + y[:, None]) @ one)[..., 0]),
    )


def graph_attention(steps: Steps) -> tuple[str, Callable[[Array, Array], Array]]:
    """One number of each query and one of each key, added."""
    tables = [steps.const(WIDTH, 1) for _ in range(2)]
    query, key = (steps.op("MatMul", name, table) for name, table in zip(("x", "y"), tables, strict=True))
    scores = steps.op("LeakyRelu", steps.op("Add", steps.turned(key), query), alpha=0.2)
    of_query, of_key = (steps.constants[table].astype(np.float64) for table in tables)

    def reference(x: Array, y: Array) -> Array:
        sums = x @ of_query + (y @ of_key).swapaxes(1, 2)
        return softmax(np.where(sums > 0, sums, 0.2 * sums))

    return steps.op("MatMul", steps.op("Softmax", scores, axis=-1), "y"), reference


def difference(steps: Steps) -> tuple[str, Callable[[Array, Array], Array]]:
    """Source: Ye et al. 2024, "Differential Transformer"."""
    noise = steps.op("Mul", weights_of(steps, steps.op("Tanh", "y")), steps.const(value=0.3))
    return (
        steps.op("MatMul", steps.op("Sub", weights_of(steps), noise), "y"),
        lambda x, y: softmax(x @ y.swapaxes(1, 2)) - 0.3 * softmax(x @ np.tanh(y).swapaxes(1, 2)),
    )


def keys_apart(steps: Steps) -> tuple[str, Callable[[Array, Array], Array]]:
    """Two sets of keys, each with a separate softmax: all of them, and the first two again."""
    other = steps.op("Tanh", steps.op("Slice", "y", axes(steps, 0), axes(steps, 2), axes(steps, 1)))
    weights = steps.op("Concat", weights_of(steps), weights_of(steps, other), axis=-1)
    return (
        steps.op("MatMul", weights, steps.op("Concat", "y", other, axis=1)),
        lambda x, y: np.concatenate(
            [softmax(x @ y.swapaxes(1, 2)), softmax(x @ np.tanh(y[:, :2]).swapaxes(1, 2))], axis=-1
        ),
    )


def squared(steps: Steps) -> tuple[str, Callable[[Array, Array], Array]]:
    return (
        steps.op("MatMul", steps.op("Pow", weights_of(steps), steps.const(value=2.0)), "y"),
        lambda x, y: softmax(x @ y.swapaxes(1, 2)) ** 2,
    )


def cut_off(steps: Steps) -> tuple[str, Callable[[Array, Array], Array]]:
    """Small weights are set to zero."""
    less = steps.op("Sub", weights_of(steps), steps.const(value=0.1))
    return (
        steps.op("MatMul", steps.op("Relu", less), "y"),
        lambda x, y: np.maximum(softmax(x @ y.swapaxes(1, 2)) - 0.1, 0),
    )


FORMS = [bahdanau, graph_attention, difference, keys_apart, squared, cut_off]


@pytest.mark.parametrize("form", FORMS)
def test_unusual_form_equals_its_definition(
    form: Callable[[Steps], tuple[str, Callable[[Array, Array], Array]]], tmp_path: Path
) -> None:
    steps = Steps()
    output, reference = form(steps)
    model = steps.model(output)
    done = assemble(model, Sampler(signature_of(model.graph), 0), tmp_path, Progress.silent())
    (site,) = done.sites
    assert not site.unavailable_reason
    assert site.heads == 1
    session = RuntimeSession.load(done.model_path, provider="CPUExecutionProvider")
    rng = np.random.default_rng(4)
    x, y = (rng.normal(size=(3, length, WIDTH)).astype(np.float32) for length in (4, 6))
    (weights,) = session.run({"x": x, "y": y, site.items_input: np.array([2, 0])}, [site.weights_output])
    expected = reference(x.astype(np.float64), y.astype(np.float64))[[2, 0], None]
    # float32 sums in another order.
    np.testing.assert_allclose(weights, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_unusual_form_is_prepared(
    form: Callable[[Steps], tuple[str, Callable[[Array, Array], Array]]], tmp_path: Path
) -> None:
    steps = Steps()
    onnx.save(steps.model(form(steps)[0]), tmp_path / "case.onnx")
    request = PrepareRequest(file=tmp_path / "case.onnx", name="case", repository=tmp_path, max_length=40)
    (site,) = prepare_bundle(request).manifest.sites
    assert site.available
