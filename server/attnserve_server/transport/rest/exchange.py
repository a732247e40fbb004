"""One HTTP request and its answer: body, request id, deadline, the data plane, and the boundary of failures.

At the boundary a failure becomes one answer, at most one log line, and one count, as in `servicer`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from functools import cache
from itertools import count
from typing import Any, Final, TypeVar, cast
from uuid import uuid4

import msgspec
from attnserve.v1 import inference_service_pb2
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from attnserve_server.access.guard import CALLER
from attnserve_server.config import Settings
from attnserve_server.domain.clock import Clock
from attnserve_server.domain.errors import DeadlineExpired, InvalidRequest, Overloaded, RequestCancelled
from attnserve_server.observability.metrics import Metrics
from attnserve_server.observability.spec import HTTP_REQUESTS, HTTP_SECONDS, REFUSAL_SECONDS
from attnserve_server.scheduling.catalog import Catalog
from attnserve_server.scheduling.queue import Request
from attnserve_server.transport.admin import ModelServicer
from attnserve_server.transport.dataplane import DataPlane
from attnserve_server.transport.health import Health
from attnserve_server.transport.prepared import Prepared
from attnserve_server.transport.rest.bodies import EXPANSION, Bodies, check_json, parsed
from attnserve_server.transport.rest.errors import REQUEST_ID, response_of, status_of
from attnserve_server.transport.servicer import UNLOGGED, free_frames, log_failure
from attnserve_server.transport.sockets import site_of
from attnserve_server.transport.unread import Unread
from attnserve_server.transport.validation import is_request_id
from attnserve_server.transport.wire import Received

T = TypeVar("T")

PIECE_BYTES: Final = 65_536
"""An answer is handed over in such pieces, each once the caller has read most of those before."""
ANSWER_EXPANSION: Final = 6
"""Bytes of JSON for each byte of tensor data: a float32 has up to 22 characters."""
_PROCESS: Final = uuid4().hex[:16]
_NUMBERS: Final = count()


@dataclass(slots=True)
class Rest:
    """What all adapters share. Event loop only."""

    plane: DataPlane
    catalog: Catalog
    settings: Settings
    clock: Clock
    metrics: Metrics
    unread: Unread
    health: Health
    models: ModelServicer | None
    """Whose lifecycle loads and unloads; None without `--admin`."""
    bodies: Bodies = field(init=False)
    """Set by the server, once it knows its bounds."""


Handler = Callable[["Exchange"], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One method of one path: what serves it, and how the OpenAPI document describes it.

    Args:
        method: of HTTP.
        path: with `{name}` for a part that varies. Its scope is in `who.SCOPE_OF_PATH`.
        handle: serves a request; it raises errors of the domain.
        summary: one sentence.
        accepts: type of the body, for msgspec; None: it has none.
        returns: type of the answer.
        media_types: further types of the answer, beside JSON.
        example: a body that works with the model of the demo.
    """

    method: str
    path: str
    handle: Handler
    summary: str
    accepts: Any = None
    returns: Any = None
    media_types: tuple[str, ...] = ()
    example: Any = None


@dataclass(slots=True)
class Exchange:
    """One request. Event loop only."""

    request: HttpRequest
    rest: Rest
    path: str
    """The path of its endpoint, for metrics, logs and messages."""
    request_id: str
    """A handler may set it to the id that the body has."""
    _ended: list[Callable[[], None]] = field(default_factory=list)

    async def body(self, expansion: int = 1, further: int = 0) -> bytes:
        """Receive the body, as `HeldBody.receive`."""
        held = self.rest.bodies.hold()
        self._ended.append(held.release)
        return await held.receive(self.request, expansion, further)

    async def json(self, kind: type[T]) -> T:
        """Receive the body as JSON of a type.

        Raises:
            UnsupportedMediaType: By its content type it is none, or it is compressed.
            InvalidRequest: It is malformed or of another form.
            AttnserveError: As `HeldBody.receive`.
        """
        check_json(self.request.headers.get("content-type", ""))
        decoder: msgspec.json.Decoder[T] = decoder_of(cast("Any", kind))
        return parsed(await self.body(EXPANSION), decoder)

    def deadline_s(self, timeout_s: float | None) -> float:
        """Return when a request with this timeout expires. Raises InvalidRequest unless it is positive."""
        if timeout_s is not None and not 0 < timeout_s < 1e9:
            raise InvalidRequest.of("timeout", f"{timeout_s} is no positive number of seconds")
        return self.rest.clock.now() + (self.rest.settings.call_timeout_s if timeout_s is None else timeout_s)

    def admit(self, sequences: int, *, attention: bool = False) -> None:
        """Take so many sequences from the caller's quota. Raises as `Caller.admit`."""
        caller = CALLER.get()
        if caller is not None:
            caller.admit(sequences, self.path, attention=attention)

    async def infer(
        self,
        received: Received[inference_service_pb2.InferRequest],
        deadline_s: float,
        *,
        expansion: int = ANSWER_EXPANSION,
        note: Callable[[Prepared], None] | None = None,
    ) -> inference_service_pb2.InferResponse:
        """Run one request as gRPC's `Infer` does. Call `admit` before.

        Args:
            received: the request, whose id is that of the exchange.
            deadline_s: when it expires, from `deadline_s`.
            expansion: bytes of the answer's body for each byte of its tensors.
            note: called with the prepared request, before it runs.

        Raises:
            AttnserveError: As in the status table.
        """
        plane = self.rest.plane

        async def work(request: Request) -> bytes:
            prepared = plane.prepare(request, received) or await plane.prepare_large(request, received)
            if note is not None:
                note(prepared)
            self.hold(prepared, prepared.answer_bytes * expansion)
            return (await plane.run(prepared)).joined()

        answer = await self.run(received.size, deadline_s, work)
        return inference_service_pb2.InferResponse.FromString(answer)

    async def run(self, size: int, deadline_s: float, work: Callable[[Request], Awaitable[T]]) -> T:
        """Run the work of one request, and cancel it once the request expires.

        Args:
            size: bytes of the request.
            deadline_s: when it expires, from `deadline_s`.
            work: takes the request on the data plane, in state RECEIVED.

        Raises:
            DeadlineExpired: The request expired.
            AttnserveError: What `work` raises.
        """
        caller = CALLER.get()
        turns = self._site() if caller is None else caller.token.name
        request = Request(self.request_id, deadline_s, size, turns)
        began = self.rest.clock.now()
        try:
            # The scheduler keeps the deadline too. This holds it where a run or a thread takes longer, as gRPC does.
            async with asyncio.timeout(deadline_s - began):
                return await work(request)
        except TimeoutError:
            late = DeadlineExpired(self.rest.clock.now() - began)
            request.fail(late)
            raise late from None
        except (asyncio.CancelledError, Exception) as error:
            request.fail(error)
            raise

    def hold(self, prepared: Prepared, count: int) -> None:
        """Reserve bytes of a request's answer until it is sent. Raises Overloaded, and counts the refusal."""
        held = self.rest.unread.hold("")  # its caller is ended by `_Reply`
        self._ended.append(lambda: self.rest.unread.release(held))
        try:
            self.rest.unread.take_or_refuse(held, count)
        except Overloaded:
            self.rest.plane.count_refusal(prepared, "unread_bytes")
            raise

    def _site(self) -> str:
        client = self.request.client
        return site_of(client.host) if client is not None else "unknown"

    async def while_connected(self, work: Coroutine[Any, Any, T]) -> T:
        """Await `work`, and cancel it if the client disconnects. Receive the body before.

        Raises:
            RequestCancelled: The client left.
            BaseException: What `work` raises.
        """
        task = asyncio.create_task(work)
        gone = asyncio.create_task(self._gone())
        try:
            await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise RequestCancelled
        finally:
            gone.cancel()
            if not task.done():
                task.cancel()
                await asyncio.wait((task,))

    async def _gone(self) -> None:
        while (await self.request.receive())["type"] != "http.disconnect":
            pass

    def release(self) -> None:
        """Give back what the request holds."""
        for end in self._ended:
            end()
        self._ended.clear()


@cache
def decoder_of(kind: Any) -> msgspec.json.Decoder[Any]:
    """Return the decoder of a type."""
    return msgspec.json.Decoder(kind)


class Served:
    """An endpoint as an ASGI application, with the boundary of failures. Event loop only."""

    def __init__(self, endpoint: Endpoint, rest: Rest) -> None:
        self._endpoint = endpoint
        self._rest = rest
        self._requests = rest.metrics.counter(HTTP_REQUESTS)
        self._seconds = rest.metrics.histogram(HTTP_SECONDS).labels(endpoint.path)
        self._refusals = rest.metrics.histogram(REFUSAL_SECONDS).labels()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        began = self._rest.clock.now()
        request = HttpRequest(scope, receive)
        sent = request.headers.get(REQUEST_ID, "")
        request_id = sent if is_request_id(sent) else f"{_PROCESS}{next(_NUMBERS):016x}"
        exchange = Exchange(request, self._rest, self._endpoint.path, request_id)
        reply = _Reply(send, scope, self._rest.settings.unread_timeout_s)
        status = 499
        try:
            try:
                if sent and sent != request_id:
                    response = _misnamed(sent, request_id, scope["path"])
                else:
                    response = await self._endpoint.handle(exchange)
                response.headers[REQUEST_ID] = request_id = exchange.request_id
            except Exception as error:  # noqa: BLE001 - the boundary of a request
                request_id = exchange.request_id
                if not isinstance(error, UNLOGGED):
                    log_failure(error, request_id, self._endpoint.path)
                response = response_of(error, request_id, scope["path"])
                free_frames(error)
                if status_of(error) in {429, 503}:
                    self._refusals.observe(self._rest.clock.now() - began)
            status = response.status_code
            await response(scope, receive, reply)
        finally:
            exchange.release()
            self._requests.labels(self._endpoint.path, str(status)).inc()
            self._seconds.observe(self._rest.clock.now() - began)


def _misnamed(sent: str, request_id: str, path: str) -> Response:
    wrong = InvalidRequest.of(REQUEST_ID, f"{sent[:64]!a} is not 1 to 128 printable ASCII characters")
    return response_of(wrong, request_id, path)


class _Reply:
    """Sends an answer in pieces, and ends the connection of a caller that does not read them in time."""

    def __init__(self, send: Send, scope: Scope, timeout_s: float) -> None:
        self._send = send
        self._abort: Callable[[], None] = scope.get("state", {}).get("abort", lambda: None)
        self._timeout_s = timeout_s

    async def __call__(self, message: Message) -> None:
        """Send one message."""
        body = memoryview(message.get("body", b""))
        more = message.get("more_body", False)
        try:
            while len(body) > PIECE_BYTES:
                await self._piece({**message, "body": bytes(body[:PIECE_BYTES]), "more_body": True})
                body = body[PIECE_BYTES:]
            await self._piece({**message, "body": bytes(body), "more_body": more} if "body" in message else message)
        except TimeoutError:
            self._abort()

    async def _piece(self, message: Message) -> None:
        async with asyncio.timeout(self._timeout_s):
            await self._send(message)
