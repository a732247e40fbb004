"""After a burst of whole maps, the resident memory returns near its level before; without shrinking it stays."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from attnserve_server.domain.machine import resident_bytes
from attnserve_server.engine import shrinking, warmup
from attnserve_server.engine.collation import collate
from attnserve_server.engine.graph import Graph
from attnserve_server.engine.instance_thread import Occupancy
from attnserve_server.engine.session import RuntimeSession
from attnserve_server.engine.shrinking import GROWTH_BYTES, Shrinker
from tiny_bundle import tiny_graph, tiny_manifest

MIB = 2**20


@pytest.fixture
def graph(tmp_path: Path) -> Graph:
    path = tmp_path / "model.onnx"
    onnx.save(tiny_graph(), path)
    return Graph.of([RuntimeSession.load(path, provider="cpu")], tiny_manifest())


def burst(graph: Graph) -> None:
    """One run of whole maps of 16,384 sequences."""
    selection = warmup.selection_of_all(graph.manifest)
    batch = collate([warmup.synthetic(graph.manifest, 32, attention=selection)] * 16_384, graph.manifest)
    graph.sessions[0].run(batch.feeds, batch.fetches)


def test_memory_returns_after_a_burst_of_whole_maps(graph: Graph) -> None:
    shrinking.shrink([graph])
    before = resident_bytes()
    burst(graph)
    assert resident_bytes() - before > 150 * MIB, "the control: the arena keeps what the burst took"
    shrinking.shrink([graph])
    assert resident_bytes() - before < 24 * MIB


class Process:
    """A process whose memory, clock and runs the test sets."""

    def __init__(self) -> None:
        self.bytes, self.now_s, self.shrunk = 100 * MIB, 0.0, 0
        self.occupancy = Occupancy()
        self.shrinker = Shrinker(self.shrink, self.occupancy, self, lambda: self.bytes)

    def now(self) -> float:
        return self.now_s

    async def shrink(self) -> None:
        self.bytes, self.shrunk = 110 * MIB, self.shrunk + 1

    async def looks(self, count: int) -> None:
        for _ in range(count):
            self.now_s += 1.0
            await self.shrinker.look()


async def test_memory_is_given_back_once_when_nothing_runs() -> None:
    process = Process()
    await process.looks(5)
    process.bytes += GROWTH_BYTES - 1
    await process.looks(5)
    assert process.shrunk == 0, "usual growth"
    process.bytes += 1
    await process.looks(5)
    assert process.shrunk == 1
    process.bytes += GROWTH_BYTES
    await process.looks(1)
    assert process.shrunk == 2


async def test_memory_is_given_back_under_load_after_a_while() -> None:
    process = Process()
    process.occupancy.begin()
    process.bytes += 2 * GROWTH_BYTES
    await process.looks(30)
    assert process.shrunk == 0
    await process.looks(2)
    assert process.shrunk == 1


async def test_memory_of_others_is_not_shrunk_again_and_again() -> None:
    process = Process()
    process.bytes += 3 * GROWTH_BYTES

    async def in_use() -> None:
        process.shrunk += 1

    process.shrinker._shrink_now = in_use
    await process.looks(20)
    assert process.shrunk == 1
