"""Bound runs, with the processor's memory in place of a GPU's. Pinned memory, and replaying, need a GPU: tests/gpu.

A run whose options terminate it raises RuntimeError.
"""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from attnserve_server.engine.gpu import PinnedOutputs
from attnserve_server.engine.session import CPU, RuntimeSession


def bound(path: Path) -> PinnedOutputs:
    """The bound runs of a GPU, with the inputs and outputs in the processor's memory."""
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return PinnedOutputs(session, 0, device="cpu")


def feeds(tokens: int, *items: int) -> dict[str, np.ndarray]:
    ids = np.arange(2 * tokens).reshape(2, tokens) % 40
    rows = {f"attention_items.site{site}": np.array(items if site == 0 else (), np.int64) for site in (0, 1)}
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), **rows}


FETCHES = ("embedding", "attention_mean.site0", "attention.site1")


def test_bound_runs_give_the_answers_of_other_runs(joined_path: Path) -> None:
    pinned = bound(joined_path)
    plain = RuntimeSession.load(joined_path, provider=CPU)
    for items in ((), (1,), (0, 1), (), (1, 0)):
        got = pinned.run(feeds(5, *items), FETCHES, ort.RunOptions())
        for one, other in zip(got, plain.run(feeds(5, *items), FETCHES), strict=True):
            np.testing.assert_array_equal(one, other)
            assert one.dtype == other.dtype


def test_empty_inputs_are_bound_without_a_copy(joined_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = bound(joined_path)
    copied: list[str] = []
    bind = ort.IOBinding.bind_cpu_input

    def noted(self: ort.IOBinding, name: str, array: np.ndarray) -> None:
        copied.append(name)
        bind(self, name, array)

    monkeypatch.setattr(ort.IOBinding, "bind_cpu_input", noted)
    pinned.run(feeds(5), FETCHES, ort.RunOptions())
    assert copied == ["input_ids", "attention_mask"]
    pinned.run(feeds(5, 1), FETCHES, ort.RunOptions())
    assert copied[2:] == ["input_ids", "attention_mask", "attention_items.site0"]


def test_arrays_of_bound_runs_outlive_the_binding_and_later_runs(joined_path: Path) -> None:
    pinned = bound(joined_path)
    first = pinned.run(feeds(5, 0), FETCHES, ort.RunOptions())
    before = [array.copy() for array in first]
    for tokens in range(3, 30):
        pinned.run(feeds(tokens, 1), FETCHES, ort.RunOptions())
    for array, copy in zip(first, before, strict=True):
        np.testing.assert_array_equal(array, copy)


def test_bound_run_can_be_stopped(slow_path: Path) -> None:
    pinned, options = bound(slow_path), ort.RunOptions()
    timer = threading.Timer(0.2, lambda: setattr(options, "terminate", True))
    timer.start()
    with pytest.raises(RuntimeError, match="terminate flag"):
        pinned.run({"x": np.ones((1, 3), np.float32)}, ["y"], options)
    timer.join()
