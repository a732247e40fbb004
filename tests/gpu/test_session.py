"""A session on a GPU answers as one on the CPU does: bound to pinned memory, in threads, stopped, and from recordings.

A recording is a CUDA graph of runs of one shape; smaller runs are padded to it. The model is the one of `tiny_bundle`.
Skipped, with the reason, where there is no GPU.
"""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from attnserve_server.engine.providers import CPU, CUDA, visible_gpus
from attnserve_server.engine.session import RunHandle, RunTerminated, RuntimeSession
from attnserve_server.engine.shapes import ShapePlan
from gpus import WHY_NOT
from tiny_bundle import tiny_manifest, write_tiny_files

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)]

# The same float32 arithmetic in another order, over sums of a few hundred terms.
TOLERANCE = 1e-4
MANIFEST = tiny_manifest()
OUTPUTS = [spec.name for spec in MANIFEST.outputs]
TAPS = [(site.items_input, site.weights_output) for site in MANIFEST.sites if site.available]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_files(tmp_path_factory.mktemp("tiny"))["model.onnx"]


@pytest.fixture(scope="module")
def cpu(path: Path) -> RuntimeSession:
    return RuntimeSession.load(path, provider=CPU)


@pytest.fixture(scope="module")
def gpu(path: Path) -> RuntimeSession:
    return RuntimeSession.load(path, provider=CUDA)


def feeds(rows: int, tokens: int, asking: tuple[int, ...] = ()) -> dict[str, np.ndarray]:
    random = np.random.default_rng(rows * 1000 + tokens)
    mask = np.ones((rows, tokens), np.int64)
    mask[0, tokens // 2 + 1 :] = 0
    made = {"input_ids": random.integers(0, MANIFEST.vocabulary_size, (rows, tokens)), "attention_mask": mask}
    return made | {str(items): np.array(asking, np.int64) for items, _ in TAPS}


def assert_alike(left: list[np.ndarray], right: list[np.ndarray]) -> None:
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=TOLERANCE)


def test_there_is_a_gpu_to_run_on() -> None:
    assert visible_gpus() >= 1


@pytest.mark.parametrize(("rows", "tokens"), [(1, 1), (1, 9), (5, 16), (32, 40)])
def test_answers_and_weights_equal_the_cpus(cpu: RuntimeSession, gpu: RuntimeSession, rows: int, tokens: int) -> None:
    given = feeds(rows, tokens, tuple(range(0, rows, 2)))
    fetches = [*OUTPUTS, *(str(weights) for _, weights in TAPS)]
    assert_alike(gpu.run(given, fetches), cpu.run(given, fetches))


def test_means_over_heads_equal_those_of_the_weights(gpu: RuntimeSession) -> None:
    taps = [(site.weights_output, site.mean_output) for site in MANIFEST.sites]
    for asking in ((0,), (2, 0), (0, 1, 2, 3)):
        given = feeds(4, 21, asking)
        for weights, mean in taps:
            whole, joined = gpu.run(given, [str(weights), str(mean)])
            (alone,) = gpu.run(given, [str(mean)])
            # Sums of two float32 weights of at most 1, without TF32.
            np.testing.assert_allclose(joined, whole.mean(axis=1, dtype=np.float64), rtol=0, atol=1e-6)
            np.testing.assert_array_equal(alone, joined)


def test_runs_with_and_without_selected_rows_share_the_empty_inputs(cpu: RuntimeSession, gpu: RuntimeSession) -> None:
    fetches = [*OUTPUTS, *(str(site.mean_output) for site in MANIFEST.sites)]
    for asking in ((), (1,), (), (0, 2), ()):
        given = feeds(3, 12, asking)
        given[str(TAPS[0][0])] = np.empty(0, np.int64)
        assert_alike(gpu.run(given, fetches), cpu.run(given, fetches))


def test_large_outputs_are_whole_when_a_run_returns(cpu: RuntimeSession, gpu: RuntimeSession) -> None:
    """An array that is read before its copy from the device is complete would differ at its end."""
    fetches = [*OUTPUTS, *(name for site in MANIFEST.sites for name in site.outputs)]
    given = feeds(64, 32, tuple(range(64)))
    wanted = cpu.run(given, fetches)
    for _ in range(50):
        assert_alike(gpu.run(given, fetches), wanted)


def test_later_runs_do_not_change_earlier_answers(gpu: RuntimeSession) -> None:
    first = gpu.run(feeds(4, 16), OUTPUTS)
    before = [array.copy() for array in first]
    for tokens in range(8, 40):
        gpu.run(feeds(4, tokens), OUTPUTS)
    for array, copy in zip(first, before, strict=True):
        np.testing.assert_array_equal(array, copy)


def test_threads_share_a_session_without_mixing_answers(cpu: RuntimeSession, gpu: RuntimeSession) -> None:
    shapes = [(rows, tokens) for rows in (1, 3, 8) for tokens in (4, 16, 33)]
    wanted = {shape: cpu.run(feeds(*shape), OUTPUTS) for shape in shapes}
    faults: list[BaseException] = []

    def loop(shape: tuple[int, int]) -> None:
        try:
            for _ in range(20):
                assert_alike(gpu.run(feeds(*shape), OUTPUTS), wanted[shape])
        except BaseException as fault:  # noqa: BLE001 - the main thread asserts that there are none
            faults.append(fault)

    threads = [threading.Thread(target=loop, args=(shape,)) for shape in shapes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults


def test_a_terminated_handle_stops_a_run(gpu: RuntimeSession) -> None:
    handle = RunHandle()
    handle.terminate()
    with pytest.raises(RunTerminated):
        gpu.run(feeds(1, 4), OUTPUTS, handle)


def test_recorded_runs_give_the_answers_of_other_runs(path: Path, cpu: RuntimeSession) -> None:
    plan = ShapePlan(((1, 8), (4, 16)), {spec.name: spec.padding for spec in MANIFEST.inputs})
    session = RuntimeSession.load(path, provider=CUDA, graphs=plan)
    shapes = [(1, 8), (1, 5), (3, 16), (2, 9), (4, 12), (8, 8), (1, 40)]
    for _ in range(3):
        for rows, tokens in shapes:
            for items in ((), (0,)):
                given = feeds(rows, tokens, items)
                fetches = [*OUTPUTS, *(str(weights) for _, weights in TAPS if items)]
                got = session.run(given, fetches)
                wanted = cpu.run(given, fetches)
                # A recorded run returns the rows and tokens that it was padded to; callers crop them.
                cut = [
                    one[tuple(slice(extent) for extent in other.shape)] for one, other in zip(got, wanted, strict=True)
                ]
                assert_alike(cut, wanted)


def test_run_that_must_keep_its_shape_is_not_padded_to_a_recording(path: Path, cpu: RuntimeSession) -> None:
    plan = ShapePlan(((1, 8),), {spec.name: spec.padding for spec in MANIFEST.inputs})
    session = RuntimeSession.load(path, provider=CUDA, graphs=plan)
    given = feeds(1, 5)
    assert session.run(given, OUTPUTS)[0].shape[1] == 8, "recorded"
    kept = session.run(given, OUTPUTS, exact_shape=True)
    assert kept[0].shape[1] == 5
    assert_alike(kept, cpu.run(given, OUTPUTS))
