"""Execution providers of onnxruntime: the choice, its options and its device.

A provider that is not offered raises ProviderUnavailable. No GPU is needed: `_Driver` replaces NVIDIA's driver.
"""

from __future__ import annotations

import ctypes

import pytest
from attnserve_server.engine import providers
from attnserve_server.engine.providers import CPU, CUDA, TENSORRT, ProviderChoice, ProviderUnavailable, visible_gpus

EVERYTHING = (TENSORRT, CUDA, CPU)


def test_auto_selects_cuda_if_offered_and_may_fall_back() -> None:
    assert ProviderChoice().first(EVERYTHING) == CUDA
    assert ProviderChoice().first((CPU,)) == CPU
    assert ProviderChoice().may_fall_back
    assert not ProviderChoice(provider=CUDA).may_fall_back
    assert not ProviderChoice(required=CUDA).may_fall_back


def test_provider_that_is_not_offered_is_refused() -> None:
    with pytest.raises(ProviderUnavailable, match="offers CPUExecutionProvider"):
        ProviderChoice(provider=CUDA).first((CPU,))


def test_chain_ends_with_the_providers_that_run_the_other_nodes() -> None:
    names = [name for name, _ in ProviderChoice().chain(TENSORRT, EVERYTHING)]
    assert names == [TENSORRT, CUDA, CPU]
    assert ProviderChoice().chain(CPU, EVERYTHING) == [(CPU, {})]


def test_given_options_override_the_defaults_and_the_device_is_set() -> None:
    choice = ProviderChoice(device_id=2, options={CUDA: {"use_tf32": "1", "gpu_mem_limit": "5"}})
    options = dict(choice.chain(CUDA, EVERYTHING))[CUDA]
    assert (options["use_tf32"], options["gpu_mem_limit"], options["device_id"]) == ("1", "5", "2")
    assert dict(ProviderChoice().chain(CUDA, EVERYTHING))[CUDA]["use_tf32"] == "0"


def test_only_cuda_records_graphs() -> None:
    chain = dict(ProviderChoice(cuda_graphs=True).chain(TENSORRT, EVERYTHING))
    assert chain[CUDA]["enable_cuda_graph"] == "1"
    assert "enable_cuda_graph" not in chain[TENSORRT]


class _Driver:
    def __init__(self, status: int, count: int) -> None:
        self.status, self.count = status, count

    def cuInit(self, _: int) -> int:  # noqa: N802 - the driver's own name
        return self.status

    def cuDeviceGetCount(self, place: object) -> int:  # noqa: N802 - the driver's own name
        place._obj.value = self.count  # type: ignore[attr-defined]
        return 0


@pytest.mark.parametrize(("driver", "count"), [(_Driver(0, 4), 4), (_Driver(100, 4), 0), (None, 0)])
def test_visible_gpus_are_those_of_the_driver(
    monkeypatch: pytest.MonkeyPatch, driver: _Driver | None, count: int
) -> None:
    def load(name: str) -> _Driver:
        assert name == "libcuda.so.1"
        if driver is None:
            raise OSError
        return driver

    monkeypatch.setattr(providers.ctypes, "CDLL", load)
    assert providers.ctypes is ctypes
    assert visible_gpus() == count
