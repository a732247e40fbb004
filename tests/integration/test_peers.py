"""The benchmark against other servers (peers): the peer without an installation runs, and clients read answers as sent.

Needs `bench` of this checkout and `minilm_repository`: without the package of MiniLM, the test with it fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from bench.peers import wires  # noqa: E402
from bench.peers.load import drive  # noqa: E402


def test_attnserve_and_a_plain_grpc_server_give_right_answers(minilm_repository: Path) -> None:
    line = [sys.executable, "-m", "bench.peers", "--only", "grpc.aio", "--repository", str(minilm_repository)]
    line += ["--requests", "40", "--rounds", "1", "--json"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300, check=True, cwd=ROOT)
    figures = {(each["name"], each["form"]): each for each in json.loads(done.stdout)["systems"]}
    for key in (("attnserve", "defaults"), ("attnserve", "single"), ("grpc.aio by hand", "single")):
        assert figures[key]["per_s"] > 0
        assert (figures[key]["wrong"], figures[key]["errors"]) == (0, 0)
    assert figures["grpc.aio by hand", "dynamic"]["why_not"] == "it has no batcher"


@pytest.mark.parametrize(
    ("answer", "errors", "wrong"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1536\r\n\r\n" + bytes(1536), 0, 0),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n600\r\n" + bytes(1536) + b"\r\n0\r\n\r\n", 0, 0),
        (b"HTTP/1.1 503 Busy\r\nContent-Length: 2\r\n\r\nno", 4, 0),
        # The control: the answer to another request counts as wrong.
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1536\r\n\r\n" + np.ones(384, "<f4").tobytes(), 0, 1),
    ],
)
async def test_http_client_reads_both_kinds_of_bodies(answer: bytes, errors: int, wrong: int) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            while await reader.readuntil(b"\r\n\r\n"):
                await reader.readexactly(8)
                writer.write(answer)
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        items = [np.array([7], np.int64)] * 4
        references = [np.zeros((1, 384), np.float32)] * 4
        measured = await drive(port, wires.WIRES["http"], items, references, 2, 30.0)
    assert (measured.errors, measured.wrong) == (errors, wrong)


def test_v2_messages_carry_raw_contents() -> None:
    ids = np.arange(300, dtype=np.int64)
    sent = wires.WIRES["v2 dynamic"].request(ids)
    assert sent.endswith(ids.tobytes())
    hidden = np.random.default_rng(0).normal(size=(3, 384)).astype(np.float32)
    answer = b"\x0a\x06minilm" + b"\x22\x00" + b"\x32" + wires._varint(hidden.nbytes) + hidden.tobytes()
    np.testing.assert_array_equal(wires.WIRES["v2"].hidden(answer), hidden)
