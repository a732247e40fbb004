"""What a client shows the server: files of TLS, and a token, whose file is read again when it changes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Final, TypeAlias

import grpc

from attnserve_client._channel import metadata_of

Metadata: TypeAlias = tuple[tuple[str, str | bytes], ...]

_LOOK_EVERY_S: Final = 1.0
_MAX_TOKEN_BYTES: Final = 4096


@dataclass(frozen=True, slots=True)
class Tls:
    """An encrypted connection, from PEM files. A client reads them when it is made.

        from attnserve_client.data_types import Tls

        Client("models.example.com:8001", credentials=Tls(ca="ca.pem"))

    Attributes:
        ca: File of the authorities that the server's certificate must come from; None: those of the system.
        cert: File of the client's own certificate, with those of its issuers, where the server requires one.
        key: File of its private key. Set both, or neither.

    Raises:
        ValueError: Only one of `cert` and `key` is set.
    """

    ca: str | Path | None = None
    cert: str | Path | None = None
    key: str | Path | None = None

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            raise ValueError("of cert and key only one is set; set both, or neither")

    def credentials(self) -> grpc.ChannelCredentials:
        """Return gRPC's credentials.

        Raises:
            OSError: A file cannot be read.
            ValueError: A file is not PEM.
        """
        ca, key, cert = (_pem(path) for path in (self.ca, self.key, self.cert))
        return grpc.ssl_channel_credentials(ca, key, cert)


class TokenFile:
    """A file that holds a token and nothing else. It is read again when it changes, at most once a second.

        Client("localhost:8001", token=TokenFile("/var/run/secrets/attnserve/token"))

    While the file is missing or invalid, the last token is sent. Any thread may use it.

    Args:
        path: The file.

    Raises:
        OSError: The file cannot be read.
        ValueError: The file is empty, or holds more than one word.
    """

    def __init__(self, path: str | Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = Path(path)
        self._clock = clock
        self._lock = Lock()
        self._looked = clock()
        self._stamp = self._stamp_now()
        self._token = self._read()

    @property
    def token(self) -> str:
        """The token now."""
        with self._lock:
            now = self._clock()
            if now - self._looked >= _LOOK_EVERY_S:
                self._looked = now
                try:
                    stamp = self._stamp_now()
                    if stamp != self._stamp:
                        self._token = self._read()
                        self._stamp = stamp
                except (OSError, ValueError):
                    pass  # it is being replaced: the next look reads it
            return self._token

    def _stamp_now(self) -> tuple[int, int, int]:
        facts = self._path.stat()
        return facts.st_mtime_ns, facts.st_size, facts.st_ino

    def _read(self) -> str:
        with self._path.open("rb") as file:
            words = file.read(_MAX_TOKEN_BYTES).decode("ascii").split()
        if len(words) != 1:
            raise ValueError(f"{self._path.name} holds {len(words)} words; a token file holds the token alone")
        return words[0]


def credentials_of(credentials: grpc.ChannelCredentials | Tls | None) -> grpc.ChannelCredentials | None:
    """Return gRPC's credentials; None for an unencrypted connection."""
    return credentials.credentials() if isinstance(credentials, Tls) else credentials


def per_call(token: str | TokenFile | None, more: Sequence[tuple[str, str | bytes]]) -> Callable[[], Metadata]:
    """Return a function that returns the metadata of a call: with the token as it is then."""
    if isinstance(token, TokenFile):
        return lambda: metadata_of(token.token, more)
    fixed = metadata_of(token, more)
    return lambda: fixed


def _pem(path: str | Path | None) -> bytes | None:
    if path is None:
        return None
    data = Path(path).read_bytes()
    if b"-----BEGIN " not in data:
        raise ValueError(
            f"{Path(path).name} is no PEM file; it must hold a line BEGIN CERTIFICATE or BEGIN PRIVATE KEY"
        )
    return data
