"""Rows 7, 14 and 23 to 25: more bytes, calls, connections and unread answers than the server has room for."""

from __future__ import annotations

import asyncio
import gzip
import socket
import struct
import time
from collections import Counter
from contextlib import ExitStack
from typing import Any, Final

import grpc
from attnserve.v1 import attention_pb2
from attnserve.v1 import inference_service_pb2 as pb
from attnserve_client import AsyncClient, RetryPolicy
from attnserve_client.bench.load import poisson
from google.rpc import error_details_pb2, status_pb2
from relay import Relay

from faults import bundles, sdk
from faults.check import percentile
from faults.health import checked
from faults.history import End, Recorder
from faults.lab import WITHIN_DEADLINE, Lab, Row, Setup, Share, Skip
from faults.rows.inputs import of_text
from faults.wire import SERVICE, Wire

KEEPALIVE_S: Final = 2.0
UNREAD_S: Final = 3.0
MOST_UNREAD: Final = 8 * 2**20
MOST_CONNECTIONS: Final = 60
BOUNDED: Final = Setup(
    flags=(
        "--max-connections", str(MOST_CONNECTIONS), "--keepalive-s", str(KEEPALIVE_S),
        "--unread-timeout-s", str(UNREAD_S), "--max-unread-bytes", str(MOST_UNREAD),
    ),
    needs=("max_connections", "max_unread_bytes", "accept_compression"),
)  # fmt: skip
LOADED: Final = Setup(
    models=(bundles.CANARY, bundles.SLOW),
    flags=("--instances", "1", "--wide-threads", "1", "--max-batch-size", "2", "--max-queue-size", "32"),
    needs=("max_connections",),
)
"""Of a model that computes some twenty answers a second on one core. Refusals and this client take another core, for
which a faster model's run would have to wait: what a refusal costs is measured elsewhere."""
LEAST_PEAK: Final = 8.0
"""Below this many answers a second, multiples of the load are a handful of calls, and deadlines of 5 s a few runs."""
GOODPUT: Final = {2.0: 0.95, 5.0: 0.9, 10.0: 0.8}
"""Least share of the peak, which is measured before and after, by multiple of the load."""
REFUSAL_S, HEALTH_S, RECOVERY_S = 0.025, 0.1, 1.0
MOST_MB: Final = 3.0
SETTLED_S: Final = 20.0
"""Seconds in which memory must return after messages of gigabytes in all."""
MOST_POOLS_MB: Final = 64.0
"""Growth of memory when many answers are not read for the first time: Python's and the runtime's pools keep their
greatest size."""
GIVEN_BACK_S: Final = 2.5
"""Seconds in which a server at rest gives memory back (`engine/resting.py`)."""
DEAD_PEER_S: Final = 15.0
FREED_S: Final = 20.0
"""Seconds in which the server frees a dead peer: its keepalive, of two seconds here, and gRPC's wait for the answer."""
NEIGHBOURS: Final = Share(0.999, None)
"""Answers that are not read are computed and encoded on the canary's cores."""


def grpc_message(data: bytes, *, compressed: bool) -> bytes:
    """Return a message with gRPC's prefix of five bytes."""
    return struct.pack(">BI", compressed, len(data)) + data


async def too_big(lab: Lab) -> None:
    """Row 7."""
    refused = ("RESOURCE_EXHAUSTED", "UNIMPLEMENTED", "INVALID_ARGUMENT")
    big, long = bytes(32 * 2**20), (("x-long", "a" * 20_000),)
    expanding = of_text(bundles.TINY, "a" * 63 * 2**20)
    lab.measured["compressed_bytes"] = len(gzip.compress(expanding))
    gzipped = [("grpc.default_compression_algorithm", int(grpc.Compression.Gzip))]
    async with (
        lab.caller("big", *refused) as wire,
        lab.caller("compressed", *refused, options=gzipped) as compressed,
    ):

        async def send(messages: int, metadata: int, bursts: int) -> None:
            for _ in range(messages):
                await wire.send(big)
            for _ in range(metadata):  # beyond 16 KiB, which is the limit of gRPC
                await wire.send(of_text(bundles.TINY, "the cat"), metadata=long)
            for _ in range(bursts):
                await asyncio.gather(*(compressed.send(expanding, timeout_s=30.0) for _ in range(4)))

        await send(4, 20, 2)  # connections, and pools of the first calls
        await asyncio.sleep(GIVEN_BACK_S)
        lab.before = await lab.blocking(lab.bench.usage)
        before = lab.before.memory_mb
        counts = lab.count(4, 40), lab.count(20, 200), lab.count(1, 10)
        await send(*counts)
        names = ("messages of 32 MiB", "metadata of 20 kB", "bursts of 4 messages that expand to 63 MiB")
        lab.injected.update(dict(zip(names, counts, strict=True)))
    settled = await lab.until(lambda: lab.server.usage().memory_mb - before <= MOST_MB, SETTLED_S)
    grown = lab.server.usage().memory_mb - before
    lab.measured["grown_mb"] = round(grown, 2)
    lab.must(settled, f"memory grew by {grown:.1f} MB, above {MOST_MB:g} MB")
    async with lab.caller("usual") as wire:
        lab.control((await wire.infer(bundles.TINY, "the cat")).code == "OK", "a message of the usual size is refused")


async def overload(lab: Lab) -> None:
    """Row 14."""
    codes: tuple[str, ...] = ("OK", "RESOURCE_EXHAUSTED:OVERLOADED")
    if not lab.bench.plan.full:  # a machine that others share may be slower than it was when a call was admitted
        codes += ("DEADLINE_EXCEEDED:DEADLINE_EXPIRED",)
    seconds = lab.count(4, 20)
    options = [("grpc.max_concurrent_streams", 10_000)]
    lab.allowed["load"] = frozenset(codes)
    wires = [lab.caller(f"load {at}", *codes, options=options) for at in range(4)]
    try:
        peaks = [await _peak(wires, seconds)]
        if peaks[0] < LEAST_PEAK and not lab.bench.plan.full:
            raise Skip(f"the machine is busy: the server answers {peaks[0]:.1f} requests a second, for {LEAST_PEAK:g}")
        for factor, least in GOODPUT.items():
            ends, health = await _offered(lab, wires, peaks[0] * factor, seconds)
            answered = sum(end.code == "OK" for end, _ in ends) / seconds
            refused = [took for end, took in ends if end.code == "RESOURCE_EXHAUSTED"]
            lab.injected[f"calls at {factor:g} x"] = len(ends)
            begun = time.monotonic()
            end = await wires[0].infer(bundles.SLOW, "the cat", timeout_s=5.0)
            while end.code != "OK" and time.monotonic() - begun < 5:
                end = await wires[0].infer(bundles.SLOW, "the cat", timeout_s=5.0)
            recovered = time.monotonic() - begun
            if lab.bench.plan.full:  # the machine may be faster or slower than it was
                peaks.append(await _peak(wires, seconds))
            good = answered / (sum(peaks[-2:]) / len(peaks[-2:]))
            lab.measured[f"{factor:g}x"] = {
                "goodput": round(good, 3),
                "refused": len(refused),
                "refusal_p99_ms_of_client": round(percentile(refused, 0.99) * 1e3, 1),
                "health_p99_ms": round(percentile(health, 0.99) * 1e3, 1),
                "recovered_s": round(recovered, 2),
            }
            expired = sum(end.code == "DEADLINE_EXCEEDED" for end, _ in ends)
            lab.quick(not expired, f"at {factor:g} x: {expired} calls were admitted, and expired")
            lab.must(expired <= 0.05 * len(ends), f"at {factor:g} x: {expired} of {len(ends)} calls expired")
            lab.quick(good >= least, f"at {factor:g} x: goodput is {good:.2f} of the peak, below {least}")
            lab.quick(percentile(health, 0.99) <= HEALTH_S, f"at {factor:g} x: health answered late")
            lab.quick(recovered <= RECOVERY_S, f"at {factor:g} x: recovered after {recovered:.2f} s")
            lab.control(len(refused) > 0, f"at {factor:g} x: nothing was refused")
        await _refusals_have_delays(lab, wires)
        lab.measured["peak_per_s"] = [round(one, 1) for one in peaks]
    finally:
        await asyncio.gather(*(wire.channel.close() for wire in wires))
    _judge_refusals(lab)


async def _peak(wires: list[Wire], seconds: float) -> float:
    """Return the answers a second of callers in loops."""
    until, answered = time.monotonic() + seconds, 0

    async def caller(number: int) -> None:
        nonlocal answered
        while time.monotonic() < until:
            end = await wires[number % len(wires)].infer(bundles.SLOW, "the cat sat", timeout_s=5.0)
            answered += end.code == "OK"

    begun = time.monotonic()
    await asyncio.gather(*(caller(number) for number in range(16)))
    return answered / (time.monotonic() - begun)


async def _offered(
    lab: Lab, wires: list[Wire], rate: float, seconds: float
) -> tuple[list[tuple[End, float]], list[float]]:
    """Send a Poisson process of calls. Return how each ended with its seconds, and the seconds of health checks."""
    ends: list[tuple[End, float]] = []
    begun = due = time.monotonic()
    gaps = poisson(rate, lab.random)

    async def one(number: int) -> None:
        sent = time.monotonic()
        end = await wires[number % len(wires)].infer(bundles.SLOW, "the cat sat", timeout_s=5.0)
        ends.append((end, time.monotonic() - sent))

    async with asyncio.TaskGroup() as group:
        health = group.create_task(checked(lab.server.running.http_port, seconds))
        number = 0
        while (due := due + next(gaps)) < begun + seconds:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            group.create_task(one(number))
            number += 1
    return ends, health.result()


async def _refusals_have_delays(lab: Lab, wires: list[Wire]) -> None:
    """Fill the queue, and read the RetryInfo of a refusal."""
    ends = await asyncio.gather(*(wires[0].infer(bundles.SLOW, "the cat", timeout_s=5.0) for _ in range(200)))
    refused = [end for end in ends if end.code == "RESOURCE_EXHAUSTED"]
    kinds = [detail.type_url for detail in status_pb2.Status.FromString(wires[0].details).details]
    lab.control(bool(refused), "a burst of 200 calls was not refused in part")
    lab.must(any(one.endswith(error_details_pb2.RetryInfo.DESCRIPTOR.full_name) for one in kinds), f"details: {kinds}")


REFUSAL_METRIC: Final = "attnserve_refusal_seconds"


def _judge_refusals(lab: Lab) -> None:
    """Judge the time of refusals on the server's own clock, where the server measures it."""
    samples = [one for one in lab.server.samples() if one[0].startswith(REFUSAL_METRIC)]
    if not samples:
        lab.lacks(f"no metric {REFUSAL_METRIC}: the server does not measure its refusals")
        return
    count = sum(value for name, _, value in samples if name == f"{REFUSAL_METRIC}_count")
    soon = sum(
        value for name, labels, value in samples
        if name == f"{REFUSAL_METRIC}_bucket" and float(labels["le"]) == REFUSAL_S
    )  # fmt: skip
    lab.measured["refusals_within_25_ms"] = round(soon / max(1.0, count), 4)
    lab.quick(soon >= 0.99 * count, f"{soon:g} of {count:g} refusals took at most 25 ms of the server")


async def dropped(lab: Lab) -> None:
    """Row 23."""
    before = lab.server.process.num_fds()
    codes = frozenset({"OK", "UNAVAILABLE", "DEADLINE_EXCEEDED"})
    lab.allowed |= {"cut": codes, "lost": codes}
    async with Relay(lab.server.running.grpc_port) as relay:
        # These clients do not notice, and so close nothing: the server has to.
        wires = [lab.caller(f"silent {number}") for number in range(4)]
        for wire in wires:
            wire.channel = grpc.aio.insecure_channel(relay.target, [("grpc.use_local_subchannel_pool", 1)])
            await wire.infer(bundles.TINY, "the cat")
        lab.control(lab.server.process.num_fds() >= before + 4, "the connections are not those of the server")
        relay.freeze()
        begun = time.monotonic()
        lab.injected["connections that pass nothing"] += len(wires)
        freed = await lab.until(lambda: lab.server.process.num_fds() <= before, FREED_S)
        lab.measured["server_freed_s"] = round(time.monotonic() - begun, 1)
        lab.must(freed, f"the server still holds the connections of dead peers after {FREED_S:g} s")
        await asyncio.gather(*(wire.channel.close() for wire in wires))
    async with Relay(lab.server.running.grpc_port) as relay:
        policy, recorder = RetryPolicy(max_attempts=1), Recorder("lost", lab.sink)
        async with AsyncClient(relay.target, connections=4, retry=policy) as client:
            await asyncio.gather(*(sdk.infer(client, recorder, bundles.TINY, text, 20.0) for text in lab.texts(16)))
            relay.freeze()
            begun = time.monotonic()
            ends = await asyncio.gather(
                *(sdk.infer(client, recorder, bundles.TINY, text, 18.0) for text in lab.texts(8))
            )
            noticed = max(end.at_s for end in ends) - begun
            lab.measured["client_noticed_s"] = round(noticed, 1)
            lab.control(not any(end.code == "OK" for end in ends), "a call over a dead network was answered")
            lab.quick(noticed <= DEAD_PEER_S, f"the client noticed the dead peer after {noticed:.1f} s")
    async with Relay(lab.server.running.grpc_port) as relay, lab.caller("cut", *codes) as wire:
        wire.channel = grpc.aio.insecure_channel(relay.target, [("grpc.use_local_subchannel_pool", 1)])
        for _ in range(lab.count(5, 100)):
            sent = [asyncio.create_task(wire.infer(bundles.TINY, text)) for text in lab.texts(8)]
            await asyncio.sleep(0.002)
            if relay.open:
                relay.cut()
                lab.injected["connections reset"] += 1
            await asyncio.gather(*sent)
    freed = await lab.until(lambda: lab.server.process.num_fds() <= before + 1, 5.0)
    lab.must(freed, "connections that were reset stay open")


async def unread(lab: Lab) -> None:
    """Row 24."""
    streams = lab.count(16, 40)  # 32 MiB and more, of which the server holds 8
    await _unread(lab, streams)  # until pools of memory have their size
    settled = await lab.until(lambda: lab.server.usage().descriptors <= lab.before.descriptors + 2, 5.0)
    lab.must(settled, "connections of streams that ended stay open")
    await asyncio.sleep(GIVEN_BACK_S)
    first = lab.before
    lab.before = await lab.blocking(lab.bench.usage)
    lab.measured["pools_mb"] = round(lab.before.memory_mb - first.memory_mb, 1)
    lab.must(lab.measured["pools_mb"] <= MOST_POOLS_MB, f"a first time, memory grew by {lab.measured['pools_mb']} MB")
    await _unread(lab, streams)


async def _unread(lab: Lab, streams: int) -> None:
    """Open streams whose answers are not read, until the server has ended them."""
    each, before = 8, lab.server.usage().memory_mb
    small = [
        ("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65_535), ("grpc.use_local_subchannel_pool", 1),
        ("grpc.max_receive_message_length", 64 << 20),
    ]  # fmt: skip
    request = pb.InferRequest(model=bundles.TINY, attention=attention_pb2.AttentionSelection())
    for _ in range(16):  # 16 KiB of maps each
        request.sequences.add().text.text = "cat " * 30
    channels = [grpc.aio.insecure_channel(lab.server.target, small) for _ in range(streams)]
    ended: Counter[str] = Counter()

    async def slow(channel: grpc.aio.Channel) -> None:
        call: Any = channel.stream_stream(f"{SERVICE}/StreamInfer")(timeout=60)
        lab.attempts += 1
        try:
            for number in range(each):
                request.request_id = str(number)
                await call.write(pb.StreamInferRequest(request=request).SerializeToString())
            lab.injected["answers of 256 KiB that are not read"] += each
            code = await call.code()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            code = error.code() if isinstance(error, grpc.aio.AioRpcError) else await call.code()
        ended[code.name] += 1

    begun = time.monotonic()
    tasks = [asyncio.create_task(slow(channel)) for channel in channels]
    await asyncio.sleep(UNREAD_S - 1)
    most = lab.server.usage().memory_mb - before
    _, late = await asyncio.wait(tasks, timeout=3 * UNREAD_S + 10)
    took = time.monotonic() - begun
    for task in late:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.gather(*(channel.close() for channel in channels))
    lab.measured |= {"most_mb": round(most, 1), "all_ended_s": round(took, 1), "ended": dict(ended)}
    # The answers, what gRPC holds of them, and the requests.
    lab.must(most <= 4 * MOST_UNREAD / 2**20 + 64, f"unread answers took {most:.0f} MB")
    lab.must(not late, f"{len(late)} of {streams} streams that are not read stay open after {took:.0f} s")
    lab.control(sum(ended.values()) > 0 and "OK" not in ended, f"streams ended with {dict(ended)}")


async def idle(lab: Lab) -> None:
    """Row 25."""
    wanted, address = lab.count(200, 2_000), ("127.0.0.1", lab.server.running.grpc_port)

    def established() -> int:
        port = lab.server.running.grpc_port
        return sum(
            one.laddr.port == port and one.status == "ESTABLISHED"
            for process in lab.server.processes().values()
            for one in process.net_connections("tcp")
        )

    with ExitStack() as stack:
        opened = 0
        for _ in range(wanted):
            try:
                stack.enter_context(socket.create_connection(address, timeout=2))
            except OSError:
                break
            opened += 1
        lab.injected["idle connections"] = opened
        # Younger ones are closed within a second.
        bounded = await lab.until(lambda: established() <= MOST_CONNECTIONS + 4, 5.0)
        lab.measured["held_connections"] = await lab.blocking(established)
        lab.must(bounded, f"the server holds {lab.measured['held_connections']} connections, above {MOST_CONNECTIONS}")
        lab.control(opened > 2 * MOST_CONNECTIONS, f"{opened} connections were tried")
        async with lab.caller("late", "UNAVAILABLE", "DEADLINE_EXCEEDED", "OK") as wire:
            await wire.infer(bundles.TINY, "the cat", timeout_s=2.0)
        slow = stack.enter_context(socket.create_connection(("127.0.0.1", lab.server.running.http_port)))
        slow.sendall(b"GET /metr")
        closed = await lab.blocking(_closed, slow, 20.0)
        lab.must(closed, "an HTTP client that sends no whole header stays connected for 20 s")
        lab.injected["HTTP clients that stop in the header"] += 1


def _closed(connection: socket.socket, seconds: float) -> bool:
    """Return whether the peer closes a connection in this time."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        connection.settimeout(left)
        try:
            if not connection.recv(4096):
                return True
        except TimeoutError:
            return False
        except OSError:
            return True
    return False


ROWS: Final = (
    Row(7, "messages, compressed messages and metadata beyond their limits", BOUNDED, too_big, memory_mb=3.0),
    Row(14, "2, 5 and 10 times the load that the server can carry", LOADED, overload, WITHIN_DEADLINE),
    Row(23, "the network drops connections, or passes nothing on", BOUNDED, dropped, reconciles=False),
    Row(24, "callers that do not read their answers", BOUNDED, unread, NEIGHBOURS),
    Row(25, "idle connections, and HTTP clients that stop", BOUNDED, idle),
)
