"""StreamInfer: many requests at once on one stream, each answered once, as soon as its answer is ready.

A request that fails is answered with its status, and the others go on. A message that has no valid request id, and the
drain of the server, end the stream with an error.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import grpc
from attnserve.v1 import inference_service_pb2

from attnserve_server.access.guard import CALLER
from attnserve_server.config import Settings
from attnserve_server.domain.clock import Clock
from attnserve_server.domain.errors import (
    AttnserveError,
    DeadlineExpired,
    InvalidRequest,
    NotServing,
    RequestCancelled,
)
from attnserve_server.domain.values import SequenceResult
from attnserve_server.scheduling.queue import Request
from attnserve_server.transport.allowance import Allowance
from attnserve_server.transport.codec import streamed
from attnserve_server.transport.dataplane import DataPlane
from attnserve_server.transport.prepared import Prepared, response_of
from attnserve_server.transport.rpc import Context, remaining_s, turns_of
from attnserve_server.transport.servicer import UNLOGGED, log_failure, receive_aside, send
from attnserve_server.transport.status import status_of
from attnserve_server.transport.unread import Held
from attnserve_server.transport.validation import check_request_id, is_request_id
from attnserve_server.transport.wire import NotAMessage, Received, Splice, find_field

_REQUEST_ID: Final = (
    inference_service_pb2.StreamInferRequest.REQUEST_FIELD_NUMBER,
    inference_service_pb2.InferRequest.REQUEST_ID_FIELD_NUMBER,
)


@dataclass(slots=True, eq=False)
class _Flight:
    """One unanswered request on a stream. Event loop only."""

    request: Request
    received: Received[inference_service_pb2.InferRequest]
    pending: asyncio.Future[Any] | None = None
    """Its results, or the task that prepares it; cancelled if the stream ends before."""
    preparing: asyncio.Timeout | None = None
    """Its deadline while a task prepares it, or waits for its allowance."""
    reserved_bytes: int = 0

    def cancel(self) -> None:
        """Fail the request, unless it has ended: then its answer is being sent."""
        failed = self.request.fail(RequestCancelled())
        if failed and self.preparing is not None and not self.preparing.expired():
            self.preparing.reschedule(0)  # in the past: ends the wait now


@dataclass(slots=True, eq=False)
class _Outgoing:
    """An answer that is being sent: its messages, how many are left, and its request; None for one refused unread."""

    messages: Iterator[bytes]
    left: int
    flight: _Flight | None


class InferStream:
    """One stream: a reader, a writer, and the unanswered requests between them.

    A request is no task, unless it is large or must wait for its allowance: the reader submits it, and its results go
    to the writer as soon as they are known.
    """

    def __init__(self, plane: DataPlane, clock: Clock, settings: Settings, context: Context, held: Held) -> None:
        self._plane = plane
        self._clock = clock
        self._context = context
        self._caller = CALLER.get()
        self._turns = turns_of(context, self._caller)
        remaining = remaining_s(context)
        self._deadline_s = None if remaining is None else clock.now() + remaining
        self._timeout_s = settings.call_timeout_s
        self._held = held
        # Without a free slot nothing is read, and HTTP/2 flow control holds the caller back.
        self._slots = asyncio.Semaphore(settings.max_stream_in_flight)
        # Answers count until they are sent, which bounds what a caller that does not read makes the server hold.
        self._answers = Allowance(settings.max_stream_answer_bytes, held)
        self._flights: dict[str, _Flight] = {}
        self._outbox: deque[_Outgoing] = deque()
        self._filled = asyncio.Event()
        self._read_all = False
        self._stop = asyncio.Event()
        self._left = False

    def stop_reading(self) -> None:
        """End the stream once its requests have been answered."""
        self._stop.set()

    async def serve(self) -> None:
        """Read, run and answer requests. Raises the error that ends the stream, after cancelling all requests."""
        failure: AttnserveError | None = None
        try:
            async with asyncio.TaskGroup() as group:
                writing = group.create_task(self._write_all())
                reading = group.create_task(self._read(group))
                stopping = group.create_task(self._stop.wait())
                await asyncio.wait((reading, stopping), return_when=asyncio.FIRST_COMPLETED)
                stopping.cancel()
                if reading.done():
                    failure = reading.result()
                else:
                    reading.cancel()
                    failure = NotServing("", "draining")
                if reading.done() and failure is not None:
                    writing.cancel()
                    self._cancel_all()
                self._read_all = True
                self._filled.set()
        finally:
            self._cancel_all()
        if failure is not None:
            raise failure

    def _cancel_all(self) -> None:
        for flight in self._flights.values():
            if flight.pending is not None:
                flight.pending.cancel()

    async def _read(self, group: asyncio.TaskGroup) -> AttnserveError | None:
        """Read until the caller closes its half, and return None, or until an error ends the stream; return that."""
        while True:
            data: Any = await self._context.read()
            if data is grpc.aio.EOF:
                return None
            try:
                await self._take(data, group)
            except AttnserveError as error:
                return error

    async def _take(self, data: bytes, group: asyncio.TaskGroup) -> None:
        """Start the request in one message, once there is a slot for it, or cancel one.

        Raises:
            InvalidRequest: The message has no request id to answer it by, so the stream ends.
        """
        try:
            received = await receive_aside(inference_service_pb2.StreamInferRequest, data)
        except NotAMessage:
            raise
        except InvalidRequest as error:
            request_id = find_field(data, *_REQUEST_ID).decode(errors="replace")
            if not is_request_id(request_id):
                raise
            self._refuse(request_id, error.relative_to("request."))
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
            self._refuse(
                request_id, InvalidRequest.of("request_id", f"{request_id!r} is the id of an unanswered request")
            )
            return
        request = Request(request_id, self._deadline_of(message), received.size, self._turns)
        if await self._slot(request):
            flight = self._flights[request_id] = _Flight(request, received.part(message.request))
            self._begin(flight, group)

    async def _slot(self, request: Request) -> bool:
        """Take a slot for a request; if its deadline passes before, answer it and return False."""
        if not self._slots.locked():
            return await self._slots.acquire()  # at once
        began = self._clock.now()
        try:
            async with asyncio.timeout(self._time_left(request)):
                return await self._slots.acquire()
        except TimeoutError:
            self._post(request.request_id, DeadlineExpired(self._clock.now() - began))
            return False

    def _begin(self, flight: _Flight, group: asyncio.TaskGroup) -> None:
        """Submit a request; in a task if it is large, or must wait for its allowance."""
        try:
            if self._caller is not None:
                asked = flight.received.message
                self._caller.admit(len(asked.sequences), "StreamInfer", attention=asked.HasField("attention"))
            prepared = self._plane.prepare(flight.request, flight.received)
            if prepared is not None and self._answers.take_now(prepared.answer_bytes):
                flight.reserved_bytes = prepared.answer_bytes
                self._start(flight, prepared)
                return
        except Exception as error:  # noqa: BLE001 - the boundary of one request: others on the stream go on
            self._land(flight, error)
            return
        flight.pending = group.create_task(self._wait(flight, prepared))

    async def _wait(self, flight: _Flight, prepared: Prepared | None) -> None:
        """Prepare a large request, wait for its allowance, and submit it.

        The scheduler keeps its deadline from then on.
        """
        request = flight.request
        began = self._clock.now()
        try:
            async with asyncio.timeout(self._time_left(request)) as flight.preparing:
                prepared = prepared or await self._plane.prepare_large(request, flight.received)
                try:
                    await self._answers.take(prepared.answer_bytes)
                except asyncio.CancelledError:
                    self._plane.withdraw(prepared)
                    raise
                flight.reserved_bytes = prepared.answer_bytes
            flight.preparing = None
            self._start(flight, prepared)
        except TimeoutError:
            self._land(flight, RequestCancelled() if request.ended else DeadlineExpired(self._clock.now() - began))
        except Exception as error:  # noqa: BLE001 - the boundary of one request: others on the stream go on
            self._land(flight, error)
        finally:
            flight.preparing = None

    def _start(self, flight: _Flight, prepared: Prepared) -> None:
        started = flight.pending = self._plane.start(prepared)
        started.add_done_callback(partial(self._ended, flight, prepared))

    def _ended(self, flight: _Flight, prepared: Prepared, results: asyncio.Future[list[SequenceResult]]) -> None:
        """Answer a request whose results, or whose error, are known."""
        error = asyncio.CancelledError() if results.cancelled() else results.exception()
        if error is not None:
            self._plane.count_failure(prepared.served, flight.request, error)
            self._land(flight, RequestCancelled() if results.cancelled() else error)
            return
        try:
            self._land(flight, self._plane.answer(prepared, results.result(), response_of))
        except Exception as fault:  # noqa: BLE001 - the boundary of one request: others on the stream go on
            self._land(flight, fault)

    def _land(self, flight: _Flight, answer: Splice | BaseException) -> None:
        """Give an answer to the writer; the request keeps its slot until it is sent."""
        request = flight.request
        if isinstance(answer, BaseException):
            request.fail(answer)
            if not isinstance(answer, UNLOGGED):
                log_failure(answer, request.request_id, "StreamInfer")
        self._post(request.request_id, answer, flight)

    def _post(self, request_id: str, answer: Splice | BaseException, flight: _Flight | None = None) -> None:
        if isinstance(answer, BaseException):
            messages, count = streamed(request_id, status_of(answer, request_id).SerializeToString())
        else:
            messages, count = streamed(request_id, answer)
        self._outbox.append(_Outgoing(messages, count, flight))
        self._filled.set()

    async def _write_all(self) -> None:
        """Write answers as they come, a large one in chunks, with other answers between them."""
        outbox = self._outbox
        while outbox or self._flights or not self._read_all:
            if not outbox:
                self._filled.clear()
                await self._filled.wait()
                continue
            going = outbox.popleft()
            message = next(going.messages)
            going.left -= 1
            flight = going.flight
            if not going.left and flight is not None:
                # Before it is sent: the caller may use the id again as soon as it has the answer.
                del self._flights[flight.request.request_id]
            if not self._left:
                self._held.sent()
                self._left = not await send(self._context, message)
                self._held.taken()
            if going.left:
                outbox.append(going)
            elif flight is not None:
                self._answers.give(flight.reserved_bytes)
                self._slots.release()

    def _deadline_of(self, message: inference_service_pb2.StreamInferRequest) -> float:
        """Return when one request expires: after its own timeout, and no later than the stream."""
        if self._deadline_s is not None and not message.timeout_ms:
            return self._deadline_s
        own = self._clock.now() + (message.timeout_ms / 1000 or self._timeout_s)
        return own if self._deadline_s is None else min(own, self._deadline_s)

    def _time_left(self, request: Request) -> float | None:
        return None if request.deadline_s is None else max(0.0, request.deadline_s - self._clock.now())

    def _refuse(self, request_id: str, error: AttnserveError) -> None:
        log_failure(error, request_id, "StreamInfer")
        self._post(request_id, error)
