"""Two replicas, one of which is killed, stopped or drained with calls in progress: the client loses no call.

The replicas are real server processes. Both are stopped before the calls begin, so that all of them are in progress,
half on each replica, when one is killed. Tests run with both clients, and have controls in which calls are lost or
late.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from attnserve_client import AsyncClient, AttnserveError, DeadlineExpired, RetryPolicy, ServerUnreachable
from attnserve_server.app import Application
from attnserve_server.domain.errors import NotServing
from callers import Caller
from gated import Gate, until
from serving import RunningServer, serve

CALLS = 64
# Without these pings gRPC does not notice a stopped server within the time of a test.
NO_PINGS = {"grpc.keepalive_time_ms": 2**31 - 1, "grpc.http2.ping_timeout_ms": 60_000}


@pytest.fixture(scope="module")
def lasting(tiny_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[RunningServer]]:
    """Two replicas, for tests that leave them running."""
    folders = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("other")
    with serve(tiny_repository, folders[0]) as one, serve(tiny_repository, folders[1]) as other:
        yield [one, other]


async def with_calls_on_both(
    caller: Caller, replicas: list[RunningServer], then: Callable[[], None], **options: Any
) -> list[Any]:
    """The outcomes of 64 calls that are in progress, half on each replica, when `then` acts on the first replica."""
    await caller.together(8)
    for replica in replicas:
        replica.process.send_signal(signal.SIGSTOP)
    try:
        calls = asyncio.create_task(caller.together(CALLS, return_exceptions=True, **options))
        await until(lambda: sum(caller.running()) == CALLS)
        assert caller.running() == [CALLS / 2, CALLS / 2]
        then()
        replicas[1].process.send_signal(signal.SIGCONT)
        return await calls
    finally:
        for replica in replicas:
            replica.process.send_signal(signal.SIGCONT)


def failures(outcomes: list[Any]) -> list[BaseException]:
    return [outcome for outcome in outcomes if isinstance(outcome, BaseException)]


async def when_one_is_killed(make: Callable[..., Caller], repository: Path, folder: Path, **options: Any) -> list[Any]:
    """The outcomes of 64 calls in progress at two replicas, one of which is killed, and of 64 later ones."""
    (folder / "one").mkdir()
    (folder / "other").mkdir()
    with (
        serve(repository, folder / "one", exit_code=-signal.SIGKILL) as one,
        serve(repository, folder / "other") as other,
    ):
        caller = make([one.target, other.target], **options)
        outcomes = await with_calls_on_both(caller, [one, other], one.process.kill, timeout=20.0)
        later = await caller.together(CALLS, return_exceptions=True)
        await caller.close()
    return outcomes + later


async def test_killed_replica_loses_no_call(
    caller: Callable[..., Caller], tiny_repository: Path, tmp_path: Path
) -> None:
    assert failures(await when_one_is_killed(caller, tiny_repository, tmp_path)) == []


async def test_killed_replica_loses_no_call_over_several_connections(
    caller: Callable[..., Caller], tiny_repository: Path, tmp_path: Path
) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "other").mkdir()
    with (
        serve(tiny_repository, tmp_path / "one", exit_code=-signal.SIGKILL) as one,
        serve(tiny_repository, tmp_path / "other") as other,
    ):
        made = caller([one.target, other.target], connections=16)
        await made.together(CALLS)
        calls = [asyncio.create_task(made.infer()) for _ in range(CALLS)]
        await asyncio.sleep(0)
        one.process.kill()
        assert failures(await asyncio.gather(*calls, return_exceptions=True)) == []
        assert failures(await made.together(CALLS, return_exceptions=True)) == []
        await made.close()


async def test_control_calls_are_lost_if_each_lost_call_counts(
    tiny_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("attnserve_client._lanes.is_lost_connection", lambda error: False)
    lost = failures(await when_one_is_killed(partial(Caller, AsyncClient), tiny_repository, tmp_path))
    assert len(lost) >= 20  # 32 fail, and 4 of them take what the budget has above its half
    assert {type(error) for error in lost} == {ServerUnreachable}


async def in_a_loop(caller: Caller, until_s: float) -> list[BaseException]:
    """The failures of one caller that sends a call after each answer, until that time."""
    failed: list[BaseException] = []
    while time.monotonic() < until_s:
        try:
            await caller.infer(timeout=20.0)
        except AttnserveError as error:
            failed.append(error)
    return failed


async def when_one_drains(make: Callable[..., Caller], repository: Path, folder: Path, **options: Any) -> list[Any]:
    """The failures of 64 callers in loops at two replicas, one of which is ended by SIGTERM."""
    (folder / "one").mkdir()
    (folder / "other").mkdir()
    with serve(repository, folder / "one") as one, serve(repository, folder / "other") as other:
        caller = make([one.target, other.target], **options)
        until_s = time.monotonic() + 3.0
        loops = [asyncio.create_task(in_a_loop(caller, until_s)) for _ in range(CALLS)]
        await caller.infer()
        one.process.terminate()
        failed = [failure for each in await asyncio.gather(*loops) for failure in each]
        await caller.close()
    return failed


async def test_drained_replica_loses_no_call(
    caller: Callable[..., Caller], tiny_repository: Path, tmp_path: Path
) -> None:
    assert await when_one_drains(caller, tiny_repository, tmp_path) == []


async def test_control_a_drained_replica_refuses_calls(tiny_repository: Path, tmp_path: Path) -> None:
    policy = RetryPolicy(max_attempts=1)
    assert await when_one_drains(partial(Caller, AsyncClient), tiny_repository, tmp_path, retry=policy)


async def test_replica_that_was_killed_is_used_again_after_its_restart(
    caller: Callable[..., Caller], tiny_repository: Path, tmp_path: Path
) -> None:
    for name in ("one", "other", "again"):
        (tmp_path / name).mkdir()
    with serve(tiny_repository, tmp_path / "other") as other:
        with serve(tiny_repository, tmp_path / "one", exit_code=-signal.SIGKILL) as one:
            made = caller([one.target, other.target])
            await made.together(8)
            one.process.kill()
            one.process.wait()
            assert failures(await made.together(CALLS, return_exceptions=True)) == []
        with serve(tiny_repository, tmp_path / "again", "--grpc-port", str(one.grpc_port)) as again:
            until_s = time.monotonic() + 20.0
            while not again.metric("grpc_server_started_total", grpc_method="Infer"):
                assert await in_a_loop(made, time.monotonic() + 0.1) == []
                assert time.monotonic() < until_s
            assert failures(await made.together(CALLS, return_exceptions=True)) == []
        await made.close()


async def test_stopped_replica_loses_no_call_whose_deadline_is_20_seconds(
    caller: Callable[..., Caller], lasting: list[RunningServer]
) -> None:
    one = caller([replica.target for replica in lasting])
    assert failures(await with_calls_on_both(one, lasting, lambda: None, timeout=20.0)) == []
    await one.close()


async def test_control_calls_of_a_stopped_replica_expire_without_pings(lasting: list[RunningServer]) -> None:
    one = Caller(AsyncClient, [replica.target for replica in lasting], options=NO_PINGS)
    lost = failures(await with_calls_on_both(one, lasting, lambda: None, timeout=16.0))
    assert (len(lost), {type(error) for error in lost}) == (CALLS / 2, {DeadlineExpired})
    await one.close()


async def test_limit_for_each_attempt_moves_the_calls_of_a_stopped_replica(
    caller: Callable[..., Caller], lasting: list[RunningServer]
) -> None:
    policy = RetryPolicy(attempt_timeout_s=1.0)
    one = caller([replica.target for replica in lasting], retry=policy, options=NO_PINGS)
    assert failures(await with_calls_on_both(one, lasting, lambda: None, timeout=20.0)) == []
    await one.close()


async def test_hedge_answers_a_call_that_a_stopped_replica_holds(
    caller: Callable[..., Caller], lasting: list[RunningServer]
) -> None:
    one = caller([replica.target for replica in lasting], retry=RetryPolicy(hedge_after_s=0.2), options=NO_PINGS)
    await one.together(8)
    lasting[0].process.send_signal(signal.SIGSTOP)
    try:
        for _ in range(2):  # one of them begins at the stopped replica
            await one.infer(timeout=20.0)
        await until(lambda: sum(one.running()) == 0)  # the attempt that lost is cancelled
    finally:
        lasting[0].process.send_signal(signal.SIGCONT)
        await one.close()


async def test_retry_storm_makes_at_most_a_tenth_more_attempts(
    caller: Callable[..., Caller], server: Application, gate: Gate
) -> None:
    assert await attempts_per_call(caller, server, gate) <= 1.1


async def test_control_without_the_budget_a_retry_storm_makes_all_attempts(
    caller: Callable[..., Caller], server: Application, gate: Gate
) -> None:
    policy = RetryPolicy(budget_tokens=1e9, initial_backoff_s=0.01)
    assert await attempts_per_call(caller, server, gate, retry=policy) == 4.0


async def attempts_per_call(make: Callable[..., Caller], server: Application, gate: Gate, **options: Any) -> float:
    """Attempts for each of 640 calls of 64 callers, at a server that answers all of them with UNAVAILABLE."""
    target = f"127.0.0.1:{server.grpc_port}"
    one = make([target, target], connections=2, **options)
    gate.full = NotServing("tiny", "draining", retry_delay_s=0.0)
    for _ in range(10):
        assert len(failures(await one.together(CALLS, return_exceptions=True))) == CALLS
    await one.close()
    return gate.refused / (10 * CALLS)
