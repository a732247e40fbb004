"""Two sessions share one copy of a model's weights, and a run that is alone uses all cores where that is faster.

The model is made by hand, and so are the costs that decide. A temporary folder without space raises OSError.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from attnserve_server.domain.clock import MonotonicClock
from attnserve_server.domain.values import PreparedSequence, SequenceResult
from attnserve_server.engine import sharing, warmup
from attnserve_server.engine.collation import collate
from attnserve_server.engine.cost import CostEstimate, TimedRun
from attnserve_server.engine.executor import Executor
from attnserve_server.engine.graph import Graph
from attnserve_server.engine.instance_thread import Occupancy
from attnserve_server.engine.session import LoadFailed, RunHandle, RuntimeSession
from attnserve_server.model.manifest import Manifest
from attnserve_server.observability.metrics import Metrics

Make = Callable[..., PreparedSequence]


def pair(path: Path) -> tuple[RuntimeSession, RuntimeSession]:
    return sharing.load_shared(path, left_out=None, intra_op_threads=1, wide_threads=2)


def costs(seconds: float) -> CostEstimate:
    """Costs by which every run takes about so many seconds."""
    shapes = ((1, 8), (4, 8), (1, 32), (4, 32), (1, 128))
    return CostEstimate(tuple(TimedRun(size, tokens, seconds) for size, tokens in shapes))


def test_both_sessions_answer_as_the_file_does(embedder_path: Path, manifest: Manifest, sequence_of: Make) -> None:
    narrow, wide = pair(embedder_path)
    plain = RuntimeSession.load(embedder_path, provider="CPUExecutionProvider")
    assert narrow.input_names == wide.input_names == plain.input_names
    batch = collate([sequence_of([1, 2, 3], [0, 1]), sequence_of([4, 5], [1])], manifest)
    answers = [session.run(batch.feeds, batch.fetches) for session in (narrow, wide, plain)]
    for one, other, third in zip(*answers, strict=True):
        np.testing.assert_array_equal(one, other)
        # the same kernels, over weights that were packed by the writing session
        np.testing.assert_allclose(one, third, rtol=1e-6, atol=1e-7)


def test_the_weights_stay_mapped_after_their_folder_is_removed(
    embedder_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    sessions = pair(embedder_path)
    assert list(folder.iterdir()) == []
    assert all(session.output_names for session in sessions)


def test_a_temporary_folder_without_space_raises_os_error(embedder_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "_FREE_SHARE", 0.0)
    with pytest.raises(OSError, match="of weights exceed half of the free space"):
        pair(embedder_path)


def test_a_file_that_does_not_load_raises_load_failed(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"no model")
    with pytest.raises(LoadFailed):
        pair(path)


@pytest.mark.parametrize(("narrow_s", "wide_s", "expected"), [(0.010, 0.005, True), (0.010, 0.0095, False)])
def test_a_run_is_wide_where_that_is_predicted_to_be_faster(
    embedder_path: Path, manifest: Manifest, sequence_of: Make, narrow_s: float, wide_s: float, expected: bool
) -> None:
    narrow, wide = pair(embedder_path)
    graph = Graph.of([narrow], manifest, wide)
    graph.cost, graph.wide_cost = costs(narrow_s), costs(wide_s)
    found = [graph.is_wide([sequence_of([1, 2, 3], [])]) for _ in range(64)]
    assert found.count(True) == (64 if expected else 1), "one of 64 tries whether the cost was too high"


@pytest.mark.parametrize(
    ("alone", "busy", "wide"),
    [(True, False, True), (False, False, False), (True, True, False)],
    ids=["alone", "not", "others"],
)
async def test_only_a_run_that_is_alone_uses_all_cores(
    embedder_path: Path, manifest: Manifest, sequence_of: Make, alone: bool, busy: bool, wide: bool
) -> None:
    narrow, all_cores = pair(embedder_path)
    metrics, occupancy = Metrics(), Occupancy()
    if busy:
        occupancy.begin()
    executor = Executor(
        [narrow],
        manifest,
        metrics.model(manifest.name, "1"),
        MonotonicClock(),
        1,
        wide=all_cores,
        occupancy=occupancy,
    )
    executor.start()
    try:
        await executor.warm_up()
        graph = executor._prompt
        assert graph.wide_cost is not None
        graph.cost, graph.wide_cost = costs(0.010), costs(0.001)
        (result,) = await executor.run([sequence_of([1, 2, 3], [0])], RunHandle(), 0, alone=alone)
    finally:
        await executor.aclose()
    assert isinstance(result, SequenceResult)
    assert result.run.wide is wide
    assert occupancy.busy is busy
    labels = {"model": manifest.name, "version": "1"}
    assert metrics.registry.get_sample_value("attnserve_wide_runs_total", labels) == wide
    assert replace(result.run, wide=False).batch_size == 1


async def test_known_costs_are_not_measured_again(
    embedder_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a crash, callers wait for the next engine, whose start would take longer by that."""
    narrow, all_cores = pair(embedder_path)
    executor = Executor([narrow], manifest, Metrics().model(manifest.name, "1"), MonotonicClock(), 1, wide=all_cores)
    executor.start()
    measured: list[RuntimeSession] = []

    def measure(session: RuntimeSession, *arguments: object, **options: object) -> tuple[TimedRun, ...]:
        measured.append(session)
        return (TimedRun(1, 8, 0.001),)

    monkeypatch.setattr(warmup, "measure", measure)
    try:
        timed = await executor.warm_up()
        assert measured == [narrow, all_cores]
        assert await executor.warm_up(*timed) == timed
        assert measured == [narrow, all_cores]
    finally:
        await executor.aclose()
