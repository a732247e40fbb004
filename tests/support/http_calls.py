"""HTTP/1.1 requests by hand, each on a new connection: `call` returns the whole answer."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def head(method: str, path: str, headers: dict[str, str]) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", *(f"{key}: {value}" for key, value in headers.items()), "", ""]
    return "\r\n".join(lines).encode()


async def call(port: int, method: str, path: str, body: object = None, headers: dict[str, str] | None = None) -> Answer:
    """Send one request and return its answer. `body`: bytes as they are, anything else as JSON."""
    sent = {"host": "localhost", "connection": "close"}
    data = b""
    if body is not None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        sent |= {"content-type": "application/json", "content-length": str(len(data))}
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(
            head(method, path, {key: value for key, value in (sent | (headers or {})).items() if value}) + data
        )
        return parsed(await asyncio.wait_for(reader.read(), 60))
    finally:
        writer.close()


def parsed(answer: bytes) -> Answer:
    """Read a whole answer, whose connection has ended."""
    top, _, rest = answer.partition(b"\r\n\r\n")
    first, *lines = top.decode("latin-1").split("\r\n")
    headers = {key.lower(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    if headers.get("transfer-encoding") == "chunked":
        pieces = []
        while rest:
            size, _, rest = rest.partition(b"\r\n")
            pieces.append(rest[: int(size, 16)])
            rest = rest[int(size, 16) + 2 :]
        rest = b"".join(pieces)
    return Answer(int(first.split()[1]), headers, rest)
