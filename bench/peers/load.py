"""The load of every peer, a serving system under test: callers in a closed loop, the same for each protocol.

A failed call and a wrong answer are counted in `Measured`, with the first error, and not raised. Over HTTP, no `items`
raise IndexError.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError

from bench.peers.wires import Call, HttpCaller, Wire, grpc_call

Array = npt.NDArray[Any]
TIMEOUT_S = 120.0
CHECKED = 8
"""One of this many answers is compared with the reference."""
TOLERANCE = 1e-3
"""Float32 sums in another order, in another batch, differ by some 1e-6 of values around 1."""
LEAST_COSINE = 0.9
"""Of answers in int8 or bf16 with those in float32. int8 has 0.992, another sequence of this length 0.17 at most."""
Same = Callable[[Array, Array], bool]


@dataclass(frozen=True, slots=True)
class Measured:
    """One load: answers, answers a second, latencies, refusals, wrong answers, and the client's processor time."""

    answered: int
    rate: float
    p50_s: float
    p99_s: float
    errors: int
    wrong: int
    first_error: str
    client_cores: float


def equal(hidden: Array, reference: Array) -> bool:
    """Return True if float32 hidden states (T, 384) are those of the reference."""
    return hidden.shape == reference.shape and bool(np.abs(hidden - reference).max() <= TOLERANCE)


def alike(hidden: Array, reference: Array) -> bool:
    """Return True if hidden states (T, 384) of another precision are those of the reference."""
    if hidden.shape != reference.shape:
        return False
    return cosine(hidden, reference) >= LEAST_COSINE


def cosine(one: Array, other: Array) -> float:
    """Return the cosine of two arrays of one shape, over all their numbers."""
    return float(np.vdot(one, other) / (np.linalg.norm(one) * np.linalg.norm(other)))


async def drive(
    port: int,
    wire: Wire,
    items: Sequence[Array],
    references: Sequence[Array],
    callers: int,
    limit_s: float,
    same: Same = equal,
) -> Measured:
    """Send each of the items once, until `limit_s` seconds have passed.

    `references`: the hidden states of the first few items, with which `same` compares answers.
    """
    requests = [wire.request(ids) for ids in items]
    latencies: list[float] = []
    faults: list[str] = []
    wrong = 0
    waiting = iter(range(len(items)))
    until = time.perf_counter() + limit_s
    async with AsyncExitStack() as stack:
        calls: list[Call] = []
        if wire.http:
            for _ in range(callers):
                kind = "application/json" if requests[0].startswith(b"{") else "application/octet-stream"
                caller = HttpCaller(port, wire.path, kind)
                stack.push_async_callback(caller.aclose)
                calls.append(caller)
        else:
            options = [("grpc.max_receive_message_length", 64 << 20)]
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options))
            calls = [grpc_call(channel, wire, TIMEOUT_S)] * callers

        async def caller_loop(call: Call) -> None:
            nonlocal wrong
            for index in waiting:
                if time.perf_counter() > until:
                    return
                begun = time.perf_counter()
                try:
                    answer = await asyncio.wait_for(call(requests[index]), TIMEOUT_S)
                except (OSError, EOFError, grpc.RpcError, TimeoutError, ValueError) as error:
                    faults.append(f"{type(error).__name__}: {error}")
                    if isinstance(call, HttpCaller):
                        await call.aclose()
                    continue
                latencies.append(time.perf_counter() - begun)
                if index < len(references) and index % CHECKED == 0:
                    try:
                        wrong += not same(wire.hidden(answer), references[index])
                    except (ValueError, LookupError, DecodeError) as error:
                        wrong += 1
                        faults.append(f"an answer of another layout: {type(error).__name__}: {error}")

        cpu, started = time.process_time(), time.perf_counter()
        await asyncio.gather(*map(caller_loop, calls))
        wall, cpu = time.perf_counter() - started, time.process_time() - cpu
    seen = np.array(latencies or [0.0])
    return Measured(
        answered=len(latencies),
        rate=len(latencies) / wall,
        p50_s=float(np.quantile(seen, 0.5)),
        p99_s=float(np.quantile(seen, 0.99)),
        errors=len(faults),
        wrong=wrong,
        first_error=" ".join(faults[0].split())[:200] if faults else "",
        client_cores=cpu / wall,
    )
