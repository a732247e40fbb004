"""Which execution provider a model gets, with which options, on which device."""

from __future__ import annotations

import ctypes

import pytest
from attnserve_server.engine import providers
from attnserve_server.engine.providers import CPU, CUDA, TENSORRT, ProviderChoice, ProviderUnavailable, visible_gpus

EVERYTHING = (TENSORRT, CUDA, CPU)


def test_auto_takes_cuda_where_it_is_offered_and_may_fall_back() -> None:
    assert ProviderChoice().first(EVERYTHING) == CUDA
    assert ProviderChoice().first((CPU,)) == CPU
    assert ProviderChoice().may_fall_back
    assert not ProviderChoice(provider=CUDA).may_fall_back
    assert not ProviderChoice(required=CUDA).may_fall_back


def test_what_is_not_offered_is_refused() -> None:
    with pytest.raises(ProviderUnavailable, match="offers CPUExecutionProvider"):
        ProviderChoice(provider=CUDA).first((CPU,))


def test_what_a_provider_cannot_run_goes_to_the_next() -> None:
    names = [name for name, _ in ProviderChoice().chain(TENSORRT, EVERYTHING)]
    assert names == [TENSORRT, CUDA, CPU]
    assert ProviderChoice().chain(CPU, EVERYTHING) == [(CPU, {})]


def test_options_by_hand_stand_over_ours_and_name_the_device() -> None:
    choice = ProviderChoice(device_id=2, options={CUDA: {"use_tf32": "1", "gpu_mem_limit": "5"}})
    options = dict(choice.chain(CUDA, EVERYTHING))[CUDA]
    assert (options["use_tf32"], options["gpu_mem_limit"], options["device_id"]) == ("1", "5", "2")
    assert dict(ProviderChoice().chain(CUDA, EVERYTHING))[CUDA]["use_tf32"] == "0"


def test_graphs_are_recorded_by_cuda_alone() -> None:
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
def test_gpus_are_those_that_the_driver_shows(
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
