"""What messages that are being received may take: the largest message, and how many are received at a time.

gRPC reads a message as a whole before code of the server runs, and only calls can be counted, not bytes. So numbers
bound the worst case: messages being received x the largest message, and calls x what HTTP/2 takes of each before it is
read. Both halves of the budget are kept by this module, in front of the handlers of all services.

Calls whose messages do not arrive could take all places. So once half are taken, a message has `ARRIVES_S`, after which
its connection ends. Of the first half Python knows no peer before the message is there.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, Final

import grpc

from attnserve_server.config import Settings
from attnserve_server.config_bounds import MIB
from attnserve_server.domain.errors import AttnserveError, Overloaded
from attnserve_server.domain.machine import memory_bytes
from attnserve_server.model.manifest import NUMPY_DTYPES, Dimension, Manifest
from attnserve_server.transport.oip.servicer import INFER as OIP_INFER
from attnserve_server.transport.oip.servicer import SERVICE as OIP_SERVICE
from attnserve_server.transport.oip.servicer import STREAM as OIP_STREAM
from attnserve_server.transport.rpc import Context
from attnserve_server.transport.servicer import SERVICE, RpcMetrics
from attnserve_server.transport.wire import MAX_STRUCTURE_BYTES

LEAST_MESSAGE: Final = 2 * MIB
"""Least limit of a message, so that most requests that are too large are refused with the field and its limit."""
WINDOW_BYTES: Final = 65_536
"""Bytes of a call that arrive before its message is read. Source: RFC 9113, section 6.9.2."""
ARRIVES_S: Final = 20.0
"""Seconds that a message may take to arrive once half of the places are taken."""
_SHARE: Final = 4
_BODIES_SHARE: Final = 2
"""Bodies of HTTP requests get this part of what calls get, whose number is large in any case."""
_RETRY_S: Final = 0.5
Follow = Callable[[Callable[[], Any], Callable[[Any], None]], None]
INFER: Final = f"/{SERVICE}/Infer"
STREAM: Final = f"/{SERVICE}/StreamInfer"
UNARY: Final = ((SERVICE, "Infer"), (OIP_SERVICE, OIP_INFER))
STREAMS: Final = ((SERVICE, "StreamInfer"), (OIP_SERVICE, OIP_STREAM))
"""Service and name of the methods that run models."""


class ReceiveBudgetTooSmall(AttnserveError):
    """The largest message does not fit into the budget of received messages."""

    reason = "RECEIVE_BUDGET_TOO_SMALL"

    def __init__(self, budget: int, limit: int, model: str) -> None:
        super().__init__(
            f"--receive-budget-bytes is {budget}, and holds fewer than two messages of {limit} bytes, the largest "
            f"request of model {model!r}; raise it to at least {4 * limit}, or lower --max-request-bytes, "
            "--max-batch-size or --max-text-bytes"
        )


def largest_request(manifest: Manifest, settings: Settings, max_request_size: int = 0) -> int:
    """Return the bytes of the largest legal request of a model, as an upper bound.

    Args:
        manifest: of the model.
        settings: `max_text_bytes` and `max_batch_size` bound requests too.
        max_request_size: sequences of one request, if other than the manifest's `max_batch_size`; 0: that.
    """
    longest = {axis.symbol: axis.max_length for axis in manifest.axes}

    def size(shape: Sequence[Dimension]) -> int:
        return prod(longest.get(one, 1) if isinstance(one, str) else one for one in shape)

    specs: list[Any] = [*manifest.inputs]
    if manifest.continuing is not None:
        specs = [*manifest.continuing.inputs]
        longest |= {axis.symbol: axis.max_length for axis in manifest.continuing.axes}
    tensors = sum(size(spec.shape) * NUMPY_DTYPES[spec.dtype].itemsize for spec in specs)
    # A sequence may have two texts, and tensors beside them.
    texts = 0 if manifest.text is None else 2 * settings.max_text_bytes
    most = max_request_size or manifest.max_batch_size
    return min(settings.max_batch_size or most, most) * (tensors + texts) + MAX_STRUCTURE_BYTES


@dataclass(frozen=True, slots=True)
class ReceiveBounds:
    """The bounds of one process that serves gRPC.

    `message`: bytes of the largest message; `messages`: received at a time; `streams`: open at a time; `calls`: of all
    methods that run a model. `bodies`: bytes of memory for bodies of HTTP requests at a time.
    """

    message: int
    messages: int
    streams: int
    calls: int
    bodies: int = MIB
    most: int = 2**31 - 1
    """`max_request_bytes`."""

    @property
    def body(self) -> int:
        """Bytes of the longest body: twice a message, because base64 and most numbers take more room in JSON."""
        return min(self.most, 2 * self.message)

    @classmethod
    def of(cls, settings: Settings, manifests: Iterable[tuple[Manifest, int]], processes: int = 1) -> ReceiveBounds:
        """Derive the bounds.

        Args:
            settings: of the server.
            manifests: of the models, each with its most sequences of one request; 0: as the manifest states.
            processes: that share the budget.

        Raises:
            ReceiveBudgetTooSmall: the budget does not hold two messages for each process.
        """
        sizes = {one.name: largest_request(one, settings, most) for one, most in manifests}
        model = max(sizes, key=lambda name: sizes[name], default="")
        message = min(settings.max_request_bytes, max(LEAST_MESSAGE, sizes.get(model, 0)))
        budget = settings.receive_budget_bytes or memory_bytes() // _SHARE
        half = budget // 2 // processes
        messages = half // message
        if messages < 2:
            raise ReceiveBudgetTooSmall(budget, message * processes, model)
        bodies = half // _BODIES_SHARE
        calls = (half - bodies) // WINDOW_BYTES
        return cls(message, messages, max(1, messages * 3 // 4), calls, bodies, settings.max_request_bytes)

    def why_too_large(self, manifest: Manifest, settings: Settings, max_request_size: int = 0) -> str:
        """Return why a model that is loaded later cannot be served with these bounds; empty if it can."""
        needed = min(settings.max_request_bytes, largest_request(manifest, settings, max_request_size))
        if needed <= self.message:
            return ""
        return (
            f"requests of model {manifest.name!r} may have {needed} bytes, and this server has accepted messages of at "
            f"most {self.message} since its start; restart it with this model, or convert it with a smaller batch"
        )


class BoundedHandlers(grpc.GenericRpcHandler):
    """Serves the methods of `inner` within the bounds. Event loop only.

    A call beyond `calls`, and a stream beyond `streams`, is refused before its message is read. A unary call beyond
    half of `messages` has `ARRIVES_S` for its message, and one beyond all of them waits, in order, before it is read.
    """

    def __init__(
        self,
        bounds: ReceiveBounds,
        inner: Sequence[grpc.GenericRpcHandler],
        metrics: RpcMetrics,
        follow: Sequence[Follow],
        drop: Callable[[str, str], object],
    ) -> None:
        """Store the parts.

        Args:
            bounds: of this process.
            inner: the handlers.
            metrics: of their methods.
            follow: of each service; takes two functions, which each unary call calls: once it has its message, and with
                what that returned at its end.
            drop: ends the connection of gRPC's name of a peer, for a cause.
        """
        self._drop = drop
        self._bounds = bounds
        self._inner = inner
        self._streams = 0
        # Calls by their tasks. One that ends before its message is there calls nothing, and is swept.
        self._calls: set[asyncio.Task[Any]] = set()
        self._reading: set[asyncio.Task[Any]] = set()
        self._waiting: deque[asyncio.Future[None]] = deque()
        kinds = (("unary", UNARY), ("bidi_stream", STREAMS))
        self._refusals = {
            f"/{service}/{name}": metrics.measured(kind, service, name, _raise)
            for kind, methods in kinds
            for service, name in methods
        }
        self._streaming = {f"/{service}/{name}" for service, name in STREAMS}
        for one in follow:
            one(self._received, self._ended)

    def service(self, handler_call_details: Any) -> Any:
        """Return the handler of a call."""
        handler = next(filter(None, (one.service(handler_call_details) for one in self._inner)), None)
        method = handler_call_details.method
        if handler is None or method not in self._refusals:
            return handler
        bounds = self._bounds
        task: Any = asyncio.current_task()
        if len(self._calls) >= bounds.calls or len(self._reading) >= bounds.messages // 2:
            self._sweep()
            if len(self._calls) >= bounds.calls:
                return self._refused(method, "calls", bounds.calls)
        if method in self._streaming:
            if self._streams >= bounds.streams:
                return self._refused(method, "streams", bounds.streams)
            self._streams += 1
            task.add_done_callback(self._ended_stream)
        elif len(self._reading) < bounds.messages // 2:
            self._reading.add(task)
        else:
            task.add_done_callback(self._ended)
            handler = grpc.stream_stream_rpc_method_handler(partial(self._read_later, handler))
        self._calls.add(task)
        return handler

    def _refused(self, method: str, cause: str, limit: int) -> Any:
        error = Overloaded(cause, limit, limit + 1, _RETRY_S)
        refuse = self._refusals[method]

        async def refused(_: Any, context: Context) -> None:
            await refuse(error, context)

        return grpc.stream_stream_rpc_method_handler(refused)

    async def _read_later(self, handler: Any, _: Any, context: Context) -> None:
        """Read the message of a unary call once there is room, and answer it."""
        if len(self._reading) >= self._bounds.messages:
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            await turn
        task: Any = asyncio.current_task()
        self._reading.add(task)
        if handler.request_streaming:  # it reads by itself
            await handler.stream_stream(None, context)
            return
        try:
            async with asyncio.timeout(ARRIVES_S):
                data: Any = await context.read()
        except TimeoutError:
            self._drop(context.peer(), "unsent")
            return
        if data is not grpc.aio.EOF:
            await context.write(await handler.unary_unary(data, context))

    def _received(self) -> asyncio.Task[Any]:
        """Take the message of the current call as received."""
        task: Any = asyncio.current_task()
        self._free(task)
        return task  # type: ignore[no-any-return] # handlers run in tasks

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._calls.discard(task)
        self._free(task)

    def _ended_stream(self, task: asyncio.Task[Any]) -> None:
        self._calls.discard(task)
        self._streams -= 1

    def _sweep(self) -> None:
        """Forget calls that have ended before their messages were there."""
        for task in [one for one in self._calls if one.done()]:
            self._ended(task)

    def _free(self, task: Any) -> None:
        if task not in self._reading:
            return
        self._reading.discard(task)
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return


async def _raise(error: Exception, _: Context) -> None:
    raise error
