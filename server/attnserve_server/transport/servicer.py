"""The RPC handlers: the methods of the inference service on bytes, and the boundary of every RPC.

At the boundary a failure becomes one status, at most one log line, and one count. Streams are in `stream`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import traceback
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count
from typing import Any, Final, TypeVar
from uuid import uuid4

import grpc
from attnserve.v1 import inference_service_pb2
from google.protobuf import message
from google.rpc import status_pb2

from attnserve_server.access.guard import CALLER
from attnserve_server.domain.clock import Clock
from attnserve_server.domain.errors import (
    AttnserveError,
    DeadlineExpired,
    InternalFault,
    PermissionDenied,
    RequestCancelled,
    Unauthenticated,
)
from attnserve_server.observability.logs import Sampler, logger
from attnserve_server.observability.metrics import RPC_HANDLED, RPC_SECONDS, RPC_STARTED, Metrics
from attnserve_server.observability.spec import REFUSAL_SECONDS
from attnserve_server.observability.trace_context import CALL, CallContext, request_id_of_call
from attnserve_server.scheduling.queue import Request
from attnserve_server.transport import gateways
from attnserve_server.transport.dataplane import DataPlane
from attnserve_server.transport.rpc import Context, UnaryCalls, remaining_s, turns_of
from attnserve_server.transport.status import code_of, is_fault, name_of_code, plain, status_of, trailers_of
from attnserve_server.transport.unread import Unread
from attnserve_server.transport.validation import check_request_id
from attnserve_server.transport.wire import ManyFields, Received, receive

_log = logger(__name__)
_refusals = Sampler()

M = TypeVar("M", bound=message.Message)
SERVICE: Final = inference_service_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name
UNLOGGED: Final = (RequestCancelled, DeadlineExpired, Unauthenticated, PermissionDenied)
"""Errors that the caller chose: they are counted, and not logged. The guard logs a sample of those of access."""
QUICK_FIELDS: Final = 4_096
"""Fields of a message of more than 512 KiB that are scanned on the event loop, in about 5 ms. A message with more is
scanned in a thread: the longest legal scan takes 0.2 s."""
_SCANS: Final = ThreadPoolExecutor(max_workers=1, thread_name_prefix="scan")
"""One thread, so that the event loop has its turn every half a millisecond however many such messages come."""
_PROCESS: Final = uuid4().hex[:16]
_NUMBERS: Final = count()
"""Requests without an id are named by the process and a number: a random id for each would cost a system call."""


class InferenceServicer(UnaryCalls):
    """`attnserve.v1.InferenceService`. Event loop only."""

    def __init__(
        self,
        plane: DataPlane,
        stream_infer: Callable[[object, Context], Awaitable[None]],
        clock: Clock,
        call_timeout_s: float,
        unread: Unread,
        max_queue_size: int = 0,
    ) -> None:
        """Store the parts; `stream_infer` serves one stream. `call_timeout_s`: of a call without a deadline."""
        super().__init__(plane, clock, call_timeout_s, unread)
        self._stream_infer = stream_infer
        self._max_queue_size = max_queue_size

    async def _infer(self, data: bytes, context: Context) -> bytes:
        received = await receive_aside(inference_service_pb2.InferRequest, data)
        remaining = remaining_s(context)
        deadline_s = self._clock.now() + (self._call_timeout_s if remaining is None else remaining)
        request_id = received.message.request_id
        if request_id:
            check_request_id(request_id)
        else:
            request_id = request_id_of_call() or f"{_PROCESS}{next(_NUMBERS):016x}"
        plane, caller = self._plane, CALLER.get()
        request = Request(request_id, deadline_s, received.size, turns_of(context, caller))
        try:
            if caller is not None:
                message = received.message
                caller.admit(len(message.sequences), "Infer", attention=message.HasField("attention"))
            prepared = plane.prepare(request, received) or await plane.prepare_large(request, received)
            held = self._hold(context, prepared, prepared.answer_bytes)
            answer = (await plane.run(prepared)).joined()
            if held is not None:
                held.sent()
            return answer  # noqa: TRY300 - the branches below end otherwise
        except Exception as error:
            request.fail(error)
            raise Failure(request_id, error) from error
        except asyncio.CancelledError as error:
            request.fail(error)
            raise

    async def list_models(
        self, _: inference_service_pb2.ListModelsRequest, __: Context
    ) -> inference_service_pb2.ListModelsResponse:
        """Return all models."""
        return inference_service_pb2.ListModelsResponse(models=self._plane.models())

    async def get_model(
        self, request: inference_service_pb2.GetModelRequest, _: Context
    ) -> inference_service_pb2.GetModelResponse:
        """Return one model."""
        return inference_service_pb2.GetModelResponse(model=self._plane.model(request.model, request.version))

    async def get_load(
        self, request: inference_service_pb2.GetLoadRequest, _: Context
    ) -> inference_service_pb2.GetLoadResponse:
        """Return the load of one model or of all."""
        return gateways.loads(self._plane, request, self._max_queue_size)

    async def get_tokenizer(
        self, request: inference_service_pb2.GetTokenizerRequest, _: Context
    ) -> inference_service_pb2.GetTokenizerResponse:
        """Return a piece of a tokenizer file."""
        return gateways.tokenizer_piece(self._plane, request)

    def handlers(self, metrics: RpcMetrics) -> grpc.GenericRpcHandler:
        """Return the service's methods as gRPC handlers on bytes."""
        unary: Mapping[str, Any] = {
            "Infer": self.infer,
            "ListModels": parsed(inference_service_pb2.ListModelsRequest, self.list_models),
            "GetModel": parsed(inference_service_pb2.GetModelRequest, self.get_model),
            "GetLoad": parsed(inference_service_pb2.GetLoadRequest, self.get_load),
            "GetTokenizer": parsed(inference_service_pb2.GetTokenizerRequest, self.get_tokenizer),
        }
        methods: dict[str, Any] = {
            name: grpc.unary_unary_rpc_method_handler(metrics.measured("unary", SERVICE, name, call))
            for name, call in unary.items()
        }
        methods["StreamInfer"] = grpc.stream_stream_rpc_method_handler(
            metrics.measured("bidi_stream", SERVICE, "StreamInfer", self._stream_infer)
        )
        return grpc.method_handlers_generic_handler(SERVICE, methods)


class Failure(Exception):
    """A request that failed after it was named."""

    def __init__(self, request_id: str, error: BaseException) -> None:
        self.request_id, self.error = request_id, error
        super().__init__(str(error))


class RpcMetrics:
    """Counts RPCs under the metric names of go-grpc-prometheus, for existing methods only."""

    def __init__(self, metrics: Metrics, clock: Clock) -> None:
        self._metrics = metrics
        self._clock = clock

    def measured(
        self, kind: str, service: str, method: str, call: Callable[[Any, Context], Awaitable[Any]]
    ) -> Callable[[Any, Context], Awaitable[Any]]:
        """Return `call` with counters; what it raises is logged, and ends the RPC with a status.

        Args:
            kind: `unary`, `server_stream` or `bidi_stream`.
            service: the service's full name.
            method: the method's name.
            call: the handler; it raises errors of the domain, or `Failure` once the request has a name.
        """
        labels = (kind, service, method)
        started = self._metrics.counter(RPC_STARTED).labels(*labels)
        seconds = self._metrics.histogram(RPC_SECONDS).labels(*labels)
        handled = self._metrics.counter(RPC_HANDLED)
        answered = handled.labels(*labels, "OK")
        refusals = self._metrics.histogram(REFUSAL_SECONDS).labels()
        streams = kind == "bidi_stream"

        async def measured_call(request: Any, context: Context) -> Any:
            started.inc()
            begun = self._clock.now()
            code = "CANCELLED"
            try:
                sent = CALL.get()
                if sent is not None or streams:
                    await _open(context, sent)
                answer = await call(request, context)
                code = "OK"
                return answer  # noqa: TRY300 - the branches below end otherwise
            except asyncio.CancelledError as error:
                code = name_of_code(error, remaining_s(context))
                raise
            except grpc.aio.AbortError:
                code = aborted_with(context)
                raise
            except Exception as error:  # noqa: BLE001 - the boundary of an RPC
                status = _status_of(error, method)
                code = code_of(status).name
                request = None
                free_frames(error)
                # A call that has ended on the caller's side cannot be aborted, and needs no answer.
                try:
                    await context.abort(code_of(status), status.message, trailers_of(status))
                except grpc.aio.InternalError:
                    pass
                finally:
                    if code in {"RESOURCE_EXHAUSTED", "UNAVAILABLE"}:
                        refusals.observe(self._clock.now() - begun)
            finally:
                (answered if code == "OK" else handled.labels(*labels, code)).inc()
                seconds.observe(self._clock.now() - begun)

        return measured_call


async def _open(context: Context, sent: CallContext | None) -> None:
    """Return to the caller what came with the call.

    A stream always sends it, before any write that may be cancelled: gRPC would count the headers as unsent, send them
    again and hang.
    """
    with contextlib.suppress(grpc.aio.InternalError):  # the call has ended on the caller's side
        await context.send_initial_metadata(() if sent is None else sent.metadata)


async def send(context: Context, data: bytes) -> bool:
    """Write one message to a stream; return False if the call has ended on the caller's side."""
    try:
        await context.write(data)
    except grpc.aio.InternalError:
        return False  # gRPC is about to cancel the handler
    return True


async def receive_aside(kind: type[M], data: bytes) -> Received[M]:
    """Parse a message, as `wire.receive`; in a thread if its scan takes long, so that other calls go on."""
    try:
        return receive(kind, data, QUICK_FIELDS)
    except ManyFields:
        reading = partial(receive, kind, data, aside=True)
        return await asyncio.get_running_loop().run_in_executor(_SCANS, reading)


def parsed(kind: type[M], call: Callable[[M, Context], Awaitable[message.Message]]) -> Callable[[bytes, Context], Any]:
    """Return a handler on bytes, which answers malformed ones with INVALID_ARGUMENT; gRPC would answer UNKNOWN."""

    async def on_bytes(data: bytes, context: Context) -> bytes:
        answer = await call((await receive_aside(kind, data)).message, context)
        return answer.SerializeToString()

    return on_bytes


def log_failure(error: BaseException, request_id: str, method: str) -> None:
    """Log a failed request: at info, or with its traceback if it is an internal error. Call it once a request.

    Refusals of one reason come by the hundred a second under overload, so a sample of them is logged, with the number
    of the others. At level debug, all of them are.
    """
    if is_fault(error):
        # An InternalFault was logged with its traceback where it happened.
        trace = None if isinstance(error, InternalFault) else error
        _log.error("request failed", request_id=plain(request_id), method=method, exc_info=trace)
        return
    root = logging.getLogger()
    if not root.isEnabledFor(logging.INFO):
        return
    reason = error.reason if isinstance(error, AttnserveError) else type(error).__name__
    if root.isEnabledFor(logging.DEBUG) or _refusals.passes(reason):
        named = {"request_id": plain(request_id), "method": method, "reason": reason}
        _log.info("request refused", **named, error=plain(str(error), 512))


def free_frames(error: BaseException) -> None:
    """Free what the frames of a failed call hold, such as its message.

    gRPC keeps an aborted call in a circle of references with its tracebacks, until the garbage collector runs.
    """
    for one in (error, error.__cause__):
        if one is not None:
            traceback.clear_frames(one.__traceback__)


def _status_of(error: Exception, method: str) -> status_pb2.Status:
    request_id, cause = (
        (error.request_id, error.error) if isinstance(error, Failure) else (request_id_of_call() or uuid4().hex, error)
    )
    if not isinstance(cause, UNLOGGED):
        log_failure(cause, request_id, method)
    return status_of(cause, request_id)


def aborted_with(context: Context) -> str:
    """Return the code that a call was aborted with."""
    # After an abort, gRPC holds the code as a number, unlike its declared type.
    number: Any = context.code()
    return next(code.name for code in grpc.StatusCode if number in (code, code.value[0]))
