"""A sequence of a batch, repeated alone: the kept values and their comparison.

The shadow check repeats sequences like this. Models and sequences are fixtures of conftest.py. A repeat that fails
gives InternalFault, and one that is terminated RequestCancelled.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from attnserve_server.domain.clock import MonotonicClock
from attnserve_server.domain.errors import InternalFault, RequestCancelled
from attnserve_server.domain.values import HeadReduction, PreparedSequence, SequenceResult
from attnserve_server.engine.executor import Executor
from attnserve_server.engine.session import RunHandle, RuntimeSession
from attnserve_server.model.certificate import Certificate
from attnserve_server.model.equality import Difference, Equality, greatest_difference, values_of
from attnserve_server.model.manifest import InputSpec, Manifest, OutputSpec
from attnserve_server.observability.metrics import Metrics

Make = Callable[..., PreparedSequence]
POISON_ID = 49


@asynccontextmanager
async def executor_of(path: Path, manifest: Manifest, metrics: Metrics | None = None) -> AsyncIterator[Executor]:
    session = RuntimeSession.load(path, provider="CPUExecutionProvider", intra_op_threads=1)
    model_metrics = (metrics or Metrics()).model(manifest.name, manifest.version)
    executor = Executor([session], manifest, model_metrics, MonotonicClock(), 1)
    executor.start()
    try:
        yield executor
    finally:
        await executor.aclose()


async def served(executor: Executor, sequences: list[PreparedSequence]) -> list[dict[str, np.ndarray]]:
    """The results of one batch of these sequences, with their values kept."""
    kept = [replace(one, keep_values=True) for one in sequences]
    results = await executor.run(kept, RunHandle(), 0)
    assert all(isinstance(result, SequenceResult) for result in results)
    return [dict(result.values) for result in results]  # type: ignore[union-attr]


def test_values_have_the_names_that_equality_uses(manifest: Manifest) -> None:
    output, weights = np.ones(3), np.zeros((2, 1, 1))
    named = values_of({"embedding": output}, {1: weights}, manifest)
    assert named == {"embedding": output, "attention.site1": weights}


def test_greatest_difference_is_relative_to_the_tolerance_of_each_value() -> None:
    equality = Equality("fp32")
    alone = {"out": np.array([100.0, 1.0]), "attention.site0": np.array([0.5, 0.5])}
    assert greatest_difference(alone, alone, equality).error == 0
    # 0.005 of 100 with a tolerance of 1e-4 of the greatest, and 2e-5 of a weight with a tolerance of 1e-5.
    off = {"out": alone["out"] + 0.005, "attention.site0": alone["attention.site0"] + 2e-5}
    found = greatest_difference(off, alone, equality)
    assert (found.name, found.error) == ("attention.site0", pytest.approx(2, rel=1e-6))
    assert greatest_difference({"out": alone["out"][:1]}, alone, equality) == Difference("out", np.inf)


async def test_kept_values_are_cropped_copies(
    embedder_path: Path, manifest: Manifest, sequence_of: Make, weights_by_hand, embed
) -> None:
    wanted = sequence_of([1, 2, 3], [1])
    assert wanted.attention is not None
    reduced = replace(wanted.attention, head_reduction=HeadReduction.MEAN, queries=(0,))
    other = sequence_of([4, 5, 6, 7, 8])
    async with executor_of(embedder_path, manifest) as executor:
        first, second = await served(executor, [replace(wanted, attention=reduced), other])
        results = await executor.run([wanted, other], RunHandle(), 0)
    assert first.keys() == {"embedding", "attention.site1"}
    assert second.keys() == {"embedding"}
    # float32 against float64, sums of three terms
    np.testing.assert_allclose(first["embedding"], embed(np.array([1, 2, 3])), atol=1e-6)
    np.testing.assert_allclose(first["attention.site1"], weights_by_hand([1, 2, 3], 1), atol=1e-6)
    assert all(array.base is None for array in (*first.values(), *second.values())), "no batch is kept alive"
    assert [result.values for result in results if isinstance(result, SequenceResult)] == [None, None]


async def test_equal_answers_compare_equal_and_different_ones_do_not(
    embedder_path: Path, manifest: Manifest, sequence_of: Make
) -> None:
    sequences = [sequence_of([1, 2, 3], [0]), sequence_of([4, 5, 6, 7, 8], [0, 1])]
    async with executor_of(embedder_path, manifest) as executor:
        for sequence, values in zip(sequences, await served(executor, sequences), strict=True):
            same = await executor.repeat(sequence, values, RunHandle(), 0)
            assert isinstance(same, Difference)
            assert same.error < 1
            values["attention.site0"][0, 1, 0] += 1e-3
            other = await executor.repeat(sequence, values, RunHandle(), 0)
            # a weight off by 1e-3 with a tolerance of 1e-5; float32 keeps it to 1e-7
            assert other == Difference("attention.site0", pytest.approx(100, rel=1e-2))


async def test_noise_of_the_certificate_widens_the_tolerance(
    embedder_path: Path, manifest: Manifest, sequence_of: Make
) -> None:
    noisy = manifest.model_copy(update={"certificate": Certificate(clauses=(), noise={"attention.site0": 1e-2})})
    sequence = sequence_of([1, 2, 3], [0])
    async with executor_of(embedder_path, noisy) as executor:
        values, _ = await served(executor, [sequence, sequence])
        values["attention.site0"][0, 1, 0] += 1e-3
        found = await executor.repeat(sequence, values, RunHandle(), 0)
    assert found == Difference("attention.site0", pytest.approx(0.1, rel=1e-2))


async def test_repeat_is_not_counted_by_metrics_of_served_runs(
    embedder_path: Path, manifest: Manifest, sequence_of: Make
) -> None:
    metrics = Metrics()

    def counted() -> dict[str, float]:
        return {
            sample.name: sample.value
            for family in metrics.registry.collect()
            for sample in family.samples
            if family.name.startswith("attnserve_") and not sample.name.endswith("_created")
        }

    sequence = sequence_of([1, 2, 3], [0])
    async with executor_of(embedder_path, manifest, metrics) as executor:
        values, _ = await served(executor, [sequence, sequence])
        before = counted()
        assert isinstance(await executor.repeat(sequence, values, RunHandle(), 0), Difference)
    assert counted() == before
    assert before["attnserve_sequences_total"] == 2


async def test_failed_repeat_is_an_internal_fault(poisoned_path: Path, manifest: Manifest, sequence_of: Make) -> None:
    async with executor_of(poisoned_path, manifest) as executor:
        outcome = await executor.repeat(sequence_of([POISON_ID]), {}, RunHandle(), 0)
    assert isinstance(outcome, InternalFault)


async def test_terminate_ends_an_endless_repeat(slow_path: Path, manifest: Manifest) -> None:
    slow = manifest.model_copy(
        update={
            "inputs": (InputSpec(name="x", dtype="float32", shape=("seq",)),),
            "outputs": (OutputSpec(name="y", dtype="float32", shape=("seq",)),),
            "sites": (),
        }
    )
    sequence = PreparedSequence({"x": np.ones(3, np.float32)}, {"seq": 3}, ("y",))
    handle = RunHandle()
    async with executor_of(slow_path, slow) as executor:
        repeat = asyncio.create_task(executor.repeat(sequence, {}, handle, 0))
        await asyncio.sleep(0)  # the run begins; terminate works before and during it
        handle.terminate()
        assert isinstance(await repeat, RequestCancelled)
