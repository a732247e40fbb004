"""Execution providers: which one a model gets, with which options, and on which devices."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from attnserve_server.domain.errors import AttnserveError

CPU: Final = "CPUExecutionProvider"
CUDA: Final = "CUDAExecutionProvider"
TENSORRT: Final = "TensorrtExecutionProvider"
AUTO: Final = "auto"
GPU_PROVIDERS: Final = (CUDA, TENSORRT)

_OPTIONS: Final[Mapping[str, Mapping[str, str]]] = {
    CUDA: {
        # TF32 keeps ten bits of a float32's mantissa: weights would differ from the model's by 1e-3.
        "use_tf32": "0",
        # Growing in powers of two, the arena may take twice what a run needs, from whoever shares the device.
        "arena_extend_strategy": "kSameAsRequested",
    },
    # Kernels are chosen by timing, for each range of shapes: where a folder is named, only the first start waits.
    TENSORRT: {"trt_timing_cache_enable": "1"},
}


class ProviderUnavailable(AttnserveError):
    """The execution provider that was asked for is not there, or does not load."""

    reason = "PROVIDER_UNAVAILABLE"

    def __init__(self, wanted: str, available: Sequence[str]) -> None:
        self.wanted, self.available = wanted, tuple(available)
        super().__init__(
            f"execution provider {wanted} is not available: the runtime offers {', '.join(self.available) or 'none'}"
        )


@dataclass(frozen=True, slots=True)
class ProviderChoice:
    """Which provider to run on, and how."""

    provider: str = AUTO
    """An execution provider of onnxruntime, or `auto`: CUDA where it is offered and loads, else CPU."""
    required: str | None = None
    """Refuse unless this provider is the one in use."""
    device_id: int = 0
    """Which GPU, among those that are visible."""
    options: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Options by provider, over our own."""
    cuda_graphs: bool = False
    """Whether runs are recorded as CUDA graphs."""

    def first(self, available: Sequence[str]) -> str:
        """The provider to try first. One that is not offered is refused before anything is loaded.

        Raises:
            ProviderUnavailable: What is asked for is not offered, or is not what is required.
        """
        wanted = self.required if self.provider == AUTO else self.provider
        if self.required is not None and wanted != self.required:
            raise ProviderUnavailable(self.required, [str(wanted)])
        if wanted is None:
            return CUDA if CUDA in available else CPU
        if wanted not in available:
            raise ProviderUnavailable(wanted, available)
        return wanted

    @property
    def may_fall_back(self) -> bool:
        """Whether CPU will do where the first choice does not load."""
        return self.provider == AUTO and self.required is None

    def chain(self, first: str, available: Sequence[str]) -> list[tuple[str, dict[str, str]]]:
        """The providers of a session, with their options: what the first cannot run goes to the next."""
        names = [first, *((CUDA,) if first == TENSORRT and CUDA in available else ())]
        device = {"device_id": str(self.device_id)}
        graphs = {CUDA: {"enable_cuda_graph": "1"}} if self.cuda_graphs else {}
        chain = [
            (
                name,
                {
                    **_OPTIONS.get(name, {}),
                    **(device if name in GPU_PROVIDERS else {}),
                    **graphs.get(name, {}),
                    **self.options.get(name, {}),
                },
            )
            for name in names
        ]
        return chain if first == CPU else [*chain, (CPU, {})]


def visible_gpus() -> int:
    """How many NVIDIA GPUs this process may use: the driver heeds CUDA_VISIBLE_DEVICES. 0 where there is no driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value
