"""Execution providers: the choice for a model, its options, and the visible GPUs."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from attnserve_server.domain.errors import AttnserveError

CPU: Final = "CPUExecutionProvider"
CUDA: Final = "CUDAExecutionProvider"
TENSORRT: Final = "TensorrtExecutionProvider"
OPENVINO: Final = "OpenVINOExecutionProvider"
AUTO: Final = "auto"
GPU_PROVIDERS: Final = (CUDA, TENSORRT)
ALIASES: Final[Mapping[str, str]] = {"cpu": CPU, "cuda": CUDA, "openvino": OPENVINO, "tensorrt": TENSORRT}
"""Short names of the providers that the server has settings for."""

_OPTIONS: Final[Mapping[str, Mapping[str, str]]] = {
    CUDA: {
        # TF32 keeps ten bits of a float32's mantissa, so weights would differ from the model's by 1e-3.
        "use_tf32": "0",
        # By default the arena grows in powers of two and may take twice the memory that a run needs.
        "arena_extend_strategy": "kSameAsRequested",
    },
    # TensorRT chooses kernels by timing them. With a cache folder in the options, only the first start waits for that.
    TENSORRT: {"trt_timing_cache_enable": "1"},
}


class ProviderUnavailable(AttnserveError):
    """The requested execution provider is not offered by the runtime, or does not load."""

    reason = "PROVIDER_UNAVAILABLE"

    def __init__(self, wanted: str, available: Sequence[str], why: str = "") -> None:
        """`why`: the reason and the remedy; empty: the runtime does not offer the provider."""
        self.wanted, self.available = wanted, tuple(available)
        why = why or f"the runtime offers {', '.join(self.available) or 'none'}"
        super().__init__(f"execution provider {wanted} is not available: {why}")


class PrecisionUnavailable(AttnserveError):
    """The requested precision is not offered: by the provider, by the processor, or for this bundle."""

    reason = "PRECISION_UNAVAILABLE"

    def __init__(self, precision: str, why: str) -> None:
        """`why`: the reason and the remedy."""
        self.precision = precision
        super().__init__(f"precision is {precision}, but {why}")


def named(provider: str) -> str:
    """Return a provider's full name: `openvino` is `OpenVINOExecutionProvider`. Other names stay as they are."""
    return ALIASES.get(provider, provider)


@dataclass(frozen=True, slots=True)
class ProviderChoice:
    """Which provider to run on, and with which options."""

    provider: str = AUTO
    """An execution provider of onnxruntime, or `auto`: CUDA if the runtime offers it and it loads, else CPU."""
    required: str | None = None
    """The provider that must be in use; None: any."""
    device_id: int = 0
    """Index among the visible GPUs."""
    options: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Options by provider; they override the defaults of this module."""
    cuda_graphs: bool = False
    """Whether runs are recorded as CUDA graphs."""

    def first(self, available: Sequence[str]) -> str:
        """Return the provider to try first. One that the runtime does not offer is refused before anything is loaded.

        Raises:
            ProviderUnavailable: the runtime does not offer it, or it is not the required one.
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
        """Whether to use the CPU if the first choice does not load."""
        return self.provider == AUTO and self.required is None

    def chain(self, first: str, available: Sequence[str]) -> list[tuple[str, dict[str, str]]]:
        """Return the providers of a session with their options, in order. A node that one cannot run goes to the next.

        Args:
            first: the provider from `first`, or the CPU.
            available: the providers that the runtime offers.
        """
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
    """Return the number of NVIDIA GPUs that this process may use, by CUDA_VISIBLE_DEVICES; 0 without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value
