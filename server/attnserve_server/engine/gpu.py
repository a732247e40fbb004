"""Runs on an NVIDIA GPU: outputs in pinned memory, and CUDA graphs for a few fixed shapes.

Pinned memory: without it, the runtime copies each output to pageable memory through a staging buffer of the driver, and
the GPU waits for the copy. On an H200, a run of MiniLM's hidden states at 128 x 64 tokens takes 0.88 (float32) and 0.74
(float16) of the time with it.

Copies: those of outputs are queued on the run's stream, and a run ends when its stream has ended, so that no array is
read before its copy is complete. The other ways of onnxruntime's Python API (1.31.1, 1.32) are not used:

- The option `disable_synchronize_execution_providers` returns before the copies are complete, and
  `synchronize_outputs` waits for the stream of the provider, which is not that of the run.
- `run_with_ortvaluevector` queues copies of inputs too, but cannot be stopped
  (findings/ortvaluevector_run_cannot_be_stopped.sh).

A binding copies each input when it is bound, and waits for it. Each tap has an input of rows, which is empty where no
sequence selects attention. Empty inputs are made on the device once, and bound without a copy.

CUDA graphs: a small run spends most of its time on launching kernels one by one. Replaying a recorded graph takes a
third to a half of that time (H200, MiniLM, 1 x 32 and 8 x 32 tokens). The price: each run is padded to a recorded
shape, and a session that records runs one batch at a time. They reduce latency on a mostly idle device, and are off by
default. Only runs without attention are recorded; all others run normally, one at a time.

Exceptions of the runtime pass unchanged; `session` replaces them by its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from threading import Lock
from typing import Any, Final

import numpy as np
import onnxruntime as ort
from onnxruntime.capi import _pybind_state

from attnserve_server.domain.values import Array
from attnserve_server.engine.shapes import ShapePlan

_HOST_ACCESSIBLE: Final = 5
"""OrtDevice::MemType::HOST_ACCESSIBLE, which has no name in Python (onnxruntime, include/.../ortdevice.h)."""
_NVIDIA: Final = 0x10DE
"""The PCI vendor id."""
_DTYPES: Final[Mapping[str, type[Any]]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}
_MAX_RECORDINGS: Final = 64
"""Recordings hold device memory, and callers choose the outputs of a run, so the number is bounded."""
_GRAPH_ID: Final = "gpu_graph_id"
_NOT_RECORDED: Final = "-1"
"""Graph id of a run that is neither recorded nor replayed (onnxruntime, "CUDA Execution Provider": gpu_graph_id)."""


class PinnedOutputs:
    """Runs a session with its outputs in pinned memory. Any thread, several at a time."""

    def __init__(self, session: ort.InferenceSession, device_id: int, *, device: str = "cuda") -> None:
        """Store where inputs and outputs are. `device`: `cuda`; `cpu` runs the same code without a GPU."""
        self._session = session
        self._place = (device, device_id)
        kinds = _pybind_state.OrtDevice
        self._device = (
            kinds(kinds.cuda(), _HOST_ACCESSIBLE, _NVIDIA, device_id)
            if device == "cuda"
            else kinds(kinds.cpu(), kinds.default_memory(), device_id)
        )
        # By dtype. Any thread: a value that two threads make at once is only made twice. Runs read them alone.
        self._empty: dict[str, ort.OrtValue] = {}

    def run(self, feeds: Mapping[str, Array], fetches: Sequence[str], options: ort.RunOptions) -> list[Array]:
        """Return the outputs in the order of `fetches`, each in pinned memory that is freed with the array."""
        binding = self._session.io_binding()
        for name, array in feeds.items():
            if array.shape == (0,):
                binding.bind_ortvalue_input(name, self._empty_of(array))
            else:
                binding.bind_cpu_input(name, array)
        for name in fetches:
            # The public binding has no parameter for the kind of memory.
            binding._iobinding.bind_output(name, self._device)  # noqa: SLF001 - the public binding has no such parameter
        self._session.run_with_iobinding(binding, options)
        binding.synchronize_outputs()
        return [_array_on(value) for value in binding.get_outputs()]

    def _empty_of(self, array: Array) -> ort.OrtValue:
        """Return the empty value of an array's dtype on the device."""
        known = self._empty.get(array.dtype.str)
        if known is None:
            known = self._empty[array.dtype.str] = ort.OrtValue.ortvalue_from_numpy(array, *self._place)
        return known


class _Pinned:
    """Exposes a runtime value's memory to NumPy, which keeps this object as long as the array lives."""

    def __init__(self, value: Any, dtype: np.dtype[Any]) -> None:
        self.value = value
        self.__array_interface__ = {
            "data": (value.data_ptr(), False),
            "shape": tuple(value.shape()),
            "typestr": dtype.str,
            "version": 3,
        }


def _array_on(value: Any) -> Array:
    """An array in the memory of a runtime value."""
    dtype: np.dtype[Any] = np.dtype(_DTYPES[value.data_type()])
    if 0 in value.shape():
        return np.empty(value.shape(), dtype)
    return np.asarray(_Pinned(value, dtype))


class RecordedRuns:
    """The CUDA graphs of one session. Any thread; hold `turn` for every run, recorded or not."""

    def __init__(self, session: ort.InferenceSession, device_id: int, plan: ShapePlan) -> None:
        self.turn = Lock()
        self._session = session
        self._device_id = device_id
        self._plan = plan
        self._made: dict[tuple[tuple[int, int], tuple[str, ...]], _Recording] = {}  # under the lock

    def covers(self, feeds: Mapping[str, Array], fetches: Sequence[str]) -> tuple[int, int] | None:
        """Return the recorded shape for a run; None if it must run without a recording."""
        if any(array.size for name, array in feeds.items() if name not in self._plan.padding):
            return None  # a sequence selects attention
        shape = self._plan.shape_of(feeds)
        known = shape is None or (shape, tuple(fetches)) in self._made
        return shape if known or len(self._made) < _MAX_RECORDINGS else None

    def run(self, feeds: Mapping[str, Array], fetches: Sequence[str], shape: tuple[int, int]) -> list[Array]:
        """Replay a run, or record it first. The caller holds `turn`. Outputs have the rows of `shape`."""
        full = self._plan.filled(feeds, shape)
        key = (shape, tuple(fetches))
        recording = self._made.get(key)
        if recording is None:
            recording = _Recording(self._session, self._device_id, full, fetches, number=len(self._made) + 1)
            self._made[key] = recording
        return recording.replay(full)


def not_recorded(options: ort.RunOptions) -> ort.RunOptions:
    """Set the options of a run that is not recorded, in a session that records others."""
    options.add_run_config_entry(_GRAPH_ID, _NOT_RECORDED)
    return options


class _Recording:
    """One recorded shape with its device buffers, whose addresses stay fixed while the recording lives."""

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
        self._options.add_run_config_entry(_GRAPH_ID, str(number))
        self._inputs: dict[str, Any] = {
            name: ort.OrtValue.ortvalue_from_numpy(array, "cuda", device_id) for name, array in feeds.items()
        }
        # One run without recording gives the shapes of the outputs.
        shaped = session.run(list(fetches), dict(feeds), not_recorded(ort.RunOptions()))
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
