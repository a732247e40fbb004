"""IO binding: a run whose inputs go to the GPU from where they lie, and whose outputs come back in pinned memory.

Without it the runtime copies each output into ordinary memory, through a staging buffer of the driver's, and the GPU
waits for that. Pinned memory is written by the GPU's own copy engine. On an H200, for MiniLM's hidden states at 128 x
64 tokens, a run then takes 0.88 (float32) and 0.74 (float16) of the time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import onnxruntime as ort
from onnxruntime.capi import _pybind_state

from attnserve_server.domain.values import Array

_HOST_ACCESSIBLE: Final = 5
"""OrtDevice::MemType::HOST_ACCESSIBLE, which Python has no name for (onnxruntime, include/.../ortdevice.h)."""
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


class PinnedOutputs:
    """Runs a session with its outputs in pinned memory. Any thread, several at a time."""

    def __init__(self, session: ort.InferenceSession, device_id: int) -> None:
        self._session = session
        self._device = _pybind_state.OrtDevice(_pybind_state.OrtDevice.cuda(), _HOST_ACCESSIBLE, _NVIDIA, device_id)

    def run(self, feeds: Mapping[str, Array], fetches: Sequence[str], options: ort.RunOptions) -> list[Array]:
        """The outputs in the order of `fetches`, each in pinned memory that it alone uses and gives back by itself."""
        binding = self._session.io_binding()
        for name, array in feeds.items():
            binding.bind_cpu_input(name, array)
        for name in fetches:
            # By the inner object: the outer one has no way to name a kind of memory.
            binding._iobinding.bind_output(name, self._device)  # noqa: SLF001 - as the line above says
        self._session.run_with_iobinding(binding, options)
        binding.synchronize_outputs()
        return [_array_on(value) for value in binding.get_outputs()]


class _Pinned:
    """What NumPy asks for the place of an array, and keeps as long as the array lives."""

    def __init__(self, value: Any, dtype: np.dtype[Any]) -> None:
        self.value = value
        self.__array_interface__ = {
            "data": (value.data_ptr(), False),
            "shape": tuple(value.shape()),
            "typestr": dtype.str,
            "version": 3,
        }


def _array_on(value: Any) -> Array:
    """An array in the memory of a value of the runtime's."""
    dtype: np.dtype[Any] = np.dtype(_DTYPES[value.data_type()])
    if 0 in value.shape():
        return np.empty(value.shape(), dtype)
    return np.asarray(_Pinned(value, dtype))
