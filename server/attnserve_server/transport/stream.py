"""StreamInfer: many requests pipelined on one stream, each answered once as it becomes ready. Running is elsewhere."""

from __future__ import annotations

import asyncio
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
from attnserve_server.transport.allowance import Allowance
from attnserve_server.transport.boundary import QUIET, Context, remaining_s, send
from attnserve_server.transport.dataplane import DataPlane, log_failure
from attnserve_server.transport.splice import Splice
from attnserve_server.transport.status import status_of
from attnserve_server.transport.structure import MAX_STRUCTURE_BYTES, Blobs, peek
from attnserve_server.transport.validation import check_request_id, is_request_id
from attnserve_server.transport.wire import parse_in_place, parse_leniently

CHUNK_BYTES: Final = 4 * 2**20 - 65_536
"""Answers of more than this come in pieces: with its envelope each stays below gRPC's default limit of 4 MiB."""


@dataclass(slots=True, eq=False)
class _Flight:
    """One request under way. Event loop only."""

    deadline: float | None
    size: int
    """Bytes that it came in."""
    blobs: Blobs
    task: asyncio.Task[None] | None = None
    reserved_bytes: int = 0
    computing: bool = False
    cancelled: bool = False

    def cancel(self) -> None:
        """Withdraws it, unless its answer is being sent already."""
        if self.task is not None and self.computing and not self.cancelled:
            self.task.cancel()
        self.cancelled = True


class Streams:
    """All open streams. Event loop only."""

    def __init__(self, plane: DataPlane, clock: Clock, settings: Settings) -> None:
        self._plane = plane
        self._clock = clock
        self._settings = settings
        self._open: set[_Stream] = set()
        self._draining = False

    async def stream_infer(self, _: object, context: Context) -> None:
        """Serves one stream until the caller closes its half and has its answers, or the server drains."""
        if self._draining:
            raise NotServing("", "draining")
        stream = _Stream(self._plane, self._clock, self._settings, context)
        self._open.add(stream)
        try:
            await stream.serve()
        finally:
            self._open.discard(stream)

    def drain(self) -> None:
        """Reads no more from any stream: each gets the answers under way and ends with UNAVAILABLE."""
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
        self._deadline = None if remaining is None else clock.now() + remaining
        # Without a slot nothing more is read, and HTTP/2 holds the caller back.
        self._slots = asyncio.Semaphore(settings.max_stream_in_flight)
        # Answers that wait to be read count until they are sent: a caller that does not read holds no more than this.
        self._answers = Allowance(settings.max_stream_answer_bytes)
        self._writing = asyncio.Lock()
        self._flights: dict[str, _Flight] = {}
        self._stop = asyncio.Event()
        self._left = False

    def stop_reading(self) -> None:
        """Ends the stream once what is under way has been answered."""
        self._stop.set()

    async def serve(self) -> None:
        """Reads, runs and answers. Raises what ends the stream itself; the requests under way are withdrawn then."""
        failure: AttnserveError | None = None
        # Before any write that may be cancelled: gRPC would take its headers for unsent, send them again and never end.
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
        """Reads until the caller closes its half (None), or sends what ends the stream (the error)."""
        while True:
            data: Any = await self._context.read()
            if data is grpc.aio.EOF:
                return None
            try:
                await self._take(data, group)
            except AttnserveError as error:
                self._withdraw_all()
                return error

    async def _take(self, data: bytes, group: asyncio.TaskGroup) -> None:
        """Starts what one message asks for, once there is a slot for it.

        Raises:
            InvalidRequest: It cannot be answered by itself, so the stream ends.
        """
        try:
            message, blobs = parse_in_place(inference_service_pb2.StreamInferRequest, data)
        except InvalidRequest as error:
            request_id = _salvaged_id(data)
            if not request_id:
                raise
            await self._refuse(request_id, _within_request(error))
            return
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
            raise InvalidRequest.of("request.request_id", "empty: on a stream every request needs a name")
        check_request_id(request_id)
        if request_id in self._flights:
            await self._refuse(
                request_id, InvalidRequest.of("request_id", f"{request_id!r} is the name of a request under way")
            )
            return
        flight = _Flight(self._deadline_of(message), len(data), blobs)
        began = self._clock.now()
        try:
            async with asyncio.timeout(self._patience_of(flight)):
                await self._slots.acquire()
        except TimeoutError:
            await self._send(request_id, DeadlineExpired(self._clock.now() - began))
            return
        self._flights[request_id] = flight
        flight.task = group.create_task(self._fly(message.request, flight))

    def _deadline_of(self, message: inference_service_pb2.StreamInferRequest) -> float | None:
        """When one request expires: after its own timeout, and no later than the stream."""
        if not message.timeout_ms:
            return self._deadline
        own = self._clock.now() + message.timeout_ms / 1000
        return own if self._deadline is None else min(own, self._deadline)

    def _patience_of(self, flight: _Flight) -> float | None:
        """Seconds until a request expires; None: it never does."""
        return None if flight.deadline is None else max(0.0, flight.deadline - self._clock.now())

    async def _fly(self, request: inference_service_pb2.InferRequest, flight: _Flight) -> None:
        """Runs and answers one request."""
        try:
            answer = await self._answer(request, flight)
            await self._send(request.request_id, answer)
        finally:
            del self._flights[request.request_id]
            self._answers.give(flight.reserved_bytes)
            self._slots.release()

    async def _compute(self, request: inference_service_pb2.InferRequest, flight: _Flight) -> Splice:
        """The plane's answer. Until the request is in the scheduler, which keeps deadlines itself, this keeps it."""
        began = self._clock.now()
        try:
            async with asyncio.timeout(self._patience_of(flight)) as patience:

                async def reserve(count: int) -> None:
                    await self._answers.take(count)
                    flight.reserved_bytes = count
                    patience.reschedule(None)

                return await self._plane.infer(
                    request, request.request_id, flight.deadline, flight.size, flight.blobs, reserve
                )
        except TimeoutError:
            raise DeadlineExpired(self._clock.now() - began) from None

    async def _answer(self, request: inference_service_pb2.InferRequest, flight: _Flight) -> Splice | Exception:
        request_id = request.request_id
        if flight.cancelled:
            return RequestCancelled()
        flight.computing = True
        try:
            return await self._compute(request, flight)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            # The caller's cancellation takes back one request of cancellation; one more comes from the stream's end.
            if task is None or not flight.cancelled or task.uncancel() > 0:
                raise
            return RequestCancelled()
        except Exception as error:  # noqa: BLE001 - the boundary of one request: its neighbours on the stream go on
            if not isinstance(error, QUIET):
                log_failure(error, request_id, "StreamInfer")
            return error
        finally:
            flight.computing = False

    async def _refuse(self, request_id: str, error: AttnserveError) -> None:
        log_failure(error, request_id, "StreamInfer")
        await self._send(request_id, error)

    async def _send(self, request_id: str, answer: Splice | Exception) -> None:
        """Sends an answer, in pieces if it is large; pieces of other answers may come between them."""
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
        """One message; waits while the caller does not read, and keeps the request's slot meanwhile."""
        async with self._writing:
            if not self._left:
                self._left = not await send(self._context, data)

    def _withdraw_all(self) -> None:
        for flight in self._flights.values():
            if flight.task is not None:
                flight.task.cancel()


_RESPONSE: Final = inference_service_pb2.StreamInferResponse.RESPONSE_FIELD_NUMBER
_NAME_OF_REQUEST: Final = (
    inference_service_pb2.StreamInferRequest.REQUEST_FIELD_NUMBER,
    inference_service_pb2.InferRequest.REQUEST_ID_FIELD_NUMBER,
)


def _salvaged_id(data: bytes) -> str:
    """The request id in a message that is too much to build, or whose other strings are no UTF-8; empty if none."""
    if len(data) > MAX_STRUCTURE_BYTES:
        name = peek(data, *_NAME_OF_REQUEST)
    else:
        lenient: Any = parse_leniently(inference_service_pb2.StreamInferRequest, data)
        name = lenient.request.request_id if lenient is not None and lenient.HasField("request") else b""
    request_id = name.decode(errors="replace")
    return request_id if is_request_id(request_id) else ""


def _within_request(error: InvalidRequest) -> InvalidRequest:
    """The error with paths that start at the request, as those of every other fault do."""
    return InvalidRequest(
        *(
            FieldViolation(violation.field.removeprefix("request."), violation.description)
            for violation in error.violations
        )
    )
