"""Rows 26 to 29 and 35: the machine runs out of something, its clock jumps, and memory over many requests."""

from __future__ import annotations

import asyncio
import os
import resource
import shutil
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import Final

from attnserve.v1 import attention_pb2
from attnserve_server.config import Settings

from faults import bundles
from faults.lab import Lab, Row, Setup, Skip
from faults.rows.inputs import COMMON, of_text
from faults.system import Server
from faults.wire import Wire

ALONE: Final = Setup(starts=False)
RECOVERY_S: Final = 2.0
PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\x04\0\0\0\0\0"
"""The start of an HTTP/2 connection with empty settings. Source: RFC 9113, 3.4 and 6.5."""
SETTINGS, PING, GOAWAY, RST_STREAM = 4, 6, 7, 3
REFUSED_STREAM, ENHANCE_YOUR_CALM = 7, 11
MAX_CONCURRENT_STREAMS: Final = 3
LEAK_MB: Final = 16.0


def frames(connection: socket.socket, seconds: float) -> Iterator[tuple[int, int, bytes]]:
    """Yield the type, the stream and the payload of the frames that come in this time, until the peer closes."""
    until, data = time.monotonic() + seconds, b""
    while (left := until - time.monotonic()) > 0:
        connection.settimeout(left)
        try:
            read = connection.recv(65536)
        except (TimeoutError, ConnectionError):
            return
        if not read:
            return
        data += read
        while len(data) >= 9 and len(data) >= 9 + int.from_bytes(data[:3], "big"):
            size = int.from_bytes(data[:3], "big")
            yield data[3], int.from_bytes(data[5:9], "big") & 0x7FFFFFFF, data[9 : 9 + size]
            data = data[9 + size :]


def headers_frame(stream: int) -> bytes:
    """Return the HEADERS of an Infer call that has no message yet. Source: RFC 9113, 6.2; RFC 7541, 6.2.2."""
    fields = (
        (b":method", b"POST"), (b":scheme", b"http"), (b":path", b"/attnserve.v1.InferenceService/Infer"),
        (b":authority", b"localhost"), (b"te", b"trailers"), (b"content-type", b"application/grpc"),
    )  # fmt: skip
    block = b"".join(b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value for name, value in fields)
    return len(block).to_bytes(3, "big") + b"\x01\x04" + stream.to_bytes(4, "big") + block


async def floods(lab: Lab) -> None:
    """Row 26."""

    def pings() -> tuple[int, list[int]]:
        sent, errors = 0, []
        with socket.create_connection(("127.0.0.1", lab.server.running.grpc_port)) as connection:
            connection.sendall(PREFACE)
            try:
                for _ in range(200):
                    connection.sendall(b"\0\0\x08\x06\0\0\0\0\0" + bytes(8))
                    sent += 1
                    time.sleep(0.002)
            except OSError:
                pass  # the server has closed the connection
            errors += [int.from_bytes(data[4:8], "big") for kind, _, data in frames(connection, 2.0) if kind == GOAWAY]
        return sent, errors

    def streams(most: int) -> tuple[int, int]:
        with socket.create_connection(("127.0.0.1", lab.server.running.grpc_port)) as connection:
            connection.sendall(PREFACE)
            found = next(data for kind, _, data in frames(connection, 5.0) if kind == SETTINGS)
            connection.sendall(b"\0\0\0\x04\x01\0\0\0\0")  # they hold from their acknowledgement on
            stated = dict(struct.iter_unpack(">HI", found)).get(MAX_CONCURRENT_STREAMS, 0)
            for number in range(most + 8):
                connection.sendall(headers_frame(1 + 2 * number))
            refused = sum(
                kind == RST_STREAM and int.from_bytes(data, "big") == REFUSED_STREAM
                for kind, _, data in frames(connection, 1.0)
            )
        return stated, refused

    for _ in range(lab.count(2, 50)):
        sent, errors = await lab.blocking(pings)
        lab.injected["pings"] += sent
        lab.must(ENHANCE_YOUR_CALM in errors, f"after {sent} pings the server sent GOAWAY with {errors}")
    name = "max_streams_per_connection"
    if name not in Settings.model_fields:
        lab.lacks(f"no --{name.replace('_', '-')}")
        return
    most = int(Settings.model_fields[name].default)
    stated, refused = await lab.blocking(streams, most)
    lab.injected["streams"] += most + 8
    lab.measured |= {"streams": stated, "refused": refused}
    lab.must(stated == most, f"the server states {stated} streams, and its setting {most}")
    lab.must(refused >= 8, f"{refused} of 8 surplus streams were refused")


async def descriptors(lab: Lab) -> None:
    """Row 27."""
    found = lab.server.processes()
    target = found.get("front 0", lab.server.process)
    soft, hard = resource.prlimit(target.pid, resource.RLIMIT_NOFILE)
    limit = target.num_fds() + 24
    statuses = ("OK", "UNAVAILABLE", "DEADLINE_EXCEEDED")
    resource.prlimit(target.pid, resource.RLIMIT_NOFILE, (limit, hard))
    try:
        with ExitStack() as stack:
            for _ in range(100):
                stack.enter_context(socket.create_connection(("127.0.0.1", lab.server.running.grpc_port)))
                lab.injected["idle connections"] += 1
            full = await lab.until(lambda: target.num_fds() >= limit - 1, 5.0)
            lab.control(full, f"the server has {target.num_fds()} of {limit} descriptors")
            async with lab.caller("late", *statuses) as late:
                end = await late.infer(bundles.TINY, "the cat", timeout_s=1.0)
                lab.control(end.code != "OK", "a connection beyond the limit was served")
            await asyncio.sleep(1.0)  # the canary goes on, on its own connection
        begun, tries = time.monotonic(), 0
        while True:
            tries += 1
            async with lab.caller(f"after {tries}", *statuses) as after:
                end = await after.infer(bundles.TINY, "the cat", timeout_s=0.5)
            if end.code == "OK" or time.monotonic() - begun > 10:
                break
        lab.measured["recovered_s"] = round(time.monotonic() - begun, 2)
        lab.must(
            end.at_s - begun <= RECOVERY_S, f"a new connection was served after {end.at_s - begun:.2f} s, above 2 s"
        )
    finally:
        resource.prlimit(target.pid, resource.RLIMIT_NOFILE, (soft, hard))


async def stalled_log(lab: Lab) -> None:
    """Row 28."""
    read, write = os.pipe()
    await lab.bench.start("--log-level", "debug", stderr=write)
    os.close(write)
    full = await lab.bench.start("--log-level", "debug")
    lab.bench.servers.remove(full)
    await lab.watch()
    refused = lab.count(1_600, 20_000)
    async with lab.caller("refused", "INVALID_ARGUMENT") as wire:
        for _ in range(refused // 16):
            await asyncio.gather(*(wire.send(of_text(bundles.TINY, "")) for _ in range(16)))
    dropped = lab.server.metric("attnserve_log_lines_dropped_total")
    lab.injected["lines for a log that is not read"] = refused
    lab.measured["dropped_lines"] = dropped
    lab.control(dropped > 0, "no line was dropped: the log had room for all")
    threading.Thread(target=lambda: _drain(read), daemon=True).start()
    # A limit of file size acts as a full disk does: both let a write succeed in part, and then fail.
    limit = full.log_size() + 2_000
    resource.prlimit(full.process.pid, resource.RLIMIT_FSIZE, (limit, limit))
    async with lab.caller("on a full disk", "OK", "INVALID_ARGUMENT", server=full) as wire:
        for _ in range(8):
            await asyncio.gather(*(wire.send(of_text(bundles.TINY, "")) for _ in range(50)))
            lab.injected["lines for a full disk"] += 50
        lab.must((await wire.send(of_text(bundles.TINY, "the cat"))).code == "OK", "no answer while the disk is full")
    lost = await lab.blocking(lambda: full.metric("attnserve_log_lines_dropped_total"))
    lab.measured["dropped_on_full_disk"] = lost
    lab.control(full.log_size() == limit and lost > 0, f"{lost:g} lines dropped at {full.log_size()} bytes of log")
    await lab.blocking(_end, full)


def _drain(descriptor: int) -> None:
    while os.read(descriptor, 65536):
        pass
    os.close(descriptor)


def _end(server: Server) -> None:
    server.process.terminate()
    server.running.process.wait(30)


async def wall_clock(lab: Lab) -> None:
    """Row 29."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise Skip("needs a C compiler for a wall clock that moves")
    library, file = lab.bench.folder / "clock.so", lab.bench.folder / "offset"
    source = Path(__file__).with_name("clock.c")
    line = [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"]
    await lab.blocking(lambda: subprocess.run(line, check=True))
    file.write_bytes(struct.pack("<q", 0))
    environment = {**os.environ, "LD_PRELOAD": str(library), "CLOCK_OFFSET_FILE": str(file)}
    server = await lab.bench.start("--log-level", "debug", env=environment)
    await lab.watch()
    stamps: list[float] = []
    late = ("DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED:OVERLOADED", "OK", "INVALID_ARGUMENT")
    async with lab.caller("during jumps") as wire, lab.caller("short", *late) as short:
        for hours in (0, 1, -1, 1, 0) * lab.count(1, 10):
            calls = [asyncio.create_task(wire.infer(bundles.TINY, text, timeout_s=2.0)) for text in lab.texts(16)]
            await asyncio.sleep(0)
            with file.open("r+b") as written:
                written.write(struct.pack("<q", 3600 * hours))
            lab.injected["jumps of the wall clock"] += 1
            await asyncio.gather(*calls)
            for text in lab.texts(20):
                await wire.infer(bundles.TINY, text, timeout_s=2.0)
            end = await short.infer(bundles.TINY, "the cat", timeout_s=1e-4)
            lab.must(end.code != "OK", "a call with a deadline of 0.1 ms was answered")
            size = server.log_size()
            await short.send(of_text(bundles.TINY, ""))
            await lab.until(lambda one=size: server.log_size() > one)
            stamps += [datetime.fromisoformat(one["timestamp"]).timestamp() for one in server.events(size)]
    lab.measured["log_jumps_s"] = round(max(stamps) - min(stamps))
    lab.control(max(stamps) - min(stamps) > 7000, "the server's log does not show the jumps")


async def growth(lab: Lab) -> None:
    """Row 35."""
    count = lab.count(3_000, 20_000)

    async def load(wire: Wire, requests: int) -> None:
        left = iter(range(requests))

        async def caller() -> None:
            for _ in left:
                text = " ".join(lab.chance.choices(bundles.WORDS, k=lab.chance.randint(1, 30)))
                select = attention_pb2.AttentionSelection()
                if lab.chance.random() < 0.5:
                    select.layers.append(lab.chance.choice((0, -1)))
                if lab.chance.random() < 0.3:
                    select.top_k = lab.chance.randint(1, 5)
                wants = select if lab.chance.random() < 0.6 else None
                await wire.send(of_text(bundles.TINY, text, attention=wants))

        await asyncio.gather(*(caller() for _ in range(16)))

    async def grown(server: Server, name: str, requests: int) -> float:
        async with lab.caller(name, server=server) as wire:
            await load(wire, 1_000)  # until buffers and caches have their size
            before = server.usage().memory_mb
            await load(wire, requests)
            await asyncio.sleep(0.5)
            return server.usage().memory_mb - before

    found = await grown(lab.server, "random", count)
    leaking = await lab.bench.start("--isolation", "none", failpoints=("leak",))
    lab.bench.servers.remove(leaking)
    leaked = await grown(leaking, "control", 500)
    await lab.blocking(_end, leaking)
    lab.injected["requests of random lengths and selections"] = count
    lab.measured |= {"growth_mb": round(found, 2), "leaking_control_mb": round(leaked, 2)}
    lab.must(found <= LEAK_MB, f"memory grew by {found:.1f} MB over {count} requests, above 16 MB")
    lab.control(leaked > LEAK_MB, f"a server that leaks 64 KiB a request grew by {leaked:.1f} MB in 500")


ROWS: Final = (
    Row(26, "floods of pings and of streams", COMMON, floods),
    Row(27, "the server runs out of file descriptors", COMMON, descriptors),
    Row(28, "the log is not read, and its disk is full", ALONE, stalled_log, reconciles=False),
    Row(29, "the wall clock jumps by an hour", ALONE, wall_clock),
    Row(35, "random lengths and selections, many times", Setup(), growth, reconciles=False),
)
