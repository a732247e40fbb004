"""The boundary of every RPC: bytes in and out, failures to statuses, and the counters that dashboards know."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar
from uuid import uuid4

import grpc
from google.protobuf import message
from google.rpc import status_pb2

from attnserve_server.domain.clock import Clock
from attnserve_server.domain.errors import DeadlineExpired, RequestCancelled
from attnserve_server.observability.metrics import RPC_HANDLED, RPC_SECONDS, RPC_STARTED, Metrics
from attnserve_server.transport.dataplane import DEADLINE_SLACK_S, log_failure
from attnserve_server.transport.status import code_of, status_of, trailers_of
from attnserve_server.transport.wire import parse

M = TypeVar("M", bound=message.Message)
Context = grpc.aio.ServicerContext[bytes, bytes]

FOREVER_S: Final = 10 * 365 * 24 * 3600.0
"""A caller without a deadline shows as one of many years."""
QUIET: Final = (RequestCancelled, DeadlineExpired)
"""Errors that are a caller's own choice: counted, and not logged."""


class Failure(Exception):
    """A request that failed after it was named."""

    def __init__(self, request_id: str, error: BaseException) -> None:
        self.request_id, self.error = request_id, error
        super().__init__(str(error))


class RpcMetrics:
    """Counts RPCs under the names that go-grpc-prometheus gave them, for methods that exist only."""

    def __init__(self, metrics: Metrics, clock: Clock) -> None:
        self._metrics = metrics
        self._clock = clock

    def measured(
        self, kind: str, service: str, method: str, call: Callable[[Any, Context], Awaitable[Any]]
    ) -> Callable[[Any, Context], Awaitable[Any]]:
        """`call`, counted. What it raises is turned into a status, told and logged here, once.

        Args:
            kind: `unary`, `server_stream` or `bidi_stream`.
            service: The service's full name.
            method: The method's name.
            call: The handler; it raises errors of the domain, or `Failure` once the request has a name.
        """
        labels = (kind, service, method)
        started = self._metrics.counter(RPC_STARTED).labels(*labels)
        seconds = self._metrics.histogram(RPC_SECONDS).labels(*labels)
        handled = self._metrics.counter(RPC_HANDLED)
        answered = handled.labels(*labels, "OK")

        async def measured_call(request: Any, context: Context) -> Any:
            started.inc()
            begun = self._clock.now()
            code = "CANCELLED"
            try:
                answer = await call(request, context)
                code = "OK"
                return answer  # noqa: TRY300 - the branches below end otherwise
            except asyncio.CancelledError:
                # gRPC cancels the handler both when the caller leaves and when its deadline passes.
                left = remaining_s(context)
                code = "DEADLINE_EXCEEDED" if left is not None and left <= DEADLINE_SLACK_S else "CANCELLED"
                raise
            except grpc.aio.AbortError:
                code = _aborted_with(context)
                raise
            except Exception as error:  # noqa: BLE001 - the boundary of an RPC
                status = _status_of(error, method)
                code = code_of(status).name
                # Where the call has ended on the caller's side there is nobody to tell any more: no fault of anyone.
                with contextlib.suppress(grpc.aio.InternalError):
                    await context.abort(code_of(status), status.message, trailers_of(status))
            finally:
                (answered if code == "OK" else handled.labels(*labels, code)).inc()
                seconds.observe(self._clock.now() - begun)

        return measured_call


def remaining_s(context: Context) -> float | None:
    """Seconds that the caller still waits; None if it set no deadline."""
    # Its declared type leaves out the None that it gives on some versions.
    remaining: float | None = context.time_remaining()
    return None if remaining is None or remaining > FOREVER_S else max(0.0, remaining)


async def send(context: Context, data: bytes) -> bool:
    """Writes one message to a stream; whether the caller was still there to get it."""
    try:
        await context.write(data)
    except grpc.aio.InternalError:
        # The call has ended on the caller's side, and gRPC is about to cancel the handler: no fault of anyone here.
        return False
    return True


def parsed(
    kind: type[M], call: Callable[[M, Context], Awaitable[message.Message | bytes]]
) -> Callable[[bytes, Context], Any]:
    """A handler on bytes: bytes that are no message are INVALID_ARGUMENT here, where gRPC would answer UNKNOWN.

    `call` answers with a message, or with one that is serialised already.
    """

    async def on_bytes(data: bytes, context: Context) -> bytes:
        answer = await call(parse(kind, data), context)
        return answer if isinstance(answer, bytes) else answer.SerializeToString()

    return on_bytes


def _status_of(error: Exception, method: str) -> status_pb2.Status:
    request_id, cause = (error.request_id, error.error) if isinstance(error, Failure) else (uuid4().hex, error)
    if not isinstance(cause, QUIET):
        log_failure(cause, request_id, method)
    return status_of(cause, request_id)


def _aborted_with(context: Context) -> str:
    # gRPC keeps the code as a number once it was aborted with, whatever its declared type says.
    number: Any = context.code()
    return next(code.name for code in grpc.StatusCode if number in (code, code.value[0]))
