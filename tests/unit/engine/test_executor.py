"""The executor: batches run on the threads of instances, and each sequence gets its own result or error.

Models and sequences are fixtures of conftest.py; `executor_of` starts and closes an executor. A failing sequence gets
InternalFault, and those of a terminated run RequestCancelled. A model whose warm-up fails raises RunFailed.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from attnserve_server import attention
from attnserve_server.domain.clock import MonotonicClock
from attnserve_server.domain.errors import InternalFault, RequestCancelled
from attnserve_server.domain.values import PreparedSequence, SequenceResult
from attnserve_server.engine.executor import Executor
from attnserve_server.engine.session import RunFailed, RunHandle, RuntimeSession
from attnserve_server.engine.warmup import selection_of_all, synthetic
from attnserve_server.model.manifest import AxisSpec, InputSpec, Manifest, OutputSpec
from attnserve_server.observability.metrics import Metrics

INFINITE_ID, NAN_ID, POISON_ID = 47, 48, 49

Make = Callable[..., PreparedSequence]


@asynccontextmanager
async def executor_of(
    path: Path, manifest: Manifest, instances: int = 1, metrics: Metrics | None = None
) -> AsyncIterator[Executor]:
    """Start an executor of a model file on the CPU, and close it at the end."""
    session = RuntimeSession.load(path, provider="CPUExecutionProvider", intra_op_threads=1)
    model_metrics = (metrics or Metrics()).model(manifest.name, manifest.version)
    executor = Executor([session], manifest, model_metrics, MonotonicClock(), instances)
    executor.start()
    try:
        yield executor
    finally:
        await executor.aclose()


async def test_batch_of_mixed_lengths_gives_the_answers_of_each_sequence_alone(
    embedder_path: Path, manifest: Manifest, sequence_of: Make, embed, weights_by_hand
) -> None:
    random = np.random.default_rng(3)
    texts = [random.integers(0, 48, length).tolist() for length in (1, 9, 4, 30, 4, 17)]
    asked = [(), (0,), (1,), (), (0, 1), (1,)]
    sequences = [sequence_of(ids, layers) for ids, layers in zip(texts, asked, strict=True)]
    async with executor_of(embedder_path, manifest) as executor:
        results = await executor.run(sequences, RunHandle(), 0)
    for ids, layers, result in zip(texts, asked, results, strict=True):
        assert isinstance(result, SequenceResult)
        # sums of at most 30 float32 values near 1
        np.testing.assert_allclose(result.outputs["embedding"], embed(np.array(ids)), atol=1e-5)
        maps = {made.layer: made.content for made in result.attention.maps} if result.attention else {}
        assert set(maps) == set(layers)
        for layer, content in maps.items():
            # softmax in float32 against float64
            np.testing.assert_allclose(content, weights_by_hand(ids, layer), atol=1e-6)
        assert (result.run.batch_size, result.run.useful_tokens, result.run.computed_tokens) == (6, 65, 180)


async def test_maps_do_not_keep_the_batch_in_memory(embedder_path: Path, manifest: Manifest, sequence_of: Make) -> None:
    async with executor_of(embedder_path, manifest) as executor:
        results = await executor.run([sequence_of([1, 2, 3], [0]), sequence_of([4, 5, 6], [0])], RunHandle(), 0)
    for result in results:
        assert isinstance(result, SequenceResult)
        assert result.attention is not None
        content = result.attention.maps[0].content
        while content.base is not None:
            content = content.base
        assert content.size == 2 * 3 * 3, "the memory behind a map holds that map alone"


@pytest.mark.parametrize("culprits", [(0,), (4,), (2, 3), (0, 1, 2, 3, 4)])
async def test_failing_batch_fails_only_the_failing_sequences(
    poisoned_path: Path, manifest: Manifest, sequence_of: Make, embed, culprits: tuple[int, ...]
) -> None:
    texts = [[POISON_ID, 1] if row in culprits else [row, row + 1] for row in range(5)]
    async with executor_of(poisoned_path, manifest) as executor:
        results = await executor.run([sequence_of(ids) for ids in texts], RunHandle(), 0)
    for row, result in enumerate(results):
        if row in culprits:
            assert isinstance(result, InternalFault)
        else:
            assert isinstance(result, SequenceResult)
            # sums of two float32 values
            np.testing.assert_allclose(result.outputs["embedding"], embed(np.array(texts[row])), atol=1e-6)


async def test_infinite_outputs_are_valid_and_infinite_weights_are_not(
    poisoned_path: Path, manifest: Manifest, sequence_of: Make
) -> None:
    async with executor_of(poisoned_path, manifest) as executor:
        first, second = await executor.run([sequence_of([INFINITE_ID]), sequence_of([1])], RunHandle(), 0)
        (weights,) = await executor.run([sequence_of([INFINITE_ID, 1], [0], outputs=())], RunHandle(), 0)
    assert isinstance(first, SequenceResult)
    assert np.isneginf(first.outputs["embedding"]).all()
    assert isinstance(second, SequenceResult)
    assert isinstance(weights, InternalFault), "softmax over infinities is NaN"


async def test_nan_fails_its_sequence_only(poisoned_path: Path, manifest: Manifest, sequence_of: Make) -> None:
    async with executor_of(poisoned_path, manifest) as executor:
        first, second = await executor.run([sequence_of([NAN_ID]), sequence_of([1])], RunHandle(), 0)
        (weights,) = await executor.run([sequence_of([NAN_ID, 1], [0], outputs=())], RunHandle(), 0)
    assert isinstance(first, InternalFault)
    assert isinstance(second, SequenceResult)
    assert isinstance(weights, InternalFault)


async def test_failing_reduction_fails_its_sequence_only(
    embedder_path: Path, manifest: Manifest, sequence_of: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = attention.answer

    def failing(weights, effective, sites, units):
        if effective.layers == (1,):
            raise KeyError("a bug")
        return real(weights, effective, sites, units)

    monkeypatch.setattr(attention, "answer", failing)
    async with executor_of(embedder_path, manifest) as executor:
        results = await executor.run([sequence_of([1, 2], [0]), sequence_of([1, 2], [1])], RunHandle(), 0)
    assert isinstance(results[0], SequenceResult)
    assert isinstance(results[1], InternalFault)


async def test_unknown_output_fails_its_sequence_only(
    embedder_path: Path, manifest: Manifest, sequence_of: Make
) -> None:
    good = sequence_of([1, 2], [0])
    bad = PreparedSequence(good.tensors, good.lengths, ("no such output",))
    async with executor_of(embedder_path, manifest) as executor:
        results = await executor.run([good, bad], RunHandle(), 0)
    assert isinstance(results[0], SequenceResult)
    assert isinstance(results[1], InternalFault)


async def test_terminate_ends_an_endless_run(slow_path: Path, manifest: Manifest) -> None:
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
        run = asyncio.create_task(executor.run([sequence, sequence], handle, 0))
        await asyncio.sleep(0)  # the run begins; terminate works before and during it
        handle.terminate()
        assert [type(result) for result in await run] == [RequestCancelled, RequestCancelled]


async def test_instances_run_concurrently_in_separate_threads(
    embedder_path: Path, manifest: Manifest, sequence_of: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with executor_of(embedder_path, manifest, instances=2) as executor:
        meeting = threading.Barrier(2, timeout=10)  # passes only if both instances run at once
        real = executor._prompt.sessions[0].run

        def meet(*args: object, **named: object) -> list[np.ndarray]:
            meeting.wait()
            return real(*args, **named)  # type: ignore[arg-type]

        monkeypatch.setattr(executor._prompt.sessions[0], "run", meet)
        runs = [executor.run([sequence_of([1])], RunHandle(), instance) for instance in (0, 1)]
        results = [result for outcomes in await asyncio.gather(*runs) for result in outcomes]
    assert {result.run.instance for result in results if isinstance(result, SequenceResult)} == {0, 1}


async def test_runs_are_counted(embedder_path: Path, manifest: Manifest, sequence_of: Make) -> None:
    metrics = Metrics()
    async with executor_of(embedder_path, manifest, metrics=metrics) as executor:
        await executor.run([sequence_of([1, 2, 3]), sequence_of([4], [0])], RunHandle(), 0)
    labels = {"model": "tiny", "version": "1"}
    seen = {
        name: metrics.registry.get_sample_value(f"attnserve_{name}", labels)
        for name in (
            "sequences_total",
            "useful_tokens_total",
            "computed_tokens_total",
            "padding_tokens_total",
            "padded_tokens_total",
            "batch_size_sum",
            "compute_seconds_count",
            "attention_seconds_count",
            "running_batches",
        )
    }
    assert seen == {
        "sequences_total": 2,
        "useful_tokens_total": 4,
        "computed_tokens_total": 6,
        "padding_tokens_total": 2,
        "padded_tokens_total": 6,
        "batch_size_sum": 2,
        "compute_seconds_count": 1,
        "attention_seconds_count": 1,
        "running_batches": 0,
    }


async def test_warm_up_runs_valid_inputs_with_attention_and_fits_the_cost_model(
    embedder_path: Path, manifest: Manifest
) -> None:
    async with executor_of(embedder_path, manifest, instances=2) as executor:
        assert executor.cost is None
        fetched: list[str] = []
        real = executor._prompt.sessions[0].run

        def watch(feeds: dict[str, np.ndarray], fetches: tuple[str, ...]) -> list[np.ndarray]:
            fetched.extend(fetches)
            assert 0 <= feeds["input_ids"].min() <= feeds["input_ids"].max() < manifest.vocabulary_size
            return real(feeds, fetches)

        executor._prompt.sessions[0].run = watch  # type: ignore[method-assign, assignment]
        await executor.warm_up()
    assert executor.cost is not None
    assert executor.cost.token_s > 0
    assert set(fetched) == {"embedding", "last_hidden_state", "attention.site0", "attention.site1"}


async def test_warm_up_respects_the_maximum_batch_size(embedder_path: Path, manifest: Manifest) -> None:
    single = manifest.model_copy(update={"max_batch_size": 1})
    async with executor_of(embedder_path, single) as executor:
        rows: set[int] = set()
        real = executor._prompt.sessions[0].run

        def watch(feeds: dict[str, np.ndarray], fetches: tuple[str, ...]) -> list[np.ndarray]:
            rows.add(len(feeds["input_ids"]))
            return real(feeds, fetches)

        executor._prompt.sessions[0].run = watch  # type: ignore[method-assign, assignment]
        await executor.warm_up()
    assert rows == {1}


async def test_warm_up_of_a_model_that_cannot_run_fails(poisoned_path: Path, manifest: Manifest) -> None:
    async with executor_of(poisoned_path, manifest) as executor:
        with pytest.raises(RunFailed):
            await executor.warm_up()  # its shapes use the whole vocabulary, with the poisoned id


def test_synthetic_sequences_respect_the_maximum_lengths(manifest: Manifest) -> None:
    short = manifest.model_copy(update={"axes": (AxisSpec(symbol="seq", max_length=5, paddable=True),)})
    assert synthetic(short, 64).lengths == {"seq": 5}


def test_synthetic_sequences_have_the_length_of_a_fixed_axis(manifest: Manifest) -> None:
    patches = AxisSpec(symbol="patches", max_length=49, paddable=False, fixed=True)
    assert synthetic(manifest.model_copy(update={"axes": (*manifest.axes, patches)}), 4).lengths == {
        "seq": 4,
        "patches": 49,
    }


def test_synthetic_sequences_are_valid_for_every_role(manifest: Manifest) -> None:
    inputs = (*manifest.inputs, InputSpec(name="scale", dtype="float32", shape=("seq", 2), fill=3.0))
    sequence = synthetic(manifest.model_copy(update={"inputs": inputs}), 4)
    assert sequence.tensors["attention_mask"].tolist() == [1, 1, 1, 1]
    assert sequence.tensors["scale"].tolist() == [[3.0, 3.0]] * 4


def test_selection_of_all_is_none_for_a_model_without_sites(manifest: Manifest) -> None:
    assert selection_of_all(manifest.model_copy(update={"sites": ()})) is None


@pytest.mark.parametrize("unpadded", [False, True])
async def test_run_with_an_unpadded_sequence_keeps_its_exact_shape(
    unpadded: bool, embedder_path: Path, manifest: Manifest, sequence_of: Make
) -> None:
    async with executor_of(embedder_path, manifest) as executor:
        seen: list[bool] = []
        real = executor._prompt.sessions[0].run

        def watch(feeds: object, fetches: object, handle: object, *, exact_shape: bool) -> list[np.ndarray]:
            seen.append(exact_shape)
            return real(feeds, fetches, handle)  # type: ignore[arg-type]

        executor._prompt.sessions[0].run = watch  # type: ignore[method-assign, assignment]
        await executor.run([replace(sequence_of([1, 2]), unpadded=unpadded)], RunHandle(), 0)
    assert seen == [unpadded]
