"""Shapes of a run's tensors against the manifest: a difference fails the run, and the log names it.

`site_with` and `shown_as` make a manifest that differs from the model of conftest.py. Each sequence of the run gets
InternalFault, and warm-up raises UnexpectedShape.
"""

from __future__ import annotations

import logging
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attnserve_server.domain.clock import MonotonicClock
from attnserve_server.domain.errors import InternalFault
from attnserve_server.domain.values import PreparedSequence, SequenceResult
from attnserve_server.engine import warmup
from attnserve_server.engine.collation import ShapeCheck, UnexpectedShape, collate
from attnserve_server.engine.executor import Executor, Outcome
from attnserve_server.engine.session import RunHandle, RuntimeSession
from attnserve_server.model.bands import SlidingBand
from attnserve_server.model.manifest import AxisSpec, DerivedLength, Manifest, OutputSpec
from attnserve_server.observability.metrics import Metrics

Make = Callable[..., PreparedSequence]
DERIVED = AxisSpec(symbol="half", max_length=64, paddable=True, derived=DerivedLength(source="seq", stride=2, offset=1))


def site_with(manifest: Manifest, **changes: Any) -> Manifest:
    """A manifest whose first site differs from the graph's."""
    first = manifest.sites[0].model_copy(update=changes)
    return manifest.model_copy(update={"sites": (first, *manifest.sites[1:])})


def shown_as(manifest: Manifest, *shape: str | int) -> Manifest:
    """A manifest whose `last_hidden_state` has another shape than the graph's, (seq, 8)."""
    hidden = OutputSpec(name="last_hidden_state", dtype="float32", shape=shape)
    return manifest.model_copy(update={"outputs": (hidden, *manifest.outputs[1:]), "axes": (*manifest.axes, DERIVED)})


async def outcomes(path: Path, manifest: Manifest, sequences: list[PreparedSequence]) -> list[Outcome]:
    session = RuntimeSession.load(path, provider="CPUExecutionProvider", intra_op_threads=1)
    executor = Executor([session], manifest, Metrics().model(manifest.name, "1"), MonotonicClock(), 1)
    executor.start()
    try:
        return await executor.run(sequences, RunHandle(), 0)
    finally:
        await executor.aclose()


@pytest.mark.parametrize(
    ("changes", "declared", "expected", "found"),
    [
        ({"heads": 3}, ("items", 3, "seq", "seq"), (1, 3, 4, 4), (1, 2, 4, 4)),
        ({"key_axis": "half"}, ("items", 2, "seq", "half"), (1, 2, 4, 2), (1, 2, 4, 4)),
        (
            {"form": "windowed", "band": SlidingBand(before=1, after=1)},
            ("items", 2, "seq", 3),
            (1, 2, 4, 3),
            (1, 2, 4, 4),
        ),
    ],
)
async def test_weights_of_another_shape_fail_the_run_and_are_logged(
    changes: dict[str, Any],
    declared: tuple[str | int, ...],
    expected: tuple[int, ...],
    found: tuple[int, ...],
    embedder_path: Path,
    manifest: Manifest,
    sequence_of: Make,
    caplog: pytest.LogCaptureFixture,
) -> None:
    wrong = site_with(manifest, **changes).model_copy(update={"axes": (*manifest.axes, DERIVED)})
    with caplog.at_level(logging.ERROR):
        results = await outcomes(embedder_path, wrong, [sequence_of([1, 2, 3, 4], [0]), sequence_of([1, 2], [])])
    assert isinstance(results[0], InternalFault)
    assert isinstance(results[1], SequenceResult), "the sequence without these weights has its answer"
    (record,) = caplog.records
    assert record.getMessage() == "a tensor has another shape than the manifest declares"
    assert vars(record)["tensor"] == "attention.site0"
    assert (vars(record)["declared"], vars(record)["expected"], vars(record)["found"]) == (declared, expected, found)


@pytest.mark.parametrize("shape", [("seq", 9), ("seq",), (8,), ("half", 8), ("seq", 8, 1)])
async def test_output_of_another_shape_fails_the_run(
    shape: tuple[str | int, ...],
    embedder_path: Path,
    manifest: Manifest,
    sequence_of: Make,
    caplog: pytest.LogCaptureFixture,
) -> None:
    wrong = shown_as(manifest, *shape)
    hidden = ("last_hidden_state",)
    sequences = [sequence_of([1, 2, 3, 4], outputs=hidden), sequence_of([1, 2], outputs=hidden)]
    results = await outcomes(embedder_path, wrong, sequences)
    assert all(isinstance(result, InternalFault) for result in results)
    assert {vars(record)["tensor"] for record in caplog.records} == {"last_hidden_state"}


async def test_declared_shapes_pass(embedder_path: Path, manifest: Manifest, sequence_of: Make) -> None:
    sequences = [sequence_of([1, 2, 3, 4], [0, 1]), sequence_of([1, 2], [1]), sequence_of([5])]
    results = await outcomes(embedder_path, manifest, sequences)
    assert all(isinstance(result, SequenceResult) for result in results)


async def test_warm_up_fails_for_a_model_that_contradicts_its_manifest(embedder_path: Path, manifest: Manifest) -> None:
    session = RuntimeSession.load(embedder_path, provider="CPUExecutionProvider", intra_op_threads=1)
    warmup.touch(session, manifest)
    for wrong in (shown_as(manifest, "seq", 9), site_with(manifest, heads=3)):
        with pytest.raises(UnexpectedShape):
            warmup.touch(session, wrong)
    with pytest.raises(UnexpectedShape):
        warmup.measure(session, shown_as(manifest, "half", 8), MonotonicClock())


def test_message_has_the_declared_expected_and_found_shapes(manifest: Manifest, sequence_of: Make) -> None:
    batch = collate([sequence_of([1, 2, 3]), sequence_of([1])], manifest)
    fetched = {"last_hidden_state": np.zeros((2, 4, 8), np.float32)}
    with pytest.raises(UnexpectedShape) as caught:
        ShapeCheck(manifest).check(batch, fetched)
    assert str(caught.value) == (
        "tensor 'last_hidden_state' has the shape (2, 4, 8); the manifest declares (batch, seq, 8), "
        "which is (2, 3, 8) in this batch"
    )


def test_larger_shapes_pass_only_for_a_session_that_fills_up(manifest: Manifest, sequence_of: Make) -> None:
    batch = collate([sequence_of([1, 2, 3]), sequence_of([1])], manifest)
    check = ShapeCheck(manifest)
    check.check(batch, {"last_hidden_state": np.zeros((4, 8, 8), np.float32)}, filled_up=True)
    with pytest.raises(UnexpectedShape):
        check.check(batch, {"last_hidden_state": np.zeros((4, 2, 8), np.float32)}, filled_up=True)


def test_check_takes_microseconds(manifest: Manifest, sequence_of: Make) -> None:
    batch = collate([sequence_of([1, 2, 3])] * 8, manifest)
    fetched = {"last_hidden_state": np.zeros((8, 3, 8), np.float32), "embedding": np.zeros((8, 8), np.float32)}
    check = ShapeCheck(manifest)
    seconds = min(timeit.repeat(lambda: check.check(batch, fetched), number=100, repeat=5)) / 100
    assert seconds < 200e-6  # about 5 microseconds on an idle core; the rest is for loaded machines
