"""Rows 36 to 39: callers without the right certificate, token or scope, and the renewal of certificates."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import socket
import ssl
import time
from typing import Final

from attnserve_server.transport.who import FREE, SCOPE_OF
from credentials import bearer, expired

from faults import bundles
from faults.lab import Lab, Row, Setup, Share, context_of, credentials_of
from faults.wire import request_of

CERTIFICATES: Final = Setup(secured="certificates")
TOKENS: Final = Setup(secured="tokens", flags=("--admin", "--reflection"))
MOST_LOG_LINES: Final = 40
UNKNOWN: Final = "attn_" + "A" * 43


def _handshake(lab: Lab, context: ssl.SSLContext) -> bool:
    """Open a connection to the gRPC port; return whether the server kept it."""
    context.set_alpn_protocols(["h2"])
    try:
        with (
            socket.create_connection(("localhost", lab.server.running.grpc_port)) as raw,
            context.wrap_socket(raw, server_hostname="localhost") as secure,
        ):
            secure.settimeout(5)
            return bool(secure.recv(1))  # in TLS 1.3, a server refuses after the client's side of the handshake
    except (ssl.SSLError, OSError):
        return False


async def certificates(lab: Lab) -> None:
    """Row 36."""
    files = lab.bench.files
    assert files is not None
    good, size = files.clients.issue_cert("client"), lab.server.log_size()
    wrong = {"none": None, "another authority": files.authority.issue_cert("client"), "expired": expired(files.clients)}
    before = await lab.blocking(lambda: lab.server.metric("attnserve_tls_handshakes_total", port="grpc"))
    count = lab.count(40, 1_000)
    for name, client in wrong.items():
        context = context_of(lab.bench, client)
        for _ in range(count):
            lab.must(not await lab.blocking(_handshake, lab, context), f"a client with {name} was connected")
            lab.injected[f"handshakes, certificate: {name}"] += 1
        wire = lab.caller(f"with {name}", "UNAVAILABLE", credentials=credentials_of(lab.bench, client))
        async with wire:
            await wire.infer(bundles.TINY, "the cat", timeout_s=5.0)
    counted = await lab.until(
        lambda: lab.server.metric("attnserve_tls_handshakes_total", port="grpc") - before >= 3 * count
    )
    lab.must(counted, "handshakes are not counted")
    lines = list(lab.server.log_lines(size))
    lab.measured["log_lines"] = len(lines)
    lab.must(len(lines) <= MOST_LOG_LINES, f"{3 * count} handshakes made {len(lines)} lines of log")
    async with lab.caller("right") as wire:
        lab.control((await wire.infer(bundles.TINY, "the cat")).code == "OK", "the right certificate is not served")
    kept = await lab.blocking(_handshake, lab, context_of(lab.bench, good))
    lab.control(kept, "the handshake of the right certificate fails in the same way")


def _serial(lab: Lab) -> str:
    context = context_of(lab.bench)
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection(("localhost", lab.server.running.grpc_port)) as raw,
        context.wrap_socket(raw, server_hostname="localhost") as secure,
    ):
        return f"{int(str((secure.getpeercert() or {})['serialNumber']), 16):x}"


async def rotation(lab: Lab) -> None:
    """Row 37."""
    files = lab.bench.files
    assert files is not None
    done = asyncio.Event()

    async def lasting(name: str, key: str) -> None:
        async with lab.caller(name) as wire:
            while not done.is_set():
                await wire.infer(bundles.TINY, key)

    async def fresh() -> None:
        number = 0
        while not done.is_set():
            number += 1
            async with lab.caller(f"new connection {number}") as wire:
                await wire.infer(bundles.TINY, "a mat")

    old = (lasting("old connection", "the cat"), lasting("other old connection", bundles.MAP + "the dog sat"))
    loads = [asyncio.create_task(one) for one in (*old, fresh())]
    serials = [await lab.blocking(_serial, lab)]
    for _ in range(lab.count(2, 20)):
        await asyncio.sleep(0.3)
        new = files.renew()
        used = await lab.until(lambda one=new: _serial(lab) == one, 20.0)
        lab.must(used, "new connections do not get the new certificate")
        serials.append(new)
        lab.injected["certificates"] += 1
    await asyncio.sleep(0.3)
    done.set()
    await asyncio.gather(*loads)
    lab.control(len(set(serials)) == len(serials), "the serial numbers are all different")


async def guesses(lab: Lab) -> None:
    """Row 38."""
    count, size = lab.count(600, 10_000), lab.server.log_size()
    before = await lab.blocking(lambda: lab.server.metric("attnserve_access_refused_total"))
    data = request_of(bundles.TINY, ["the cat"]).SerializeToString()
    malformed = ("", "Bearer", "Bearer ", "Basic dXNlcjpwYXNz", UNKNOWN, "Bearer all", "Bearer canary")
    async with lab.caller("guessing", "UNAUTHENTICATED", metadata=()) as wire:
        for one in malformed:
            await wire.send(data, metadata=(("authorization", one),))
        await wire.send(data)
        for first in range(0, count, 50):
            sent = (wire.send(data, metadata=bearer(f"attn_{first + at:043}")) for at in range(50))
            await asyncio.gather(*sent)
            lab.injected["guesses"] += 50
    tried = count + len(malformed) + 1
    counted = await lab.until(lambda: lab.server.metric("attnserve_access_refused_total") - before >= tried)
    lab.must(counted, "refused calls are not all counted")
    backed_off = await lab.blocking(lambda: lab.server.metric("attnserve_access_refused_total", cause="backed_off"))
    lines = list(lab.server.log_lines(size))
    lab.measured |= {"backed_off": backed_off, "log_lines": len(lines)}
    lab.control(backed_off >= count / 2, f"{backed_off:g} of {count} guesses were held back")
    lab.must(len(lines) <= MOST_LOG_LINES, f"{count} guesses made {len(lines)} lines of log")
    assert lab.bench.tokens is not None
    secrets = (*lab.bench.tokens.secrets.values(), UNKNOWN)
    lab.must(not any(one in line for one in secrets for line in lines), "a token is in the log")


PATHS: Final = ("/metrics", "/metrics/", "//metrics", "/docs", "/debug", "/livez/../metrics", "/v2/repository/index")


async def denied(lab: Lab) -> None:
    """Row 39."""
    assert lab.bench.tokens is not None
    tokens = lab.bench.tokens
    scopes = {"infer": "infer", "attention": "infer,attention", "metrics": "metrics", "admin": "admin"}
    secrets = {name: tokens.secrets.get(name) or tokens.add(name, given) for name, given in scopes.items()}
    infer = request_of(bundles.TINY, ["the cat"]).SerializeToString()
    methods = {
        **SCOPE_OF, "/attnserve.v1.InferenceService/Nothing": None, "/attnserve.v1.ModelService/Nothing": None,
        "/inference.GRPCInferenceService/Nothing": None, "/grpc.channelz.v1.Channelz/Nothing": None,
        "/grpc.admin.v1.Admin/Nothing": None, "attnserve.v1.InferenceService.Infer": None, "/Infer": None,
        "//attnserve.v1.InferenceService/Infer": None, "/metrics": None,
    }  # fmt: skip
    held = await lab.until(lambda: _is_known(lab, secrets["metrics"]), 15.0)
    lab.must(held, "the file of tokens is not read again")
    answered = 0
    for method, scope in methods.items():
        if method.endswith(("Watch", "StreamInfer", "Info")) and scope is not None:
            continue  # streams: tests/contract/test_who.py has them
        data = b"" if scope == "admin" else infer  # an empty message changes no model
        for name in (*scopes, ""):
            codes = _expected(scope, scopes.get(name, ""))
            async with lab.caller(f"{name or 'no token'} on {method}", *codes, metadata=()) as wire:
                await wire.send(data, method=method, metadata=bearer(secrets[name]) if name else ())
            lab.injected["method and credential"] += 1
            answered += codes[0] == "OK"
    lab.control(answered > 0, "no pair is served")
    for path in PATHS:
        for name in (*scopes, ""):
            status = await lab.blocking(_status, lab, path, secrets.get(name, ""))
            served = path == "/metrics" and name == "metrics"
            lab.must((status == 200) == served, f"{path} with {name or 'no token'}: {status}")
            lab.injected["path and credential"] += 1


def _expected(scope: str | None, scopes: str) -> tuple[str, ...]:
    """Return the statuses of a method for a token of some scopes; the request itself is not the method's."""
    served = ("OK", "INVALID_ARGUMENT", "NOT_FOUND")
    if scope == FREE:
        return served
    if not scopes:
        return ("UNAUTHENTICATED",)
    if scope is None:
        return ("UNIMPLEMENTED", "PERMISSION_DENIED")
    return served if scope in scopes.split(",") else ("PERMISSION_DENIED",)


def _status(lab: Lab, path: str, secret: str) -> int:
    # urllib would change the paths.
    connection = http.client.HTTPSConnection(
        "localhost", lab.server.running.http_port, context=context_of(lab.bench), timeout=10
    )
    with contextlib.closing(connection):
        connection.request("GET", path, headers={"authorization": f"Bearer {secret}"} if secret else {})
        return connection.getresponse().status


def _is_known(lab: Lab, secret: str) -> bool:
    time.sleep(0.2)
    return _status(lab, "/metrics", secret) == 200


NEW_CONNECTIONS: Final = Share(0.999, None)
"""Handshakes cost processor time by the millisecond on the server's own cores."""

ROWS: Final = (
    Row(36, "no client certificate, an expired one, one of another authority", CERTIFICATES, certificates, None),
    Row(37, "the certificate is renewed under load", TOKENS, rotation, NEW_CONNECTIONS),
    Row(38, "missing and wrong tokens, and guesses", TOKENS, guesses),
    Row(39, "tokens on methods and paths beyond their scope", TOKENS, denied, reconciles=False),
)
