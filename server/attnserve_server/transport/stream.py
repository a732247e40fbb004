"""StreamInfer: many requests at once on one stream, each answered once, as soon as its answer is ready.

A request that fails is answered with its status, and the others go on. A message that has no valid request id, and the
drain of the server, end the stream with an error.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from typing import Any, Final

import grpc
from attnserve.v1 import inference_service_pb2

from attnserve_server.config import Settings
from attnserve_server.domain.clock import Clock
from attnserve_server.domain.errors import (
    AttnserveError,
    DeadlineExpired,
    FieldViolation,
    InvalidRequest,
    NotServing,
    RequestCancelled,
)
from attnserve_server.scheduling.queue import Request
from attnserve_server.transport.dataplane import DataPlane
from attnserve_server.transport.servicer import UNLOGGED, Context, log_failure, remaining_s, send
from attnserve_server.transport.status import status_of
from attnserve_server.transport.validation import check_request_id, is_request_id
from attnserve_server.transport.wire import NotAMessage, Received, Splice, find_field, receive

CHUNK_BYTES: Final = 4 * 2**20 - 65_536
"""Larger answers are sent in chunks: with its envelope, a chunk stays below gRPC's default limit of 4 MiB."""
_RESPONSE: Final = inference_service_pb2.StreamInferResponse.RESPONSE_FIELD_NUMBER
_REQUEST_ID: Final = (
    inference_service_pb2.StreamInferRequest.REQUEST_FIELD_NUMBER,
    inference_service_pb2.InferRequest.REQUEST_ID_FIELD_NUMBER,
)


class Allowance:
    """At most `limit` bytes at a time, granted in order: bounds the answers held for a slow reader. Event loop only."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._taken = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def take(self, count: int) -> None:
        """Wait for `count` bytes. More than the limit is granted once nothing else is taken."""
        if not self._waiting and self._fits(count):
            self._taken += count
            return
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((count, granted))
        try:
            await granted
        except asyncio.CancelledError:
            # Granted and cancelled in the same turn of the loop: give the bytes back. Otherwise let the next ones
            # go on, which may fit where this one did not.
            self.give(0 if granted.cancelled() else count)
            raise

    def give(self, count: int) -> None:
        """Give bytes back, and grant what fits to those that wait."""
        self._taken -= count
        while self._waiting:
            wanted, granted = self._waiting[0]
            if not granted.done():
                if not self._fits(wanted):
                    return
                self._taken += wanted
                granted.set_result(None)
            self._waiting.popleft()

    def _fits(self, count: int) -> bool:
        return self._taken == 0 or self._taken + count <= self._limit


@dataclass(slots=True, eq=False)
class _Flight:
    """One unanswered request on a stream. Event loop only."""

    request: Request
    received: Received[inference_service_pb2.InferRequest]
    task: asyncio.Task[None] | None = None
    preparing: asyncio.Timeout | None = None
    """Its deadline while it is validated and waits for its allowance."""
    reserved_bytes: int = 0

    def cancel(self) -> None:
        """Fail the request, unless it has ended: then its answer is being sent."""
        failed = self.request.fail(RequestCancelled())
        if failed and self.preparing is not None and not self.preparing.expired():
            self.preparing.reschedule(0)  # in the past: ends the wait now


class Streams:
    """All open streams. Event loop only."""

    def __init__(self, plane: DataPlane, clock: Clock, settings: Settings) -> None:
        self._plane = plane
        self._clock = clock
        self._settings = settings
        self._open: set[_Stream] = set()
        self._draining = False

    async def stream_infer(self, _: object, context: Context) -> None:
        """Serve one stream until the caller closes its half and has its answers, or the server drains.

        Raises:
            NotServing: The server drains.
            InvalidRequest: A message cannot be answered, because it has no valid request id.
            ExceptionGroup: A task of the stream failed with another error, which is internal.
        """
        if self._draining:
            raise NotServing("", "draining")
        stream = _Stream(self._plane, self._clock, self._settings, context)
        self._open.add(stream)
        try:
            await stream.serve()
        finally:
            self._open.discard(stream)

    def drain(self) -> None:
        """Stop reading from all streams: each answers its requests and ends with UNAVAILABLE."""
        self._draining = True
        for stream in self._open:
            stream.stop_reading()


class _Stream:
    """One stream: a reader, a task for each request, and one writer at a time."""

    def __init__(self, plane: DataPlane, clock: Clock, settings: Settings, context: Context) -> None:
        self._plane = plane
        self._clock = clock
        self._context = context
        remaining = remaining_s(context)
        self._deadline_s = None if remaining is None else clock.now() + remaining
        # Without a free slot nothing is read, and HTTP/2 flow control holds the caller back.
        self._slots = asyncio.Semaphore(settings.max_stream_in_flight)
        # Answers count until they are sent: a caller that does not read makes the server hold no more than this.
        self._answers = Allowance(settings.max_stream_answer_bytes)
        self._writing = asyncio.Lock()
        self._flights: dict[str, _Flight] = {}
        self._stop = asyncio.Event()
        self._left = False

    def stop_reading(self) -> None:
        """End the stream once its requests have been answered."""
        self._stop.set()

    async def serve(self) -> None:
        """Read, run and answer requests. Raises the error that ends the stream, after cancelling all requests."""
        failure: AttnserveError | None = None
        # Sent before any write that may be cancelled: gRPC would count the headers as unsent, send them again and hang.
        await self._context.send_initial_metadata(())
        async with asyncio.TaskGroup() as group:
            reading = group.create_task(self._read_all(group))
            stopping = group.create_task(self._stop.wait())
            await asyncio.wait((reading, stopping), return_when=asyncio.FIRST_COMPLETED)
            stopping.cancel()
            if reading.done():
                failure = reading.result()
            else:
                reading.cancel()
                failure = NotServing("", "draining")
        if failure is not None:
            raise failure

    async def _read_all(self, group: asyncio.TaskGroup) -> AttnserveError | None:
        """Read until the caller closes its half, and return None, or until an error ends the stream; return that."""
        while True:
            data: Any = await self._context.read()
            if data is grpc.aio.EOF:
                return None
            try:
                await self._take(data, group)
            except AttnserveError as error:
                for flight in self._flights.values():
                    if flight.task is not None:
                        flight.task.cancel()
                return error

    async def _take(self, data: bytes, group: asyncio.TaskGroup) -> None:
        """Start the request in one message, once there is a slot for it, or cancel one.

        Raises:
            InvalidRequest: The message has no request id to answer it by, so the stream ends.
        """
        try:
            received = receive(inference_service_pb2.StreamInferRequest, data)
        except NotAMessage:
            raise
        except InvalidRequest as error:
            request_id = find_field(data, *_REQUEST_ID).decode(errors="replace")
            if not is_request_id(request_id):
                raise
            await self._refuse(request_id, _within_request(error))
            return
        message = received.message
        kind = message.WhichOneof("message")
        if kind == "cancel_request_id":
            flight = self._flights.get(message.cancel_request_id)
            if flight is not None:
                flight.cancel()
            return
        if kind is None:
            raise InvalidRequest.of("message", "neither request nor cancel_request_id is set")
        request_id = message.request.request_id
        if not request_id:
            raise InvalidRequest.of("request.request_id", "empty: on a stream every request needs an id")
        check_request_id(request_id)
        if request_id in self._flights:
            await self._refuse(
                request_id, InvalidRequest.of("request_id", f"{request_id!r} is the id of an unanswered request")
            )
            return
        request = Request(request_id, self._deadline_of(message), received.size)
        began = self._clock.now()
        try:
            async with asyncio.timeout(self._time_left(request)):
                await self._slots.acquire()
        except TimeoutError:
            await self._send(request_id, DeadlineExpired(self._clock.now() - began))
            return
        flight = self._flights[request_id] = _Flight(request, received.part(message.request))
        flight.task = group.create_task(self._fly(flight))

    def _deadline_of(self, message: inference_service_pb2.StreamInferRequest) -> float | None:
        """Return when one request expires: after its own timeout, and no later than the stream."""
        if not message.timeout_ms:
            return self._deadline_s
        own = self._clock.now() + message.timeout_ms / 1000
        return own if self._deadline_s is None else min(own, self._deadline_s)

    def _time_left(self, request: Request) -> float | None:
        """Return the seconds until a request expires; None: it never does."""
        return None if request.deadline_s is None else max(0.0, request.deadline_s - self._clock.now())

    async def _fly(self, flight: _Flight) -> None:
        """Run and answer one request."""
        request_id = flight.request.request_id
        try:
            answer = await self._answer(flight)
            await self._send(request_id, answer)
        finally:
            del self._flights[request_id]
            self._answers.give(flight.reserved_bytes)
            self._slots.release()

    async def _answer(self, flight: _Flight) -> Splice | Exception:
        """Return the answer, or the error that the request failed with. Raises only if the stream is cancelled."""
        request = flight.request
        if request.ended:
            return RequestCancelled()
        try:
            with request:
                return await self._compute(flight)
        except Exception as error:  # noqa: BLE001 - the boundary of one request: others on the stream go on
            if not isinstance(error, UNLOGGED):
                log_failure(error, request.request_id, "StreamInfer")
            return error

    async def _compute(self, flight: _Flight) -> Splice:
        """Prepare the request, take its allowance and run it. The scheduler keeps its deadline from `run` on."""
        request = flight.request
        began = self._clock.now()
        try:
            async with asyncio.timeout(self._time_left(request)) as flight.preparing:
                prepared = await self._plane.prepare(request, flight.received)
                if not prepared.validate_only:
                    try:
                        await self._answers.take(prepared.answer_bytes)
                    except asyncio.CancelledError:
                        self._plane.withdraw(prepared)
                        raise
                    flight.reserved_bytes = prepared.answer_bytes
        except TimeoutError:
            error = RequestCancelled() if request.ended else DeadlineExpired(self._clock.now() - began)
            raise error from None
        finally:
            flight.preparing = None
        return await self._plane.run(prepared)

    async def _refuse(self, request_id: str, error: AttnserveError) -> None:
        log_failure(error, request_id, "StreamInfer")
        await self._send(request_id, error)

    async def _send(self, request_id: str, answer: Splice | Exception) -> None:
        """Send an answer, a large one in chunks; chunks of other answers may come between them."""
        envelope = inference_service_pb2.StreamInferResponse(request_id=request_id)
        if isinstance(answer, Exception):
            envelope.status = status_of(answer, request_id).SerializeToString()
            await self._write(envelope.SerializeToString())
        elif answer.size <= CHUNK_BYTES:
            await self._write(Splice(envelope.SerializeToString()).add(_RESPONSE, answer).joined())
        else:
            whole, starts = answer.joined(), range(0, answer.size, CHUNK_BYTES)
            for index, start in enumerate(starts):
                piece = whole[start : start + CHUNK_BYTES]
                envelope.chunk.CopyFrom(inference_service_pb2.ResponseChunk(index=index, count=len(starts), data=piece))
                await self._write(envelope.SerializeToString())

    async def _write(self, data: bytes) -> None:
        """Write one message; while the caller does not read this waits, and the request keeps its slot."""
        async with self._writing:
            if not self._left:
                self._left = not await send(self._context, data)


def _within_request(error: InvalidRequest) -> InvalidRequest:
    """Return the error with field paths that start at the request, as those of all other violations do."""
    violations = (FieldViolation(one.field.removeprefix("request."), one.description) for one in error.violations)
    return InvalidRequest(*violations)
