"""Several connections of a client to one address, against real servers: their number, their load and their loss.

`server` runs in the test's process, so its connections are those of this process to its port. A relay between client
and server cuts single connections. A server of several processes shares its port: the kernel assigns each connection to
one front process. Each test runs with both clients.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from attnserve_client import AsyncClient, RetryPolicy, ServerUnreachable
from attnserve_client.bench.lengths import Lengths
from attnserve_client.bench.load import Sample
from attnserve_client.bench.run import Plan, measure
from attnserve_client.bench.workload import RequestOptions, of_lengths
from attnserve_server.app import Application
from callers import Caller
from gated import Gate, until
from relay import Relay
from serving import serve


def seen_by(process: psutil.Process, port: int) -> int:
    """The number of open connections to `port` on the side of the server."""
    found = process.net_connections("tcp")
    return sum(one.laddr.port == port and one.status == psutil.CONN_ESTABLISHED for one in found)


@pytest.mark.parametrize("connections", [1, 4])
async def test_server_has_as_many_connections_as_the_client_is_given(
    server: Application, caller: Callable[..., Caller], connections: int
) -> None:
    here, port = psutil.Process(), server.grpc_port
    one = caller(f"127.0.0.1:{port}", connections=connections)
    for _ in range(2 * connections + 3):
        await one.infer()
    await one.together(20)
    assert seen_by(here, port) == connections
    await one.close()
    # grpc.aio 1.83 closes a channel's connection when the garbage collector frees its last call; 1.76 and 1.85 at once.
    await until(lambda: gc.collect() >= 0 and seen_by(here, port) == 0)


async def test_each_address_has_that_many_connections(server: Application, caller: Callable[..., Caller]) -> None:
    async with Relay(server.grpc_port) as first, Relay(server.grpc_port) as second:
        one = caller([first.target, second.target], connections=3)
        await one.together(24)
        await until(lambda: (len(first.open), len(second.open)) == (3, 3))
        await one.close()
        await until(lambda: gc.collect() >= 0 and not first.open and not second.open)


async def test_streams_take_a_connection_each(server: Application, caller: Callable[..., Caller], gate: Gate) -> None:
    async with Relay(server.grpc_port) as relay:
        one = caller(relay.target, connections=3)
        streams = [asyncio.create_task(one.stream(["the cat", "a mat"])) for _ in range(3)]
        await until(lambda: len(gate.waiting) == 6)
        assert len(relay.open) == 3
        gate.open()
        answers = await asyncio.gather(*streams)
        assert [[answer.error for answer in each] for each in answers] == [[None, None]] * 3
        await one.close()


async def test_calls_on_a_connection_that_is_cut_are_made_again_on_the_others(
    server: Application, caller: Callable[..., Caller], gate: Gate
) -> None:
    async with Relay(server.grpc_port) as relay:
        one = caller(relay.target, connections=4)
        calls = asyncio.create_task(one.together(16))
        await until(lambda: len(gate.waiting) == 16)
        relay.cut()
        await until(lambda: gate.withdrawn == 4)
        gate.waiting[:] = [request for request in gate.waiting if not request.ended]
        await until(lambda: len(gate.waiting) == 16)
        gate.open()
        assert len(await calls) == 16
        await until(lambda: len(relay.open) == 4)  # the client connects again by itself
        await one.together(16)
        assert len(relay.open) == 4
        await one.close()


async def test_control_without_retries_the_calls_of_a_cut_connection_fail(
    server: Application, caller: Callable[..., Caller], gate: Gate
) -> None:
    async with Relay(server.grpc_port) as relay:
        one = caller(relay.target, connections=4, retry=RetryPolicy(max_attempts=1))
        calls = [asyncio.create_task(one.infer()) for _ in range(16)]
        await until(lambda: len(gate.waiting) == 16)
        relay.cut()
        await until(lambda: gate.withdrawn == 4)
        gate.waiting[:] = [request for request in gate.waiting if not request.ended]
        gate.open()
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert sum(isinstance(outcome, ServerUnreachable) for outcome in outcomes) == 4
        await one.close()


async def test_calls_reach_the_address_that_lives(server: Application, caller: Callable[..., Caller]) -> None:
    async with Relay(server.grpc_port) as gone:
        dead = gone.target
    one = caller([dead, f"127.0.0.1:{server.grpc_port}"], connections=2)
    assert await one.call("ready")
    assert len(await one.together(8)) == 8
    for _ in range(8):
        await one.infer()
    await one.close()


async def test_enough_connections_reach_all_fronts_of_a_server_of_several_processes(
    tiny_repository: Path, tmp_path: Path, caller: Callable[..., Caller]
) -> None:
    """One connection is the control. The chance that 16 connections all reach one of two fronts is 1 in 32,768."""
    with serve(tiny_repository, tmp_path, "--isolation", "process", "--fronts", "2") as running:
        children = psutil.Process(running.process.pid).children(recursive=True)
        for connections, fronts in ((1, 1), (16, 2)):
            one = caller(running.target, connections=connections)
            await one.together(64)
            # A connection opens with its first call, so each front with connections has answered calls.
            reached = [count for child in children if (count := seen_by(child, running.grpc_port))]
            assert (sum(reached), len(reached)) == (connections, fronts)
            await one.close()
            await until(lambda: gc.collect() >= 0 and not any(seen_by(child, running.grpc_port) for child in children))


async def test_load_test_opens_its_connections_to_each_address(server: Application) -> None:
    async with Relay(server.grpc_port) as first, Relay(server.grpc_port) as second:
        async with AsyncClient(f"127.0.0.1:{server.grpc_port}") as client:
            info = await client.model("tiny")
        workload = of_lengths(info, Lengths.parse("4"), RequestOptions(), seed=0, kinds=1)
        plan = Plan(callers=8, requests=40, warm_up_s=0.0, connections=3)
        most = [0, 0]

        def note(phase: str, sample: Sample) -> None:
            most[:] = max(most[0], len(first.open)), max(most[1], len(second.open))

        report = await measure(f"{first.target},{second.target}", workload, plan, note)
        assert (report.answered, report.errors) == (40, {})
        assert most == [3, 3]
