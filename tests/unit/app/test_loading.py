"""Loading: a bundle is opened by its manifest, under the batching policy of the settings.

A bundle is the folder of one converted model. Its certificate states, clause by clause, whether padding or batch
neighbours can change an answer. The policy states which verdicts suffice to share a run. An unproved clause causes at
most a warning.
"""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any, get_args

import pytest
import structlog
from attnserve_server import loading
from attnserve_server.config import Settings
from attnserve_server.engine import openvino, sharing
from attnserve_server.engine.providers import PrecisionUnavailable
from attnserve_server.engine.session import RuntimeSession
from attnserve_server.loading import open_bundle
from attnserve_server.model.certificate import BATCHING, Clause, Verdict
from attnserve_server.model.manifest import Manifest
from attnserve_server.model.repository import Bundle, write_bundle
from attnserve_server.wanted import log_cautions, under_policy
from made_by_hand import SURVIVED, certificate
from tiny_bundle import tiny_manifest, write_tiny_files


@pytest.mark.parametrize("left_out", [None, (), ("MatMulAddFusion",)])
def test_optimizers_that_a_bundle_disables_are_disabled_when_it_is_served(
    left_out: tuple[str, ...] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[object] = []
    load = RuntimeSession.load

    def recording(path: Path, **options: object) -> RuntimeSession:
        given.append(options["left_out"])
        return load(path, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(RuntimeSession, "load", recording)
    manifest = tiny_manifest().model_copy(update={"left_out": left_out})
    bundle = write_bundle(tmp_path / "models", manifest, write_tiny_files(tmp_path))
    open_bundle(bundle, Settings(repository=tmp_path / "models"))
    assert given == [left_out]


def rules(manifest: Manifest, folder: Path, batching: str = "proved") -> tuple[Manifest, list[dict[str, Any]]]:
    """The manifest of a bundle under a policy, and the warnings about it."""
    bundle = Bundle(folder, manifest)
    settings = Settings(repository=folder, batching=batching)
    with structlog.testing.capture_logs() as lines:
        log_cautions(manifest, settings)
    made = under_policy(bundle, settings).manifest
    return made, [line for line in lines if line["log_level"] == "warning"]


def test_proved_model_is_batched_without_a_warning(tmp_path: Path) -> None:
    manifest, warnings = rules(tiny_manifest(), tmp_path)
    assert (manifest.max_batch_size, manifest.axis("seq").paddable, warnings) == (8, True, [])


def test_batching_off_runs_every_sequence_alone_without_a_warning(tmp_path: Path) -> None:
    manifest, warnings = rules(tiny_manifest(), tmp_path, "off")
    assert (manifest.max_batch_size, manifest.axis("seq").paddable, warnings) == (1, False, [])


def test_bundle_of_format_1_is_batched_at_equal_lengths_with_a_warning(tmp_path: Path) -> None:
    old = tiny_manifest().model_copy(update={"format": 1, "certificate": None})
    manifest, (warning,) = rules(old, tmp_path)
    assert (manifest.max_batch_size, manifest.axis("seq").paddable) == (8, False)
    assert warning["event"] == "sequences share a batch only at equal lengths"
    assert (warning["model"], warning["version"], warning["axis"]) == ("tiny", "1", "batch")
    assert "check BUNDLE --certify" in warning["remedy"]


def test_warning_of_an_unproved_axis_has_cause_and_remedy(tmp_path: Path) -> None:
    clause = Clause(axis="seq", verdict=Verdict.UNKNOWN, reason="the operator Foo is not known", attack=SURVIVED)
    unknown = tiny_manifest().model_copy(update={"certificate": certificate(clauses=(clause,), batch=Verdict.PROVED)})
    manifest, (warning,) = rules(unknown, tmp_path)
    assert not manifest.axis("seq").paddable
    assert (warning["axis"], warning["status"], warning["cause"]) == ("seq", "unknown", "the operator Foo is not known")
    assert "--batching tested" in warning["remedy"]
    manifest, warnings = rules(unknown, tmp_path, "tested")
    assert (manifest.axis("seq").paddable, warnings) == (True, [])


@pytest.mark.parametrize(("verdict", "shapes"), [(Verdict.PROVED, ((1, 32), (8, 64))), (Verdict.REFUTED, ((1, 32),))])
def test_recorded_shapes_have_one_row_if_sequences_run_alone(
    verdict: Verdict, shapes: tuple[tuple[int, int], ...], tmp_path: Path
) -> None:
    manifest = tiny_manifest().model_copy(update={"certificate": certificate(batch=verdict, seq=Verdict.PROVED)})
    settings = Settings(repository=tmp_path, cuda_graphs="1x32,8x64")
    plan = loading._graph_plan(under_policy(Bundle(tmp_path, manifest), settings).manifest, settings)
    assert plan is not None
    assert plan.shapes == shapes
    wide = Settings(repository=tmp_path, cuda_graphs="8x64")
    assert (loading._graph_plan(under_policy(Bundle(tmp_path, manifest), wide).manifest, wide) is None) is (
        verdict is Verdict.REFUTED
    )


def test_costs_of_sequences_alone_and_of_batches_have_different_keys(tmp_path: Path) -> None:
    session = RuntimeSession.load(write_tiny_files(tmp_path)["model.onnx"], provider="CPUExecutionProvider")
    settings = Settings(repository=tmp_path)
    keys = {loading.cost_key(session, rules(tiny_manifest(), tmp_path, policy)[0], settings) for policy in BATCHING}
    assert len(keys) == 2


def test_costs_on_all_cores_have_a_separate_key(tmp_path: Path) -> None:
    session = RuntimeSession.load(write_tiny_files(tmp_path)["model.onnx"], provider="CPUExecutionProvider")
    settings = [Settings(repository=tmp_path, intra_op_threads=2, wide_threads=threads) for threads in (2, 3)]
    keys = [loading.cost_key(session, tiny_manifest(), one) for one in settings]
    assert keys[0] == keys[1]
    assert len({keys[0], *(loading.wide_cost_key(keys[0], one) for one in settings)}) == 3


def test_batching_setting_accepts_every_policy() -> None:
    assert get_args(Settings.model_fields["batching"].annotation) == BATCHING


@pytest.mark.parametrize(
    ("provider", "stored", "why"),
    [
        ("auto", "fp32", r"provider is auto, .*; set --provider openvino, or --precision bundle"),
        ("cpu", "fp32", r"provider is cpu, .*; set --provider openvino, or --precision bundle"),
        ("openvino", "int8", "the bundle is int8, .*; set --precision bundle"),
    ],
)
def test_bfloat16_is_refused_where_it_does_not_apply(provider: str, stored: str, why: str, tmp_path: Path) -> None:
    manifest = tiny_manifest().model_copy(update={"precision": stored})
    bundle = write_bundle(tmp_path / "models", manifest, write_tiny_files(tmp_path))
    settings = Settings(repository=tmp_path / "models", provider=provider, precision="bf16")
    with pytest.raises(PrecisionUnavailable, match=f"precision is bf16, but {why}"):
        open_bundle(bundle, settings)


def test_bundle_is_served_in_its_own_precision_by_default(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "models", tiny_manifest(), write_tiny_files(tmp_path))
    opened = open_bundle(bundle, Settings(repository=tmp_path / "models", provider="cpu"))
    assert opened.bundle == bundle
    assert (opened.sessions[0].precision, opened.bundle.manifest.precision) == ("", "fp32")


def test_manifest_states_the_precision_that_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = write_bundle(tmp_path / "models", tiny_manifest(), write_tiny_files(tmp_path))
    load = RuntimeSession.load

    def rounded(path: Path, **options: object) -> RuntimeSession:
        session = load(path, **options)  # type: ignore[arg-type]
        session.precision = "bf16-scores"
        return session

    monkeypatch.setattr(RuntimeSession, "load", rounded)
    settings = Settings(repository=tmp_path / "models", provider="cpu", wide_threads=1)
    served = open_bundle(bundle, settings).bundle.manifest
    assert (served.precision, served.digest) == ("bf16-scores", bundle.manifest.digest)


def test_openvino_has_a_stream_for_each_instance_with_its_threads(tmp_path: Path) -> None:
    given = {"instances": 3, "intra_op_threads": 2, "cache_dir": tmp_path, "openvino_options": "LOG_LEVEL=LOG_NONE"}
    options = loading._openvino_options(tiny_manifest(), Settings(provider="openvino", **given))
    assert options == {
        openvino.STREAMS: "3",
        openvino.THREADS: "6",
        openvino.CACHE: str(tmp_path),
        "LOG_LEVEL": "LOG_NONE",
    }
    rounded = loading._openvino_options(tiny_manifest(), Settings(provider="openvino", precision="bf16"))
    assert rounded[openvino.PRECISION] == "bf16"


def test_first_session_ends_before_those_that_share_their_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = write_bundle(tmp_path / "models", tiny_manifest(), write_tiny_files(tmp_path))
    load, share = RuntimeSession.load, loading.load_shared
    first: list[weakref.ref[RuntimeSession]] = []

    def loaded(path: Path, **options: object) -> RuntimeSession:
        session = load(path, **options)  # type: ignore[arg-type]
        first.append(weakref.ref(session))
        return session

    def shared(path: Path, **options: object) -> tuple[RuntimeSession, RuntimeSession]:
        assert [one() for one in first] == [None], "its memory would come on top of theirs"
        return share(path, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(RuntimeSession, "load", loaded)
    monkeypatch.setattr(loading, "load_shared", shared)
    opened = open_bundle(bundle, Settings(repository=tmp_path / "models", wide_threads=2))
    assert (len(opened.sessions), opened.wide is not None) == (1, True)


def test_without_room_for_shared_weights_a_bundle_has_one_session_and_the_log_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = write_bundle(tmp_path / "models", tiny_manifest(), write_tiny_files(tmp_path))
    monkeypatch.setattr(sharing, "_FREE_SHARE", 0.0)
    with structlog.testing.capture_logs() as logged:
        opened = open_bundle(bundle, Settings(repository=tmp_path / "models", wide_threads=2))
    assert (len(opened.sessions), opened.wide) == (1, None)
    (warning,) = [line for line in logged if line["event"] == "no run uses all cores: no session for that"]
    assert "--wide-threads 1" in warning["remedy"]
    assert "exceed half of the free space" in warning["reason"]
