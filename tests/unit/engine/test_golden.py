"""Golden answers: a bundle stores sequences and their answers, which a server checks before it serves the model.

A bundle is the folder of one converted model; `sealed` writes one and may swap its graph. A model that answers
otherwise raises GoldenMismatch, and a broken file of golden answers BundleInvalid.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import structlog
from attnserve_server.app import Application
from attnserve_server.config import Settings
from attnserve_server.conversion.base.steps import Steps
from attnserve_server.conversion.inputs.signature import Signature
from attnserve_server.conversion.probing.feeds import Sampler
from attnserve_server.conversion.verify.golden import MAX_GOLDEN_BYTES, with_golden
from attnserve_server.engine.golden import GOLDEN_FILE, GoldenMismatch, error_of, read_golden, sample_of, verify_golden
from attnserve_server.engine.session import RuntimeSession
from attnserve_server.loading import open_bundle
from attnserve_server.model.certificate import Batching, MaskNeed
from attnserve_server.model.manifest import Manifest
from attnserve_server.model.repository import Bundle, BundleInvalid, write_bundle
from attnserve_server.scheduling.catalog import ModelState
from attnserve_server.wanted import StartFailed
from made_by_hand import proved
from onnx import numpy_helper
from tiny_bundle import VOCABULARY, tiny_graph, tiny_manifest, write_tiny_files

Change = Callable[[onnx.ModelProto], None]


def sealed(root: Path, work: Path, name: str = "tiny", change: Change | None = None) -> Bundle:
    """The tiny model with its golden answers; `change` swaps its graph afterwards, with a matching digest."""
    work.mkdir(exist_ok=True)
    files = write_tiny_files(work)
    manifest = tiny_manifest(name)
    sampler = Sampler(Signature(manifest.inputs, ("seq",)), len(VOCABULARY))
    session = RuntimeSession.load(files["model.onnx"], provider="CPUExecutionProvider", intra_op_threads=1)
    updated, golden = with_golden(manifest, session, sampler, work, Steps.silent())
    if change is not None:
        model = tiny_graph()
        change(model)
        onnx.save(model, files["model.onnx"])
    return write_bundle(root, updated, {**files, **golden})


def scaled(name: str, factor: float) -> Change:
    def change(model: onnx.ModelProto) -> None:
        (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == name]
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(factor), name))

    return change


def opened(bundle: Bundle) -> RuntimeSession:
    (session,) = open_bundle(bundle, Settings(repository=bundle.path.parents[1])).sessions
    return session


def test_model_that_repeats_its_golden_answers_is_opened(tmp_path: Path) -> None:
    bundle = sealed(tmp_path / "models", tmp_path / "work")
    session = opened(bundle)
    # The same kernels on the same processor: only the order of sums may differ.
    assert verify_golden(session, bundle.manifest, read_golden(bundle)) < 1e-2
    assert (bundle.path / GOLDEN_FILE).stat().st_size <= MAX_GOLDEN_BYTES


def test_swapped_model_with_a_matching_digest_is_refused(tmp_path: Path) -> None:
    bundle = sealed(tmp_path / "models", tmp_path / "work", change=scaled("table", 2.0))
    with pytest.raises(
        GoldenMismatch, match=r"output embedding is off by \S+ of its greatest number .*; 0.001 is"
    ) as why:
        opened(bundle)
    assert why.value.metadata()["what"] == "output embedding"
    assert float(why.value.metadata()["error"]) > 0.1


def test_swapped_tap_is_refused_although_all_outputs_are_equal(tmp_path: Path) -> None:
    def swap(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            if node.output[0] == "t1raw":
                node.input[0] = "tap1k"  # keys by keys: weights that sum to 1 and are wrong

    with pytest.raises(GoldenMismatch, match="attention of layer1 is off"):
        opened(sealed(tmp_path / "models", tmp_path / "work", change=swap))


def test_swapped_mean_over_heads_is_refused_although_all_weights_are_equal(tmp_path: Path) -> None:
    def swap(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            if node.output[0] == "attention_mean.layer1":
                node.input[1] = "one"  # divided by 1: the sum over heads

    with pytest.raises(
        GoldenMismatch, match=r"mean over heads of layer1 is off by 1 of its .* on CPUExecutionProvider"
    ):
        opened(sealed(tmp_path / "models", tmp_path / "work", change=swap))


def test_swapped_model_loads_without_the_check(tmp_path: Path) -> None:
    """The positive control: digests alone accept it."""
    bundle = sealed(tmp_path / "models", tmp_path / "work", change=scaled("table", 2.0))
    without = bundle.manifest.model_copy(update={"golden": None})
    files = {name: bundle.path / name for name in bundle.manifest.files if name != GOLDEN_FILE}
    assert opened(write_bundle(tmp_path / "others", without, files)).input_names


def test_rounding_of_another_provider_is_allowed(tmp_path: Path) -> None:
    opened(sealed(tmp_path / "models", tmp_path / "work", change=scaled("table", 1.0002)))


def test_model_that_cannot_run_on_the_golden_inputs_is_refused(tmp_path: Path) -> None:
    def cut(model: onnx.ModelProto) -> None:
        (table,) = [tensor for tensor in model.graph.initializer if tensor.name == "table"]
        table.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(table)[:2], "table"))

    with pytest.raises(GoldenMismatch, match="the run on the golden inputs failed"):
        opened(sealed(tmp_path / "models", tmp_path / "work", change=cut))


async def test_server_fails_the_swapped_model_and_serves_the_others(tmp_path: Path) -> None:
    sealed(tmp_path / "models", tmp_path / "good", "good")
    sealed(tmp_path / "models", tmp_path / "swapped", "swapped", change=scaled("table", 2.0))
    server = Application(Settings(repository=tmp_path / "models", host="127.0.0.1", grpc_port=0, http_port=0))
    try:
        with structlog.testing.capture_logs() as logged:
            await server.start()
        states = {model.name: (model.state, model.state_reason) for model in server.catalog.all()}
    finally:
        await server.aclose()
    assert states["good"][0] is ModelState.READY
    assert states["swapped"][0] is ModelState.FAILED
    assert "output embedding is off by" in states["swapped"][1]
    [failure] = [line for line in logged if line["event"] == "model failed to load"]
    assert (failure["reason"], bool(failure["exc_info"])) == (states["swapped"][1], False)


async def test_log_has_a_traceback_only_for_an_error_with_a_cause(tmp_path: Path) -> None:
    sealed(tmp_path / "models", tmp_path / "work", change=lambda model: model.graph.node[0].ClearField("op_type"))
    server = Application(Settings(repository=tmp_path / "models", host="127.0.0.1", grpc_port=0, http_port=0))
    try:
        with structlog.testing.capture_logs() as logged, pytest.raises(StartFailed):
            await server.start()
    finally:
        await server.aclose()
    [failure] = [line for line in logged if line["event"] == "model failed to load"]
    assert (failure["reason"], bool(failure["exc_info"])) == ("the runtime could not load the model", True)


@pytest.mark.parametrize(
    ("masks", "policy", "rows"),
    [
        ((), "proved", [3]),
        ((), "off", [1, 1, 1]),
        ((MaskNeed(input="input_ids", need="all", allowed_value=-1),), "proved", [1, 1, 1]),
    ],
    ids=["padded", "batching is off", "a need is broken"],
)
def test_golden_sequences_share_a_batch_only_if_padding_is_allowed(
    masks: tuple[MaskNeed, ...], policy: Batching, rows: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = sealed(tmp_path / "models", tmp_path / "work")
    manifest = bundle.manifest.model_copy(update={"certificate": proved("seq", masks=masks)}).under(policy)
    session = RuntimeSession.load(bundle.model_path, provider="CPUExecutionProvider")
    seen: list[int] = []
    run = session.run

    def watch(feeds: dict[str, np.ndarray], fetches: tuple[str, ...]) -> list[np.ndarray]:
        seen.append(len(feeds["input_ids"]))
        return run(feeds, fetches)

    monkeypatch.setattr(session, "run", watch)
    assert verify_golden(session, manifest, read_golden(bundle)) <= 1
    assert seen == rows


def test_bundle_without_golden_answers_loads(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "models", tiny_manifest(), _files(tmp_path))
    assert read_golden(bundle) == ()
    assert opened(bundle).input_names


@pytest.mark.parametrize(
    ("content", "why"),
    [(b"", "cannot be read"), (b"PK\x03\x04", "cannot be read"), (None, "has no input.0.0"), ("missing", "not listed")],
)
def test_broken_golden_file_is_reported(content: bytes | str | None, why: str, tmp_path: Path) -> None:
    bundle = sealed(tmp_path / "models", tmp_path / "work")
    files = {name: tmp_path / "copy" / name for name in bundle.manifest.files}
    shutil.copytree(bundle.path, tmp_path / "copy")
    if content == "missing":
        del files[GOLDEN_FILE]
    elif content is None:
        with files[GOLDEN_FILE].open("wb") as file:
            np.savez(file, other=np.zeros(2))
    else:
        assert isinstance(content, bytes)
        files[GOLDEN_FILE].write_bytes(content)
    with pytest.raises(BundleInvalid, match=why):
        opened(write_bundle(tmp_path / "others", bundle.manifest, files))


def test_golden_file_with_objects_is_refused(tmp_path: Path) -> None:
    bundle = sealed(tmp_path / "models", tmp_path / "work")
    shutil.copytree(bundle.path, tmp_path / "copy")
    with (tmp_path / "copy" / GOLDEN_FILE).open("wb") as file:
        np.savez(file, **{"input.0.0": np.array([{"code": 1}], dtype=object)})
    files = {name: tmp_path / "copy" / name for name in bundle.manifest.files}
    with pytest.raises(BundleInvalid, match="cannot be read"):
        opened(write_bundle(tmp_path / "others", bundle.manifest, files))


def test_a_golden_file_with_any_changed_byte_is_read_or_reported(tmp_path: Path) -> None:
    bundle = sealed(tmp_path / "models", tmp_path / "work")
    file = bundle.path / GOLDEN_FILE
    whole = file.read_bytes()
    reported = 0
    for place in range(0, len(whole), 5):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        try:
            read_golden(bundle)
        except BundleInvalid:
            reported += 1
    assert reported > len(whole) // 20


def test_same_model_gives_the_same_golden_file(tmp_path: Path) -> None:
    first, second = (sealed(tmp_path / name, tmp_path / f"work of {name}") for name in ("first", "second"))
    assert first.manifest.digest == second.manifest.digest
    assert Manifest.model_validate_json(first.manifest.model_dump_json()) == first.manifest


def test_sample_reaches_every_column_of_an_even_width() -> None:
    array = np.tile(np.arange(64), (100, 1))
    sample = sample_of(array, 1000)
    assert len(sample) <= 1000
    assert set(sample) == set(range(64))


@pytest.mark.parametrize(
    ("before", "now", "error"),
    [
        ([2.0, -4.0], [2.0, -4.0], 0.0),
        ([2.0, -4.0], [2.1, -4.0], 0.025),
        ([0.0, 0.0], [0.0, 1e-9], 1e-3),
        ([np.inf, 1.0], [np.inf, 1.0], 0.0),
        ([np.nan, 1.0], [np.nan, 1.0], 0.0),
        ([1.0, 1.0], [np.nan, 1.0], np.inf),
        ([np.inf, 1.0], [-np.inf, 1.0], np.inf),
        ([1.0], [1.0, 1.0], np.inf),
    ],
)
def test_errors_are_relative_to_the_greatest_number(before: list[float], now: list[float], error: float) -> None:
    assert error_of(np.array(before), np.array(now)) == pytest.approx(error)


def _files(tmp_path: Path) -> dict[str, Path]:
    (tmp_path / "files").mkdir()
    return write_tiny_files(tmp_path / "files")
