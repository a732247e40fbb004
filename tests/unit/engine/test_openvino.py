"""The OpenVINO plug-in provider: its options, its errors, and sessions that use it.

The plug-in is a separate package, which lists Intel's processors only; elsewhere the tests of sessions are skipped.
`ROUNDED` is the precision of a session in bfloat16.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from attnserve_server.domain.clock import MonotonicClock
from attnserve_server.engine import openvino, warmup
from attnserve_server.engine.collation import collate, outputs_of, weights_of
from attnserve_server.engine.cost import CostModel
from attnserve_server.engine.golden import GoldenMismatch, GoldenSequence, answers, verify_golden
from attnserve_server.engine.providers import CPU, OPENVINO, PrecisionUnavailable, ProviderUnavailable
from attnserve_server.engine.session import LoadFailed, RunHandle, RunTerminated, RuntimeSession
from attnserve_server.model.equality import equality_of, values_of
from attnserve_server.model.manifest import GoldenSpec, Manifest
from openvino_here import needs_bf16, needs_openvino, why_absent, why_no_bf16


def served(session: RuntimeSession, manifest: Manifest, sequences: list, **how: bool) -> list[dict[str, np.ndarray]]:
    """Each sequence's outputs and weights, from one batch."""
    batch = collate(sequences, manifest)
    fetched = dict(zip(batch.fetches, session.run(batch.feeds, batch.fetches, **how), strict=True))
    return [
        values_of(
            outputs_of(batch, fetched, row, sequence, manifest),
            weights_of(batch, fetched, row, sequence, manifest),
            manifest,
        )
        for row, sequence in enumerate(sequences)
    ]


def greatest_error(found: list[dict], expected: list[dict], manifest: Manifest) -> float:
    """The greatest difference over the allowed one, by the rule of equality."""
    rule = equality_of(manifest)
    return max(
        rule.error(name, one[name], other[name]) for one, other in zip(found, expected, strict=True) for name in one
    )


def test_precision_is_always_set_and_options_override_the_defaults() -> None:
    config = json.loads(openvino.load_config({openvino.STREAMS: "4", "ENABLE_HYPER_THREADING": "NO"}))["CPU"]
    assert config[openvino.PRECISION] == "f32"
    assert (config[openvino.STREAMS], config["ENABLE_HYPER_THREADING"]) == ("4", "NO")
    assert config["ENABLE_CPU_PINNING"] == "NO"


def test_only_bfloat16_is_another_precision_than_the_bundles() -> None:
    assert openvino.precision_of({}) == openvino.precision_of({openvino.PRECISION: "f32"}) == ""
    assert openvino.precision_of({openvino.PRECISION: "bf16"}) == openvino.ROUNDED


def test_missing_package_is_named_with_the_extra_to_install(
    embedder_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino, "_PACKAGE", "onnxruntime_ep_that_nobody_installed")
    with pytest.raises(ProviderUnavailable, match=r"pip install 'attnserve\[server-openvino\]'"):
        RuntimeSession.load(embedder_path, provider="openvino")


def test_auto_never_takes_openvino(embedder_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise AssertionError("auto looked for the plug-in")

    monkeypatch.setattr(openvino, "device", refuse)
    assert RuntimeSession.load(embedder_path).provider != OPENVINO


@pytest.mark.skipif("this one is of" not in why_absent(), reason="the plug-in lists this processor, or is not there")
def test_processor_that_the_plug_in_does_not_list_is_named(embedder_path: Path) -> None:
    for _ in range(2):  # the library is registered once
        with pytest.raises(ProviderUnavailable, match=r"lists Intel's processors only, .* of \w+; set --provider cpu"):
            RuntimeSession.load(embedder_path, provider=OPENVINO)


@needs_openvino
def test_answers_of_mixed_batches_are_those_of_the_cpu_provider(
    embedder_path: Path, manifest: Manifest, sequence_of: Callable
) -> None:
    cpu = RuntimeSession.load(embedder_path, provider="cpu")
    session = RuntimeSession.load(embedder_path, provider="openvino")
    assert (session.provider, session.precision, session.fills_up) == (OPENVINO, "", False)
    both = ("last_hidden_state", "embedding")
    for batch in ([[3, 4, 5]], [[1, 2], [7, 8, 9, 10, 11], [6]], [[2] * 9, [3] * 4]):
        for layers in ((), (1,), (0, 1)):
            some = [sequence_of(ids, layers if row % 2 == 0 else (), both) for row, ids in enumerate(batch)]
            assert greatest_error(served(session, manifest, some), served(cpu, manifest, some), manifest) <= 1


@needs_openvino
def test_one_session_serves_several_threads(embedder_path: Path, manifest: Manifest, sequence_of: Callable) -> None:
    options = {OPENVINO: {openvino.STREAMS: "2", openvino.THREADS: "2"}}
    session = RuntimeSession.load(embedder_path, provider="openvino", provider_options=options)
    cases = [[sequence_of([number, number + 1], (0,))] for number in range(1, 9)]
    expected = [served(session, manifest, case) for case in cases]
    found: dict[int, list] = {}

    def work(first: int) -> None:
        for _ in range(20):
            for at in range(first, len(cases), 2):
                found[at] = served(session, manifest, cases[at])
                assert greatest_error(found[at], expected[at], manifest) <= 1

    threads = [threading.Thread(target=work, args=(first,)) for first in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(greatest_error(found[at], expected[at], manifest) for at in range(len(cases))) <= 1
    assert len(found) == len(cases)


@needs_openvino
def test_terminated_handle_refuses_the_next_run(embedder_path: Path, manifest: Manifest, sequence_of: Callable) -> None:
    session = RuntimeSession.load(embedder_path, provider="openvino")
    handle = RunHandle()
    handle.terminate()
    batch = collate([sequence_of([1, 2])], manifest)
    with pytest.raises(RunTerminated):
        session.run(batch.feeds, batch.fetches, handle)


@needs_openvino
def test_file_that_is_no_model_fails_to_load(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"not a model")
    with pytest.raises(LoadFailed):
        RuntimeSession.load(tmp_path / "model.onnx", provider="openvino")


@needs_openvino
def test_nodes_are_counted_by_provider(embedder_path: Path, slow_path: Path) -> None:
    nodes = RuntimeSession.load(embedder_path, provider="openvino").nodes_by_provider()
    assert set(nodes) == {OPENVINO}
    assert nodes[OPENVINO]["MatMul"] == 2
    assert RuntimeSession.load(embedder_path, provider="cpu").nodes_by_provider() == {}


@needs_openvino
def test_compiled_graph_is_stored_in_the_cache_folder(embedder_path: Path, tmp_path: Path) -> None:
    options = {OPENVINO: {openvino.CACHE: str(tmp_path / "cache")}}
    RuntimeSession.load(embedder_path, provider="openvino", provider_options=options)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".blob"]


@needs_openvino
def test_runs_padded_to_prepared_shapes_give_equal_answers(
    embedder_path: Path, manifest: Manifest, sequence_of: Callable
) -> None:
    session = RuntimeSession.load(embedder_path, provider="openvino")
    plan = warmup.bucket_plan(manifest, CostModel(), 24)
    assert plan is not None
    both = ("last_hidden_state", "embedding")
    batches = [
        [sequence_of([3, 4, 5], (0, 1), both)],
        [sequence_of([1, 2], (), both), sequence_of([7] * 11, (1,), both), sequence_of([6], (0,), both)],
    ]
    exact = [served(session, manifest, batch) for batch in batches]
    warmup.prepare(session, manifest, plan)
    session.buckets = plan
    assert session.fills_up
    for batch, expected in zip(batches, exact, strict=True):
        assert plan.shape_of(collate(batch, manifest).feeds) is not None
        assert greatest_error(served(session, manifest, batch), expected, manifest) <= 1


@needs_openvino
def test_exact_shape_is_not_padded(embedder_path: Path, manifest: Manifest, sequence_of: Callable) -> None:
    session = RuntimeSession.load(embedder_path, provider="openvino")
    session.buckets = warmup.plan_of(manifest, [(4, 16)])
    batch = collate([sequence_of([1, 2, 3], (), ("last_hidden_state",))], manifest)
    assert session.run(batch.feeds, batch.fetches)[0].shape == (4, 16, 8)
    assert session.run(batch.feeds, batch.fetches, exact_shape=True)[0].shape == (1, 3, 8)


@needs_openvino
def test_cost_of_new_shapes_is_measured(embedder_path: Path, manifest: Manifest) -> None:
    session = RuntimeSession.load(embedder_path, provider="openvino")
    assert warmup.new_shape_ratio(session, manifest, MonotonicClock()) > 0


@pytest.mark.skipif(why_absent() != "" or why_no_bf16() == "", reason=why_absent() or "this processor has bfloat16")
def test_bfloat16_is_refused_where_the_processor_would_ignore_it(embedder_path: Path) -> None:
    options = {OPENVINO: {openvino.PRECISION: "bf16"}}
    with pytest.raises(PrecisionUnavailable, match=r"no instructions for bfloat16 .*--precision bundle"):
        RuntimeSession.load(embedder_path, provider="openvino", provider_options=options)


@needs_bf16
def test_bfloat16_states_its_precision_and_stays_within_its_tolerance(
    embedder_path: Path, manifest: Manifest, sequence_of: Callable
) -> None:
    cpu = RuntimeSession.load(embedder_path, provider="cpu")
    options = {OPENVINO: {openvino.PRECISION: "bf16"}}
    session = RuntimeSession.load(embedder_path, provider="openvino", provider_options=options)
    assert session.precision == openvino.ROUNDED
    rounded = manifest.model_copy(update={"precision": session.precision})
    batch = [sequence_of([7] * 11, (0, 1), ("last_hidden_state", "embedding"))]
    assert greatest_error(served(session, rounded, batch), served(cpu, manifest, batch), rounded) <= 1


def golden_of(session: RuntimeSession, manifest: Manifest) -> tuple[Manifest, list[GoldenSequence]]:
    """A manifest with golden answers, and those of a session."""
    spec = GoldenSpec(sequences=1, sample=64, output_tolerance=1e-3, weight_tolerance=1e-3)
    described = manifest.model_copy(update={"golden": spec})
    ids = np.arange(1, 8, dtype=np.int64)
    return described, answers(session, described, [{"input_ids": ids, "attention_mask": np.ones_like(ids)}])


def moved(golden: GoldenSequence, by: float) -> GoldenSequence:
    """The golden sequence with the weights of its first site moved by this much."""
    return GoldenSequence(golden.inputs, golden.outputs, {**golden.weights, 0: golden.weights[0] + np.float32(by)})


def test_golden_weights_may_differ_by_as_much_as_the_serving_precision_allows(
    embedder_path: Path, manifest: Manifest
) -> None:
    session = RuntimeSession.load(embedder_path, provider="cpu")
    described, (golden,) = golden_of(session, manifest)
    off = [moved(golden, 0.05)]
    with pytest.raises(GoldenMismatch, match=f"attention of site0 .* on {CPU}; 0.001 is allowed"):
        verify_golden(session, described, off)
    session.precision = openvino.ROUNDED
    # 6e-2 is allowed where scores are rounded.
    assert verify_golden(session, described, off) == pytest.approx(0.05 / 0.06, rel=1e-3)
    with pytest.raises(GoldenMismatch, match="attention of site0"):
        verify_golden(session, described, [moved(golden, 0.07)])


@needs_openvino
def test_golden_answers_are_repeated_on_the_provider_that_serves(embedder_path: Path, manifest: Manifest) -> None:
    described, golden = golden_of(RuntimeSession.load(embedder_path, provider="cpu"), manifest)
    session = RuntimeSession.load(embedder_path, provider="openvino")
    assert verify_golden(session, described, golden) < 1
    with pytest.raises(GoldenMismatch, match=f"on {OPENVINO}"):
        verify_golden(session, described, [moved(golden[0], 0.01)])
