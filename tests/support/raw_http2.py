"""A caller with just enough HTTP/2 to begin calls, send part of a message, and not read: all of it well formed.

Source: RFC 9113, sections 3.4 and 4.1; RFC 7541, section 6.2.2; gRPC's doc/PROTOCOL-HTTP2.md.
"""

from __future__ import annotations

import socket
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Self

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _SETTINGS = 0, 1, 4
_END_STREAM, _END_HEADERS = 1, 4


def _frame(kind: int, flags: int, stream: int, data: bytes) -> bytes:
    return len(data).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + data


def _field(name: bytes, value: bytes) -> bytes:
    """A header field that is neither indexed nor compressed; name and value have less than 127 bytes."""
    return b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value


class SlowCaller(AbstractContextManager["SlowCaller"]):
    """One connection."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.sendall(_PREFACE + _frame(_SETTINGS, 0, 0, b""))
        self._next = 1

    def call(self, method: str, message: bytes, *, sent: int | None = None) -> None:
        """Begin a call with a message of under 16 KiB, or the first `sent` bytes of it. Its answer is not read."""
        stream, self._next = self._next, self._next + 2
        fields = {
            ":method": "POST",
            ":scheme": "http",
            ":path": method,
            ":authority": "test",
            "te": "trailers",  # codespell:ignore te
            "content-type": "application/grpc",
        }
        block = b"".join(_field(name.encode(), value.encode()) for name, value in fields.items())
        self._socket.sendall(_frame(_HEADERS, _END_HEADERS, stream, block))
        framed = b"\0" + len(message).to_bytes(4, "big") + message
        ends = _END_STREAM if sent is None else 0
        self._socket.sendall(_frame(_DATA, ends, stream, framed if sent is None else framed[: 5 + sent]))

    def ended(self) -> bool:
        """Return whether the server has closed the connection. Reads what is there, which gives no new window."""
        self._socket.setblocking(False)
        try:
            while True:
                if not self._socket.recv(65_536):
                    return True
        except BlockingIOError:
            return False
        except OSError:
            return True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()
