"""The runtime session: load a model with a provider, run it, stop a run, and its options for int8.

Models are fixtures of conftest.py. Loading raises LoadFailed or ProviderUnavailable, and a run RunFailed or
RunTerminated. Tests about a missing CUDA are skipped where the runtime offers it, and one test is skipped without VNNI.
"""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from attnserve_server.engine import session as session_module
from attnserve_server.engine import session_options
from attnserve_server.engine.session import (
    LoadFailed,
    ProviderUnavailable,
    RunFailed,
    RunHandle,
    RunTerminated,
    RuntimeSession,
    write_optimised,
)

NOBODY = {f"attention_items.site{site}": np.empty(0, np.int64) for site in (0, 1)}


def feeds(ids: list[list[int]]) -> dict[str, np.ndarray]:
    array = np.array(ids, np.int64)
    return {"input_ids": array, "attention_mask": np.ones_like(array), **NOBODY}


def test_names_and_the_provider_in_use_are_read_from_the_session(embedder_path: Path) -> None:
    session = RuntimeSession.load(embedder_path, intra_op_threads=1)
    assert session.provider == "CPUExecutionProvider" or "CUDAExecutionProvider" in ort.get_available_providers()
    assert set(session.input_names) == set(feeds([[1]]))
    assert session.output_names == ("last_hidden_state", "embedding", "attention.site0", "attention.site1")


def test_run_gives_the_fetched_outputs_in_order(embedder_path: Path, embed) -> None:
    session = RuntimeSession.load(embedder_path, provider="CPUExecutionProvider", intra_op_threads=1)
    embedding, hidden = session.run(feeds([[1, 2, 3]]), ["embedding", "last_hidden_state"])
    # float32 sums of three terms: rounding only
    np.testing.assert_allclose(embedding[0], embed(np.array([1, 2, 3])), atol=1e-6)
    assert hidden.shape == (1, 3, 8)


def test_empty_items_give_an_empty_tap(embedder_path: Path) -> None:
    session = RuntimeSession.load(embedder_path, provider="CPUExecutionProvider", intra_op_threads=1)
    (weights,) = session.run(feeds([[1, 2]]), ["attention.site0"])
    assert weights.shape == (0, 2, 2, 2)


def test_fetching_nothing_gives_nothing(embedder_path: Path) -> None:
    session = RuntimeSession.load(embedder_path, provider="CPUExecutionProvider", intra_op_threads=1)
    assert session.run(feeds([[1, 2]]), []) == []


@pytest.mark.parametrize(("exact_shape", "way"), [(False, "recorded"), (True, "not recorded")])
def test_run_of_an_exact_shape_is_not_replayed_from_a_larger_recording(
    embedder_path: Path, exact_shape: bool, way: str
) -> None:
    class Recorded:
        turn = threading.Lock()

        def covers(self, feeds: object, fetches: object) -> tuple[int, int]:
            return (1, 8)

        def run(self, feeds: object, fetches: object, shape: object) -> list[str]:
            return ["recorded"]

    class Bound:
        def run(self, feeds: object, fetches: object, options: object) -> list[str]:
            return ["not recorded"]

    session = RuntimeSession.load(embedder_path, provider="CPUExecutionProvider")
    session._recorded, session._bound = Recorded(), Bound()  # type: ignore[assignment]
    assert session.run(feeds([[1, 2]]), ["embedding"], exact_shape=exact_shape) == [way]


def test_failed_run_has_no_text_of_the_runtime_in_its_message(poisoned_path: Path, capfd) -> None:
    session = RuntimeSession.load(poisoned_path, provider="CPUExecutionProvider", intra_op_threads=1)
    with pytest.raises(RunFailed) as caught:
        session.run(feeds([[49]]), ["embedding"])
    assert str(caught.value) == "the run failed"
    assert caught.value.__cause__ is not None
    assert capfd.readouterr() == ("", ""), "the runtime writes no lines"
    session.run(feeds([[1]]), ["embedding"])


def test_missing_feed_fails_the_run_only(embedder_path: Path) -> None:
    session = RuntimeSession.load(embedder_path, provider="CPUExecutionProvider", intra_op_threads=1)
    with pytest.raises(RunFailed):
        session.run({}, ["embedding"])


def test_terminate_from_another_thread_stops_the_run(slow_path: Path) -> None:
    session = RuntimeSession.load(slow_path, provider="CPUExecutionProvider", intra_op_threads=1)
    handle = RunHandle()
    stopper = threading.Timer(0.05, handle.terminate)  # real time, because the run is endless
    stopper.start()
    with pytest.raises(RunTerminated):
        session.run({"x": np.ones((1, 4), np.float32)}, ["y"], handle)
    stopper.join()


def test_terminated_handle_refuses_a_run(slow_path: Path) -> None:
    session = RuntimeSession.load(slow_path, provider="CPUExecutionProvider", intra_op_threads=1)
    handle = RunHandle()
    assert not handle.terminated
    handle.terminate()
    assert handle.terminated
    with pytest.raises(RunTerminated):
        session.run({"x": np.ones((1, 4), np.float32)}, ["y"], handle)


def test_handle_can_be_used_for_several_runs(embedder_path: Path) -> None:
    session = RuntimeSession.load(embedder_path, provider="CPUExecutionProvider", intra_op_threads=1)
    handle = RunHandle()
    for _ in range(2):
        session.run(feeds([[1]]), ["embedding"], handle)
    handle.terminate()
    with pytest.raises(RunTerminated):
        session.run(feeds([[1]]), ["embedding"], handle)


def test_provider_that_is_not_offered_is_refused_by_name(embedder_path: Path) -> None:
    with pytest.raises(ProviderUnavailable, match=r"NoSuchProvider is not available: .*CPUExecutionProvider"):
        RuntimeSession.load(embedder_path, provider="NoSuchProvider", intra_op_threads=1)


@pytest.mark.skipif("CUDAExecutionProvider" in ort.get_available_providers(), reason="the runtime here offers CUDA")
def test_required_provider_refuses_to_run_on_another(embedder_path: Path) -> None:
    with pytest.raises(ProviderUnavailable) as caught:
        RuntimeSession.load(embedder_path, intra_op_threads=1, required_provider="CUDAExecutionProvider")
    assert caught.value.wanted == "CUDAExecutionProvider"
    assert "CPUExecutionProvider" in caught.value.available


def test_required_provider_against_another_chosen_one_is_refused(embedder_path: Path) -> None:
    with pytest.raises(ProviderUnavailable):
        RuntimeSession.load(
            embedder_path,
            provider="CPUExecutionProvider",
            intra_op_threads=1,
            required_provider="CUDAExecutionProvider",
        )


def test_required_provider_is_taken_when_the_choice_is_auto(embedder_path: Path) -> None:
    session = RuntimeSession.load(embedder_path, intra_op_threads=1, required_provider="CPUExecutionProvider")
    assert session.provider == "CPUExecutionProvider"


@pytest.fixture
def pretends_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """A runtime that offers CUDA but cannot load it, as on a machine without a driver."""
    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("the runtime here offers CUDA")
    real = ort.InferenceSession

    def refusing(path: str, *, providers: list, **options: object) -> ort.InferenceSession:
        if providers[0][0] == "CUDAExecutionProvider":
            raise RuntimeError("libcuda.so.1 is not there")
        return real(path, providers=providers, **options)

    monkeypatch.setattr(
        session_module.ort, "get_available_providers", lambda: ["CUDAExecutionProvider", session_module.CPU]
    )
    monkeypatch.setattr(session_module.ort, "InferenceSession", refusing)


def test_auto_falls_back_to_the_cpu_if_cuda_does_not_load(embedder_path: Path, pretends_cuda: None) -> None:
    assert RuntimeSession.load(embedder_path, intra_op_threads=1).provider == "CPUExecutionProvider"


def test_cuda_by_name_does_not_fall_back(embedder_path: Path, pretends_cuda: None) -> None:
    with pytest.raises(ProviderUnavailable):
        RuntimeSession.load(embedder_path, provider="CUDAExecutionProvider", intra_op_threads=1)
    with pytest.raises(ProviderUnavailable):
        RuntimeSession.load(embedder_path, intra_op_threads=1, required_provider="CUDAExecutionProvider")


def test_file_that_is_not_a_model_is_refused_without_its_path(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"no model")
    with pytest.raises(LoadFailed) as caught:
        RuntimeSession.load(path, intra_op_threads=1)
    assert str(tmp_path) not in str(caught.value)


def products_of_bytes(path: Path, *, products: int) -> Path:
    """The sum of MatMuls of one uint8 input (B, 64) with one int8 weight (64, 8), all 127."""
    made = [onnx.helper.make_node("MatMulInteger", ["x", "weights"], [f"y{index}"]) for index in range(products)]
    floats = [onnx.helper.make_node("Cast", [f"y{index}"], [f"z{index}"], to=1) for index in range(products)]
    added = onnx.helper.make_node("Sum", [f"z{index}" for index in range(products)], ["y"])
    graph = onnx.helper.make_graph(
        [*made, *floats, added],
        "bytes",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.UINT8, ["batch", 64])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["batch", 8])],
        [onnx.numpy_helper.from_array(np.full((64, 8), 127, np.int8), "weights")],
    )
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ort.SessionOptions]]:
    """Provider and options of each session, in the order of opening."""
    sessions: list[tuple[str, ort.SessionOptions]] = []
    opening = session_module.ort.InferenceSession

    def recording(path: str, *, sess_options: ort.SessionOptions, providers: list, **options: object) -> object:
        sessions.append((providers[0][0], sess_options))
        return opening(path, sess_options=sess_options, providers=providers, **options)

    monkeypatch.setattr(session_module.ort, "InferenceSession", recording)
    return sessions


def entry(options: ort.SessionOptions, name: str) -> str:
    """One entry of a session's configuration; empty if there is none."""
    with contextlib.suppress(RuntimeError):
        return options.get_session_config_entry(name)
    return ""


def left_out(opened: list[tuple[str, ort.SessionOptions]]) -> dict[str, str]:
    """The optimizers disabled in each provider's session."""
    return {provider: entry(options, "optimization.disable_specified_optimizers") for provider, options in opened}


def test_int8_products_are_exact_on_every_processor(tmp_path: Path) -> None:
    # 255 * 127, twice, does not fit in the 16 bits in which processors without VNNI add.
    session = RuntimeSession.load(products_of_bytes(tmp_path / "model.onnx", products=1))
    (y,) = session.run({"x": np.full((3, 64), 255, np.uint8)}, ["y"])
    np.testing.assert_array_equal(y, np.full((3, 8), 64 * 255 * 127))


def test_int8_weights_are_converted_only_if_products_saturate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: list[tuple[str, ort.SessionOptions]]
) -> None:
    """Checks the option only, because the processor that runs the test may not need it."""
    path = products_of_bytes(tmp_path / "model.onnx", products=1)
    for exact in (True, False):
        monkeypatch.setattr(session_options, "multiplies_int8_exactly", lambda exact=exact: exact)
        RuntimeSession.load(path)
    assert [entry(options, "session.x64quantprecision") for _, options in opened] == ["", "1"]


def test_bytes_of_the_measured_product_are_those_of_onnx() -> None:
    node = onnx.helper.make_node("MatMulInteger", ["x", "w"], ["y"])
    graph = onnx.helper.make_graph(
        [node],
        "",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.UINT8, ["m", 64])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.INT32, ["m", 32])],
        [onnx.numpy_helper.from_array(np.full((64, 32), 127, np.int8), "w")],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    assert model.SerializeToString() == session_options._PRODUCT


def test_processors_with_vnni_multiply_int8_exactly() -> None:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists() or "_vnni" not in cpuinfo.read_text():
        pytest.skip("this processor is not known to have VNNI")
    assert session_options.multiplies_int8_exactly()


def test_converted_weights_give_exact_products_and_shared_weights_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path of processors without VNNI, which works on every processor."""
    monkeypatch.setattr(session_options, "multiplies_int8_exactly", lambda: False)
    session = RuntimeSession.load(products_of_bytes(tmp_path / "one.onnx", products=1))
    (y,) = session.run({"x": np.full((3, 64), 255, np.uint8)}, ["y"])
    np.testing.assert_array_equal(y, np.full((3, 8), 64 * 255 * 127))
    session = RuntimeSession.load(products_of_bytes(tmp_path / "two.onnx", products=2))
    (y,) = session.run({"x": np.ones((3, 64), np.uint8)}, ["y"])
    np.testing.assert_array_equal(y, np.full((3, 8), 2 * 64 * 127))


def test_shared_int8_weights_load_on_every_processor(tmp_path: Path) -> None:
    session = RuntimeSession.load(products_of_bytes(tmp_path / "model.onnx", products=2))
    (y,) = session.run({"x": np.ones((3, 64), np.uint8)}, ["y"])
    np.testing.assert_array_equal(y, np.full((3, 8), 2 * 64 * 127))


def test_each_provider_disables_its_own_optimizers(
    embedder_path: Path, pretends_cuda: None, opened: list[tuple[str, ort.SessionOptions]]
) -> None:
    RuntimeSession.load(embedder_path, intra_op_threads=1)
    assert left_out(opened) == {
        "CUDAExecutionProvider": "BiasSoftmaxFusion",
        "CPUExecutionProvider": "SkipLayerNormFusion",
    }


@pytest.mark.parametrize(("names", "listed"), [((), ""), (("MatMulAddFusion", "Other"), "MatMulAddFusion;Other")])
def test_bundle_overrides_the_optimizers_disabled_on_a_cpu(
    names: tuple[str, ...],
    listed: str,
    embedder_path: Path,
    pretends_cuda: None,
    opened: list[tuple[str, ort.SessionOptions]],
) -> None:
    RuntimeSession.load(embedder_path, left_out=names)
    assert left_out(opened) == {"CUDAExecutionProvider": "BiasSoftmaxFusion", "CPUExecutionProvider": listed}


def test_written_optimized_graph_has_the_same_inputs_and_outputs(embedder_path: Path, tmp_path: Path) -> None:
    write_optimised(embedder_path, tmp_path / "optimised.onnx")
    plain, optimised = (RuntimeSession.load(path) for path in (embedder_path, tmp_path / "optimised.onnx"))
    assert (optimised.input_names, optimised.output_names) == (plain.input_names, plain.output_names)


def test_unreadable_graph_cannot_be_written_optimized(tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"no graph")
    with pytest.raises(LoadFailed):
        write_optimised(tmp_path / "broken.onnx", tmp_path / "optimised.onnx")


@pytest.mark.parametrize(("exact_shape", "way"), [(False, "replayed"), (True, "not recorded")])
def test_run_of_an_exact_shape_replays_no_recording(embedder_path: Path, exact_shape: bool, way: str) -> None:
    """A replay pads the run to the recorded shape. Fakes replace the GPU's outputs and recordings."""
    ways: list[str] = []

    class Graphs:
        turn = threading.Lock()

        def covers(self, feeds: object, fetches: object) -> tuple[int, int]:
            return 8, 32

        def run(self, feeds: object, fetches: object, shape: tuple[int, int]) -> list[np.ndarray]:
            ways.append("replayed")
            return []

    class Bound:
        def run(self, feeds: object, fetches: object, options: ort.RunOptions) -> list[np.ndarray]:
            ways.append("not recorded")
            return []

    session = RuntimeSession.load(embedder_path, provider="CPUExecutionProvider", intra_op_threads=1)
    session._bound, session._recorded = Bound(), Graphs()  # type: ignore[assignment]
    session.run(feeds([[1, 2]]), ["embedding"], exact_shape=exact_shape)
    assert ways == [way]
