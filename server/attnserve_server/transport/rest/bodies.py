"""Bodies of requests: received in bounded time and memory, uncompressed, and read as JSON of bounded structure."""

from __future__ import annotations

import asyncio
import re
from typing import Final, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request

from attnserve_server.domain.clock import Clock
from attnserve_server.domain.errors import InvalidRequest, Overloaded, RequestCancelled
from attnserve_server.transport.rest.errors import BodyNotReceived, BodyTooLarge, UnsupportedMediaType

T = TypeVar("T")

ARRIVES_S: Final = 20.0
"""Seconds that a body has, in addition to those of `LEAST_RATE`."""
LEAST_RATE: Final = 256 * 1024
"""Bytes a second that a long body must arrive with."""
EXPANSION: Final = 8
"""Bytes of memory that a byte of JSON takes at most: a float of four characters is an object of 32 bytes."""
MAX_VALUES: Final = 32_768
"""Most objects and arrays in one body: 4,096 sequences have three each, with a tensor."""
_RETRY_S: Final = 0.5
_STRINGS: Final = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)


class Bodies:
    """The bodies that are held at a time. Event loop only."""

    def __init__(self, limit: int, budget: int, clock: Clock) -> None:
        """Store the bounds.

        Args:
            limit: bytes of the longest body.
            budget: bytes of memory over all bodies; one of any size is accepted while there is no other.
            clock: measures their arrival.
        """
        self.limit = limit
        self._budget = budget
        self._clock = clock
        self._taken = 0

    def hold(self) -> HeldBody:
        """Return the place of one body; release it when its request ends."""
        return HeldBody(self)

    def take(self, count: int) -> None:
        """Reserve bytes. Raises Overloaded if they exceed the budget."""
        if self._taken and self._taken + count > self._budget:
            raise Overloaded("bodies", self._budget, self._taken + count, _RETRY_S)
        self._taken += count

    def give(self, count: int) -> None:
        """Give bytes back."""
        self._taken -= count

    def now(self) -> float:
        """Return the time."""
        return self._clock.now()


class HeldBody:
    """The memory of one request's body. Event loop only."""

    def __init__(self, bodies: Bodies) -> None:
        self._bodies = bodies
        self._taken = 0

    async def receive(self, request: Request, expansion: int = 1, further: int = 0) -> bytes:
        """Return the body of a request.

        Args:
            request: whose body was not read.
            expansion: bytes of memory for each byte, until the request ends.
            further: bytes of memory beside those.

        Raises:
            UnsupportedMediaType: It is compressed.
            BodyTooLarge: It is longer than the limit.
            BodyNotReceived: It did not arrive in time.
            Overloaded: Other bodies have taken the budget.
            RequestCancelled: The client left.
        """
        encoding = request.headers.get("content-encoding", "identity").strip().lower()
        if encoding not in {"", "identity"}:
            raise UnsupportedMediaType.of("content-encoding", "a compressed body; send it as it is")
        limit = self._bodies.limit
        declared = request.headers.get("content-length", "")
        size = int(declared) if declared.isdecimal() and len(declared) < 19 else limit
        if size > limit:
            raise _too_large(size, limit)
        self._take(size * expansion + further)
        body = await self._read(request, limit)
        self._take(len(body) * expansion + further)
        return body

    def release(self) -> None:
        """Give everything back."""
        self._bodies.give(self._taken)
        self._taken = 0

    def _take(self, count: int) -> None:
        """Hold `count` bytes in place of those before."""
        self._bodies.give(self._taken)
        self._taken = 0
        self._bodies.take(count)
        self._taken = count

    async def _read(self, request: Request, limit: int) -> bytes:
        began, size = self._bodies.now(), 0
        pieces: list[bytes] = []
        stream = request.stream()
        try:
            while True:
                left_s = began + ARRIVES_S + size / LEAST_RATE - self._bodies.now()
                try:
                    async with asyncio.timeout(max(0.0, left_s)):
                        piece = await anext(stream)
                except StopAsyncIteration:
                    return b"".join(pieces)
                size += len(piece)
                if size > limit:
                    raise _too_large(size, limit)
                pieces.append(piece)
        except TimeoutError:
            late = f"{size} bytes arrived in {self._bodies.now() - began:.1f} s; send it at once"
            raise BodyNotReceived.of("body", late) from None
        except ClientDisconnect:
            raise RequestCancelled from None


def _too_large(size: int, limit: int) -> BodyTooLarge:
    return BodyTooLarge.of("body", f"{size} bytes exceed {limit}, the longest request of the models; send fewer inputs")


def check_json(content_type: str) -> None:
    """Raise UnsupportedMediaType unless a content type is that of JSON in UTF-8.

    Browsers send other types for pages of any origin, without a preflight request.
    """
    kind, _, parameters = content_type.lower().partition(";")
    charset = parameters.partition("charset=")[2].strip().strip('"')
    if kind.strip() != "application/json" or charset not in {"", "utf-8"}:
        raise UnsupportedMediaType.of("content-type", f"{content_type[:64]!a} is not 'application/json'")


def parsed(body: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    """Read JSON. Raises InvalidRequest, which names the field, if it is malformed, of another form, or too large."""
    values = body.count(b"{") + body.count(b"[")
    if values > MAX_VALUES:  # signs within texts do not count
        bare = _STRINGS.sub(b"", body)
        values = bare.count(b"{") + bare.count(b"[")
        if values > MAX_VALUES:
            raise InvalidRequest.of("body", f"{values} objects and arrays exceed {MAX_VALUES}")
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise InvalidRequest.of(*_place(str(error))) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise InvalidRequest.of("body", f"no JSON: {why}") from None


def _place(message: str) -> tuple[str, str]:
    """Return the field and the fault of msgspec's message, such as "Expected `int`, got `str` - at `$.a[0]`"."""
    what, _, where = message.rpartition(" - at `$")
    return (where.rstrip("`").lstrip(".") or "body", what) if what else ("body", message)
