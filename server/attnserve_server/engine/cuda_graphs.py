"""CUDA graphs: runs of a few fixed shapes whose kernels are launched all at once, as they were recorded.

A small run spends most of its time on launching kernels one by one; replaying a recording of them takes a third to a
half of it (H200, MiniLM, 1 x 32 and 8 x 32 tokens). What it costs: each run is padded up to the shape recorded, and a
session that records runs one at a time. So it is for latency where the device is mostly idle, and off by default.

Only runs in which nobody asks for attention are recorded; the others run as ever, in turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any, Final

import numpy as np
import onnxruntime as ort

from attnserve_server.domain.values import Array

_MAX_RECORDINGS: Final = 64
"""Recordings hold device memory: callers who name ever other outputs get no more of them."""
_NOT_RECORDED: Final = "-1"
"""The graph id that tells the provider to run as ever (onnxruntime, "CUDA Execution Provider": gpu_graph_id)."""


@dataclass(frozen=True, slots=True)
class GraphPlan:
    """What to record: shapes as (rows, tokens), and of each input of (rows, tokens) its padding value."""

    shapes: tuple[tuple[int, int], ...]
    padding: Mapping[str, float]


def shape_for(rows: int, tokens: int, shapes: Sequence[tuple[int, int]]) -> tuple[int, int] | None:
    """The shape of the fewest positions that holds so many rows of so many tokens; None where none does."""
    holding = [shape for shape in shapes if shape[0] >= rows and shape[1] >= tokens]
    return min(holding, key=lambda shape: (shape[0] * shape[1], shape), default=None)


def filled_up(array: Array, shape: tuple[int, int], padding: float) -> Array:
    """`array` (rows, tokens) in a larger one: tokens are padded, rows repeat the first, which any model can run."""
    rows, tokens = array.shape
    full = np.full(shape, padding, array.dtype)
    full[:rows, :tokens] = array
    full[rows:] = full[0]
    return full


class RecordedRuns:
    """The recordings of one session. Any thread; runs, recorded or not, take turns."""

    def __init__(self, session: ort.InferenceSession, device_id: int, plan: GraphPlan) -> None:
        self.turn = Lock()
        self._session = session
        self._device_id = device_id
        self._plan = plan
        self._made: dict[tuple[tuple[int, int], tuple[str, ...]], _Recording] = {}  # under the lock

    def covers(self, feeds: Mapping[str, Array], fetches: Sequence[str]) -> tuple[int, int] | None:
        """The shape under which a run can be replayed; None where it must run as ever."""
        if any(array.size for name, array in feeds.items() if name not in self._plan.padding):
            return None  # somebody asks for attention
        rows, tokens = next(array.shape for name, array in feeds.items() if name in self._plan.padding)
        shape = shape_for(rows, tokens, self._plan.shapes)
        known = shape is None or (shape, tuple(fetches)) in self._made
        return shape if known or len(self._made) < _MAX_RECORDINGS else None

    def run(self, feeds: Mapping[str, Array], fetches: Sequence[str], shape: tuple[int, int]) -> list[Array]:
        """Replays a run, recording it first where it is new, with the turn held. Outputs have the shape's rows."""
        full = {
            name: filled_up(array, shape, self._plan.padding[name]) if name in self._plan.padding else array
            for name, array in feeds.items()
        }
        key = (shape, tuple(fetches))
        recording = self._made.get(key)
        if recording is None:
            recording = _Recording(self._session, self._device_id, full, fetches, number=len(self._made) + 1)
            self._made[key] = recording
        return recording.replay(full)


def run_as_ever(options: ort.RunOptions) -> ort.RunOptions:
    """Options of a run that is not to be recorded, in a session that records."""
    options.add_run_config_entry("gpu_graph_id", _NOT_RECORDED)
    return options


class _Recording:
    """One shape with its buffers on the device, which stay where they are as long as the recording lives."""

    def __init__(
        self,
        session: ort.InferenceSession,
        device_id: int,
        feeds: Mapping[str, Array],
        fetches: Sequence[str],
        number: int,
    ) -> None:
        self._session = session
        self._options = ort.RunOptions()
        self._options.add_run_config_entry("gpu_graph_id", str(number))
        self._inputs: dict[str, Any] = {
            name: ort.OrtValue.ortvalue_from_numpy(array, "cuda", device_id) for name, array in feeds.items()
        }
        # One run as ever tells the outputs' shapes.
        plain = ort.RunOptions()
        shaped = session.run(list(fetches), dict(feeds), run_as_ever(plain))
        self._outputs = [ort.OrtValue.ortvalue_from_numpy(array, "cuda", device_id) for array in shaped]
        self._binding = session.io_binding()
        for name, value in self._inputs.items():
            self._binding.bind_ortvalue_input(name, value)
        for name, value in zip(fetches, self._outputs, strict=True):
            self._binding.bind_ortvalue_output(name, value)

    def replay(self, feeds: Mapping[str, Array]) -> list[Array]:
        for name, value in self._inputs.items():
            if feeds[name].size:
                value.update_inplace(feeds[name])
        self._session.run_with_iobinding(self._binding, self._options)
        return [value.numpy() for value in self._outputs]
