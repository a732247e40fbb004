"""ModelStreamInfer: many requests on one stream, run at once and answered in their order.

A request that fails is answered with `error_message`, and the stream stays open: also for a message that is malformed.
Only the drain of the server, and the end of the call, end it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

import grpc
from attnserve.oip import open_inference_pb2 as oip

from attnserve_server.access.guard import CALLER
from attnserve_server.config import Settings
from attnserve_server.domain.clock import Clock
from attnserve_server.domain.errors import AttnserveError, DeadlineExpired, NotServing
from attnserve_server.scheduling.queue import Request
from attnserve_server.transport.allowance import Allowance
from attnserve_server.transport.dataplane import DataPlane
from attnserve_server.transport.oip import calls
from attnserve_server.transport.oip.messages import encoded, failed, streamed, wanted_of
from attnserve_server.transport.oip.servicer import STREAM
from attnserve_server.transport.oip.usual import usual_of
from attnserve_server.transport.rpc import Context, remaining_s, turns_of
from attnserve_server.transport.servicer import UNLOGGED, log_failure, receive_aside, send
from attnserve_server.transport.status import code_of, status_of
from attnserve_server.transport.timings import Clocked
from attnserve_server.transport.unread import Held
from attnserve_server.transport.validation import check_request_id, is_request_id
from attnserve_server.transport.wire import find_field


class OipStream:
    """One stream: a reader, a task for each request, and a writer that awaits them in order."""

    def __init__(self, plane: DataPlane, clock: Clock, settings: Settings, context: Context, held: Held) -> None:
        self._stop = asyncio.Event()
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
        self._answers = Allowance(settings.max_stream_answer_bytes, held)
        self._pending: deque[asyncio.Task[tuple[bytes, int]]] = deque()
        self._filled = asyncio.Event()
        self._read_all = False

    def stop_reading(self) -> None:
        """End the stream once its requests have been answered."""
        self._stop.set()

    async def serve(self) -> None:
        """Read, run and answer requests. Raises NotServing if the server drains."""
        async with asyncio.TaskGroup() as group:
            writing = group.create_task(self._write_all())
            reading = group.create_task(self._read(group))
            stopping = group.create_task(self._stop.wait())
            await asyncio.wait((reading, stopping), return_when=asyncio.FIRST_COMPLETED)
            stopped = not reading.done()
            reading.cancel()
            stopping.cancel()
            self._read_all = True
            self._filled.set()
            await asyncio.wait((writing,))
        if stopped:
            raise NotServing("", "draining")

    async def _read(self, group: asyncio.TaskGroup) -> None:
        while True:
            await self._slots.acquire()
            data: Any = await self._context.read()
            if data is grpc.aio.EOF:
                return
            self._pending.append(group.create_task(self._answer(data)))
            self._filled.set()

    async def _answer(self, data: bytes) -> tuple[bytes, int]:
        """Return the answer to one message, and the bytes that it took of the allowance."""
        request = Request("", self._deadline(), len(data), self._turns)
        own_id = ""
        taken = 0
        try:
            received = await receive_aside(oip.ModelInferRequest, data)
            own_id = received.message.id
            if own_id:
                check_request_id(own_id)
            request.request_id = own_id or calls.new_id()
            wanted = usual_of(received) or wanted_of(received)
            if wanted.parameters.timeout_s is not None:
                limit = self._clock.now() + wanted.parameters.timeout_s
                request.deadline_s = limit if request.deadline_s is None else min(limit, request.deadline_s)
            name, version = received.message.model_name, received.message.model_version
            call = await calls.prepare(self._plane, request, self._caller, wanted, name, version, STREAM)
            taken = await self._reserve(call, request)

            def encode(model: str, version: str, outputs: list[Any], timings: Clocked) -> bytes:
                return streamed(encoded(model, version, own_id, outputs, timings, final=wanted.parameters.final))

            return await call.run(encode), taken
        except asyncio.CancelledError as error:
            request.fail(error)
            raise
        except Exception as error:  # noqa: BLE001 - the boundary of one request: others on the stream go on
            request.fail(error)
            return _failed(error, request, own_id or find_id(data)), taken

    async def _reserve(self, call: calls.Call, request: Request) -> int:
        """Wait until there is room for an answer, at most until the request expires. Raises DeadlineExpired."""
        if not self._answers.take_now(call.bytes):
            began = self._clock.now()
            try:
                left_s = None if request.deadline_s is None else max(0.0, request.deadline_s - began)
                async with asyncio.timeout(left_s):
                    await self._answers.take(call.bytes)
            except (TimeoutError, asyncio.CancelledError) as error:
                self._plane.withdraw(call.prepared)
                if isinstance(error, TimeoutError):
                    raise DeadlineExpired(self._clock.now() - began) from None
                raise
        return call.bytes

    async def _write_all(self) -> None:
        """Write answers in the order of their requests."""
        while self._pending or not self._read_all:
            if not self._pending:
                self._filled.clear()
                await self._filled.wait()
                continue
            message, taken = await self._pending[0]
            self._pending.popleft()
            self._held.sent()
            await send(self._context, message)
            self._held.taken()
            self._answers.give(taken)
            self._slots.release()

    def _deadline(self) -> float:
        """Return when a request expires: after the limit of a call, and no later than the stream."""
        own = self._clock.now() + self._timeout_s
        return own if self._deadline_s is None else self._deadline_s


def find_id(data: bytes) -> str:
    """Return the id in a message that cannot be read as a whole; empty if it has none that may be repeated."""
    found = find_field(data, oip.ModelInferRequest.ID_FIELD_NUMBER).decode("ascii", errors="replace")
    return found if is_request_id(found) else ""


def _failed(error: Exception, request: Request, own_id: str) -> bytes:
    request_id = request.request_id or own_id or calls.new_id()
    if not isinstance(error, UNLOGGED):
        log_failure(error, request_id, STREAM)
    status = status_of(error, request_id)
    reason = error.reason if isinstance(error, AttnserveError) else "INTERNAL"
    code = code_of(status).name
    facts = {"request_id": request_id, "code": code, "reason": reason}
    return failed(own_id if is_request_id(own_id) else "", f"{code}: {status.message}", facts)
