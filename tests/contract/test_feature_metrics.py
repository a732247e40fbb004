"""Row features as metrics: equal to those of full maps, and sampled requests have the answers of any others.

Servers run in the test's process over the tiny model; one test runs several processes.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from attnserve.v1 import attention_pb2
from attnserve.v1 import inference_service_pb2 as pb
from attnserve.v1.inference_service_pb2_grpc import InferenceServiceStub
from attnserve_server.app import Application
from attnserve_server.attention.observed import observe
from attnserve_server.config import Settings
from attnserve_server.domain.values import AttentionFeature, PreparedSequence
from attnserve_server.engine import observer as observers
from attnserve_server.engine.observer import Drawn, Observer
from attnserve_server.observability.metrics import Metrics
from attnserve_server.observability.spec import ATTENTION_DRIFT, ATTENTION_OBSERVED, FEATURES
from processes import started
from tiny_bundle import HEADS, LAYERS, tiny_manifest

TEXTS = ("the cat sat on a mat", "a dog", "the dog looked at the cat and the mat", "on on on")
ALL = (1, 2, 3, 4)


@contextlib.asynccontextmanager
async def served(settings: Settings, **fields: Any) -> AsyncIterator[tuple[Application, InferenceServiceStub]]:
    """A server of one process."""
    server = Application(settings.model_copy(update={"models": ("tiny/2",), **fields}))
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
            yield server, InferenceServiceStub(channel)
    finally:
        await server.aclose()


def request(text: str, **selection: Any) -> pb.InferRequest:
    made = pb.InferRequest(model="tiny", sequences=[pb.Sequence(text=pb.TextInput(text=text))])
    if selection:
        made.attention.CopyFrom(attention_pb2.AttentionSelection(**selection))
    return made


def full_maps(answer: pb.InferResponse) -> list[np.ndarray]:
    maps = answer.results[0].attention.maps
    return [np.frombuffer(one.weights.data, "<f4").reshape(one.weights.shape) for one in maps]


def expected(maps: list[np.ndarray]) -> dict[AttentionFeature, tuple[np.ndarray, float]]:
    """The rows of all maps by bucket, and their sum, in float64 from the formulas."""
    values: dict[AttentionFeature, list[np.ndarray]] = {feature: [] for feature in AttentionFeature}
    for one in maps:
        exact = one.astype(np.float64)
        distances = np.abs(np.subtract.outer(np.arange(exact.shape[1]), np.arange(exact.shape[2])))
        entropy = -(exact * np.log(np.where(exact > 0, exact, 1))).sum(axis=2)
        made = (entropy, exact.max(axis=2), exact[:, :, 0], (exact * distances).sum(axis=2))
        for feature, own in zip(AttentionFeature, made, strict=True):
            values[feature].append(own.ravel())
    found = {}
    for feature, parts in values.items():
        rows, bounds = np.concatenate(parts), np.array(FEATURES[feature].buckets)
        places = (rows[:, np.newaxis] > bounds).sum(axis=1)  # the first bound that is not exceeded
        found[feature] = np.bincount(places, minlength=len(bounds) + 1), rows.sum()
    return found


def check(metrics: Metrics, maps: list[np.ndarray]) -> None:
    for feature, (counts, total) in expected(maps).items():
        series = metrics.histogram(FEATURES[feature]).labels("tiny", "2", "self")
        assert series.counts == counts.tolist(), feature
        # The order of sums in float64.
        assert series.total == pytest.approx(total, rel=1e-9)


async def whole_maps(settings: Settings) -> list[np.ndarray]:
    async with served(settings) as (_, stub):
        each = attention_pb2.HEAD_REDUCTION_EACH
        answers = [await stub.Infer(request(text, head_reduction=each)) for text in TEXTS]
    maps = [one for answer in answers for one in full_maps(answer)]
    assert len(maps) == LAYERS * len(TEXTS)
    return maps


async def test_selected_features_are_counted_as_from_full_maps(settings: Settings) -> None:
    maps = await whole_maps(settings)
    async with served(settings) as (server, stub):
        for text in TEXTS:
            await stub.Infer(request(text, features=ALL))
        check(server.metrics, maps)
        assert server.metrics.counter(ATTENTION_OBSERVED).labels("tiny", "2", "selected").value == len(TEXTS)


@pytest.mark.parametrize("narrow", [{"queries": [0]}, {"unit": 2}, {"special_tokens": 2}, {"heads": [1]}], ids=str)
async def test_what_a_selection_takes_of_a_map_changes_no_count(settings: Settings, narrow: dict[str, Any]) -> None:
    maps = await whole_maps(settings)
    async with served(settings) as (server, stub):
        for text in TEXTS:
            await stub.Infer(request(text, features=ALL[:3], **narrow))
        check(server.metrics, maps)


async def test_sampled_requests_are_counted_and_have_the_same_answers_to_the_last_bit(settings: Settings) -> None:
    maps = await whole_maps(settings)
    plain = [request(text) for text in TEXTS]
    selecting = [request(text, layers=[0]) for text in TEXTS]
    answers = []
    for share in (0.0, 1.0):
        async with served(settings, feature_sample=share) as (server, stub):
            found = [await stub.Infer(one) for one in plain]
            if share:
                check(server.metrics, maps)
                assert server.metrics.counter(ATTENTION_OBSERVED).labels("tiny", "2", "sampled").value == len(TEXTS)
            else:
                assert not server.metrics.counter(ATTENTION_OBSERVED).series, "the control"
            found += [await stub.Infer(one) for one in selecting]
        for one in found:
            one.receipt.Clear()
            for result in one.results:
                result.run.Clear()
        answers.append([one.SerializeToString(deterministic=True) for one in found])
    assert answers[0] == answers[1]


async def test_no_request_is_counted_by_default(settings: Settings) -> None:
    async with served(settings) as (server, stub):
        for text in TEXTS:
            await stub.Infer(request(text))
            await stub.Infer(request(text, head_reduction=attention_pb2.HEAD_REDUCTION_EACH))
        assert all(not server.metrics.histogram(spec).series for spec in FEATURES.values())
        assert not server.metrics.gauge(ATTENTION_DRIFT).series, "the bundle has no reference"


async def test_several_processes_export_the_same(settings: Settings, tiny_repository: Path, tmp_path: Path) -> None:
    maps = await whole_maps(settings)
    running = started(tiny_repository, tmp_path, "--models", "tiny/2", "--feature-sample", "1")
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{running.grpc_port}") as channel:
            for text in TEXTS:
                await InferenceServiceStub(channel).Infer(request(text))
        for feature, (counts, total) in expected(maps).items():
            name = FEATURES[feature].name
            labels = {"model": "tiny", "version": "2", "kind": "self"}
            assert running.sample(f"{name}_count", **labels) == counts.sum() == sum(one[:, :, 0].size for one in maps)
            assert running.sample(f"{name}_sum", **labels) == pytest.approx(total, rel=1e-9)
    finally:
        running.process.terminate()
        assert running.process.wait(30) == 0


def drawn(observer: Observer, *lengths: int) -> list[tuple[int, ...]]:
    """The layers that each of a run's sequences gets."""
    sequences = [PreparedSequence({}, {"seq": length}, ("embedding",)) for length in lengths]
    made = observer.drawn(sequences)
    assert all(isinstance(one.attention, Drawn) for one in made if one.attention is not None)
    return [() if one.attention is None else one.attention.layers for one in made]


def test_weights_of_drawn_sequences_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = Metrics()
    observer = Observer(1.0, tiny_manifest(), metrics.model("tiny", "1"))
    site_bytes = HEADS * 10 * 10 * 4
    assert drawn(observer, 10, 10) == [(0, 1), (0, 1)]
    monkeypatch.setattr(observers, "MAX_BYTES", 3 * site_bytes)
    first, second = drawn(observer, 10, 10)
    assert first == (0, 1)
    assert second in [(0,), (1,)], "one of its sites"
    assert drawn(observer, 20) == [()], "the map of one site is four times as large"
    observer.flush()
    assert metrics.counter(ATTENTION_OBSERVED).labels("tiny", "1", "skipped").value == 1


def test_a_share_is_drawn() -> None:
    values = iter([0.1, 0.9, 0.29, 0.3])
    observer = Observer(0.3, tiny_manifest(), Metrics().model("tiny", "1"), lambda: next(values))
    assert [bool(layers) for layers in drawn(observer, 4, 4, 4, 4)] == [True, False, True, False]


def test_a_bundle_without_a_reference_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        Observer(0.0, tiny_manifest(), Metrics().model("tiny", "1"))
        assert not caplog.records
        observer = Observer(0.5, tiny_manifest(), Metrics().model("tiny", "1"))
        drawn(observer, 4, 4, 4)
    assert ["no drift of attention is measured" in one.message for one in caplog.records] == [True]


def test_a_mean_over_heads_is_no_row_of_a_head() -> None:
    """The control of the shape that the observer compares."""
    site = tiny_manifest().sites[0]
    mean = np.full((1, 3, 3), 1 / 3, np.float32)
    assert observe(mean, site, 3, 3).features[AttentionFeature.ENTROPY][0].sum() == 3 != 3 * site.heads
