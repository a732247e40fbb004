"""The protocols of peers, which are serving systems under load: requests made beforehand as bytes, answers parsed late.

A call raises OSError where it is refused, EOFError or ValueError where its answer is cut off, or, over gRPC,
`grpc.aio.AioRpcError`. Parsing an answer of another layout raises ValueError, LookupError or protobuf's DecodeError.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
from attnserve.v1 import inference_service_pb2

from bench import service

Array = npt.NDArray[Any]
WIDTH = 384
Call = Callable[[bytes], Awaitable[bytes]]


@dataclass(frozen=True, slots=True)
class Wire:
    """A protocol: a request for ids (T,), hidden states (T, 384) of an answer, and the path of the method.

    `http`: a POST over HTTP/1.1; False: a unary gRPC method.
    """

    request: Callable[[Array], bytes]
    hidden: Callable[[bytes], Array]
    path: str
    http: bool


class HttpCaller:
    """One HTTP/1.1 connection, kept open, for one request at a time."""

    def __init__(self, port: int, path: str, kind: str) -> None:
        self._port = port
        self._head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: {kind}\r\n"
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def __call__(self, data: bytes) -> bytes:
        """Return the body of the answer.

        Raises:
            OSError: The server refuses it, or answers with another status than 200.
            EOFError: The connection ends within the answer.
            ValueError: The connection ends before the size of a chunk.
        """
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port, limit=1 << 20)
        reader, writer = self._streams
        writer.write(f"{self._head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])}
        if "chunked" in fields.get("transfer-encoding", ""):
            body = b""
            while size := int(await reader.readline(), 16):
                body += (await reader.readexactly(size + 2))[:-2]
            await reader.readline()
        else:
            body = await reader.readexactly(int(fields.get("content-length", "0")))
        if fields.get("connection", "").lower() == "close":
            await self.aclose()
        if head[0].split()[1:2] != ["200"]:
            raise OSError(f"{head[0]} {body[:200]!r}")
        return body

    async def aclose(self) -> None:
        """Close the connection. The next call opens another."""
        if self._streams is not None:
            (_, writer), self._streams = self._streams, None
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


def _ids(ids: Array) -> bytes:
    return ids.astype("<i8").tobytes()


def _floats(data: bytes) -> Array:
    return np.frombuffer(data, "<f4").reshape(-1, WIDTH)


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def _field(number: int, data: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _v2(ids: Array, *, batched: bool) -> bytes:
    """Return a ModelInferRequest of the Open Inference Protocol with raw contents, by its field numbers."""
    shape = (1, len(ids)) if batched else (len(ids),)
    tensor = _field(1, b"ids") + _field(2, b"INT64") + _field(3, b"".join(map(_varint, shape)))
    return _field(1, b"minilm") + _field(5, tensor) + _field(6, _field(1, b"hidden")) + _field(7, _ids(ids))


def _v2_hidden(data: bytes) -> Array:
    """Return the raw contents (field 6) of a ModelInferResponse."""
    at = 0
    while at < len(data):
        key, at = _read_varint(data, at)
        size, at = _read_varint(data, at)
        if key & 7 == 0:
            continue  # a plain number, which was read as a size
        if key >> 3 == 6:
            return _floats(data[at : at + size])
        at += size
    raise ValueError("no raw contents")


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = data[at]
        number |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return number, at


def _attnserve(data: bytes) -> Array:
    answer = inference_service_pb2.InferResponse.FromString(data)
    return _floats(answer.results[0].outputs[0].data)


WIRES = {
    "http": Wire(_ids, _floats, "/infer", http=True),
    "mosec": Wire(_ids, _floats, "/inference", http=True),
    "litserve": Wire(lambda ids: json.dumps({"ids": ids.tolist()}).encode(), _floats, "/predict", http=True),
    "bentoml": Wire(lambda ids: json.dumps({"ids": ids.tolist()}).encode(), _floats, "/infer", http=True),
    "bentoml dynamic": Wire(
        lambda ids: json.dumps({"ids": [ids.tolist()]}).encode(),
        lambda data: _floats(base64.b64decode(json.loads(data)[0])),
        "/infer",
        http=True,
    ),
    "v2": Wire(partial(_v2, batched=False), _v2_hidden, "/inference.GRPCInferenceService/ModelInfer", http=False),
    "v2 dynamic": Wire(
        partial(_v2, batched=True), _v2_hidden, "/inference.GRPCInferenceService/ModelInfer", http=False
    ),
    "grpc": Wire(_ids, _floats, "/peer/Infer", http=False),
    "attnserve": Wire(
        lambda ids: service.request(ids).SerializeToString(),
        _attnserve,
        "/attnserve.v1.InferenceService/Infer",
        http=False,
    ),
}


def grpc_call(channel: grpc.aio.Channel, wire: Wire, timeout_s: float) -> Call:
    """Return a caller that sends bytes unchanged, for `timeout_s` seconds at most."""
    method = channel.unary_unary(wire.path)

    async def call(data: bytes) -> bytes:
        return await method(data, timeout=timeout_s)  # type: ignore[no-any-return]

    return call
