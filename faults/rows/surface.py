"""Rows 40 to 43: what the ports show, what names do to metrics and logs, and texts in pages."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import tempfile
import urllib.error
from pathlib import Path
from typing import Final

import psutil
from attnserve_client import AsyncClient, AttentionSelection
from browser import CHROMIUM, HOSTILE, Elements, document

from faults import bundles
from faults.lab import Lab, Row, Share
from faults.rows.inputs import COMMON, of_text
from faults.wire import SERVICE

HIDDEN: Final = (
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    "/grpc.channelz.v1.Channelz/GetServers",
    "/grpc.admin.v1.Admin/Get",
    "/inference.GRPCInferenceService/RepositoryModelLoad",
    "/attnserve.v1.ModelService/LoadModel",
    "/attnserve.v1.ModelService/ReloadRepository",
)
PAGES: Final = ("/", "/debug", "/debug/pprof", "/docs", "/openapi.json", "/admin", "/explore", "/env", "/healthz")
REST_PAGES: Final = ("/debug", "/debug/pprof", "/admin", "/env", "/metrics", "/livez/../metrics")
EVIL: Final = ("a\r\nforged: 1", 'x\n{"event": "forged"}', "\x1b[31mred", "\u2028line", "\x00nul", "a\tb", "é" * 40)


async def ports(lab: Lab) -> None:
    """Row 40."""
    listening = {
        one.laddr.port
        for process in lab.server.processes().values()
        for one in process.net_connections("tcp")
        if one.status == psutil.CONN_LISTEN
    }
    running = lab.server.running
    known = {running.grpc_port, running.http_port, running.rest_port}
    lab.must(listening == known, f"the server listens on {len(listening)} ports, and states {len(known)}")
    async with lab.caller("curious", "UNIMPLEMENTED") as wire:
        for method in HIDDEN:
            await wire.send(b"", method=method)
            lab.injected["methods"] += 1
    for page in PAGES:
        try:
            await lab.blocking(lab.server.page, page)
        except urllib.error.HTTPError as error:
            lab.must(error.code == 404, f"{page}: {error.code}")
        else:
            lab.must(False, f"{page} is served")
        lab.injected["pages"] += 1
    for page in REST_PAGES:
        status = await lab.blocking(_status, running.rest_port, page)
        lab.must(status == 404, f"{page} on the REST port: {status}")
        lab.injected["pages"] += 1
    async with lab.caller("usual") as wire:
        end = await wire.infer(bundles.TINY, "the cat")
        lab.control(end.code == "OK", f"{SERVICE} is not found in the same way")


def _status(port: int, path: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    with contextlib.closing(connection):
        connection.request("GET", path)
        return connection.getresponse().status


async def names(lab: Lab) -> None:
    """Row 41."""
    count = lab.count(1_000, 100_000)
    async with lab.caller("namer", "NOT_FOUND", "UNIMPLEMENTED") as wire:
        for one in ("first", "second"):  # so that the series of these statuses exist
            await wire.send(of_text(one, "the cat"))
            await wire.send(b"", method=f"{SERVICE}/{one}")
        before = await lab.blocking(lambda: len(lab.server.samples()))
        answered = lab.server.metric("grpc_server_handled_total", grpc_code="NOT_FOUND")
        for first in range(0, count, 50):
            sent = [
                wire.send(of_text(f"model{first + at}-{lab.chance.getrandbits(40):x}", "the cat", version=str(at + 1)))
                if at % 2
                else wire.send(b"", method=f"{SERVICE}/Method{lab.chance.getrandbits(40):x}")
                for at in range(50)
            ]
            await asyncio.gather(*sent)
            lab.injected["random names"] += 50
    after = await lab.blocking(lambda: len(lab.server.samples()))
    counted = lab.server.metric("grpc_server_handled_total", grpc_code="NOT_FOUND") - answered
    lab.measured["series"] = [before, after]
    lab.must(after == before, f"the number of series grew from {before} to {after}")
    lab.control(counted == count / 2, f"{counted:g} of {count // 2} unknown models were counted")


async def escapes(lab: Lab) -> None:
    """Row 42."""
    size = lab.server.log_size()
    async with lab.caller("forger", "OK", "INVALID_ARGUMENT", "NOT_FOUND") as wire:
        for evil in EVIL:
            for data in (
                of_text(evil, "the cat"),
                of_text(bundles.TINY, "the cat", version=evil),
                of_text(bundles.TINY, "", request_id=evil),
                of_text(bundles.TINY, evil),
                of_text(bundles.TINY, "the cat", prompt_name=evil),
            ):
                await wire.send(data, metadata=(("x-note", "a b"), ("x-note-bin", evil.encode()))[:1])
                lab.injected["texts with control characters"] += 1
    await lab.until(lambda: lab.server.log_size() > size)
    await asyncio.sleep(0.5)
    lines = list(lab.server.log_lines(size))
    raw = "\n".join(lines)
    try:
        found = [json.loads(line) for line in lines]
    except ValueError as error:
        lab.must(False, f"a line of the log is no JSON: {error}")
        return
    lab.measured["lines"] = len(found)
    lab.control(any("refused" in line["event"] for line in found), "the log has no line of a refused request")
    lab.must(not any(line["event"] == "forged" for line in found), "a line was forged")
    lab.must("\x1b" not in raw and "\u2028" not in raw and "\x00" not in raw, "a control character is in the log")


async def pages(lab: Lab) -> None:
    """Row 43."""
    texts = [f"the {one} cat" for one in HOSTILE]
    sources = []
    async with AsyncClient(lab.server.target) as client:
        for text in texts:
            result = await client.infer(
                bundles.TINY, text, attention=AttentionSelection(layers=[-1], heads="mean", unit="word")
            )
            sources.append(result.attention[0].to_html())
            lab.injected["pages with markup in their text"] += 1
    lab.attempts += len(texts)
    shown = []
    for source in sources:
        lab.must("Content-Security-Policy" in source, "a page has no content policy")
        if CHROMIUM:
            with tempfile.TemporaryDirectory() as folder:
                found = await lab.blocking(document, source, Path(folder))
        else:
            found = Elements(source)
        lab.must(not {"img", "svg"} & set(found.tags), f"a page has the elements {sorted(set(found.tags))}")
        lab.must("owned" not in found.title, "a script of the text ran")
        shown.append("".join(found.tokens))
    lab.measured["browser"] = "chromium" if CHROMIUM else "none: only the source was parsed"
    lab.control("img" in Elements(HOSTILE[0]).tags, "the texts hold elements")
    if CHROMIUM:
        lab.control(any("onerror" in one for one in shown), "no page shows the text")


BROWSING: Final = Share(0.999, None)
"""The browser takes all cores."""

ROWS: Final = (
    Row(40, "a search for reflection, administration and debug pages", COMMON, ports),
    Row(41, "random names of models and methods", COMMON, names),
    Row(42, "line breaks and terminal codes in names, texts and ids", COMMON, escapes),
    Row(43, "markup in texts of tokens", COMMON, pages, BROWSING),
)
