"""The state of one stream, without input or output: requests in flight, pieces of responses, and order."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

from attnserve.v1 import inference_service_pb2 as wire
from google.protobuf.message import DecodeError

from attnserve_client._results import InferenceResult, StreamAnswer, results_of
from attnserve_client._status import bad_answer, from_status_bytes
from attnserve_client.errors import AttnserveError, DeadlineExpired, InvalidRequest

MAX_IN_FLIGHT: Final = 128
"""Default limit on the unanswered inputs of a stream: enough for full batches, and a bound on memory on both sides."""
GRACE_S: Final = 0.25
"""Seconds after a request's timeout in which the server may still report that it passed."""


@dataclass(frozen=True, slots=True)
class Flow:
    """The limits of a stream.

    Attributes:
        max_in_flight: Most inputs that are taken and not yet answered, at least 1.
        per_message: Inputs in one message, from 1 to `max_in_flight`.

    Raises:
        InvalidRequest: A limit is out of range.
    """

    max_in_flight: int
    per_message: int

    def __post_init__(self) -> None:
        for name in ("max_in_flight", "per_message"):
            if getattr(self, name) < 1:
                raise InvalidRequest.of(name, f"{getattr(self, name)} is below 1")
        if self.per_message > self.max_in_flight:
            problem = f"{self.per_message} exceeds max_in_flight, {self.max_in_flight}; lower one or raise the other"
            raise InvalidRequest.of("per_message", problem)


@dataclass(slots=True)
class _Pending:
    """A request in flight: the index of its first input on the stream, its number of inputs, the received pieces."""

    index: int
    count: int
    pieces: list[bytes] = field(default_factory=list)


class Exchange:
    """Matches the requests of one stream to their answers, each exactly once.

    The feed calls `open`, the reader calls all other methods, from another thread. Both use `_pending` by single
    operations on the dict, and a request is registered before it is sent, so no lock is needed.

    Args:
        timeout: Seconds that each request may take; None for no limit.
        validate_only: Whether the requests only predict sizes, so that responses hold no results.
        prefix: Start of the request ids; None generates one.
        clock: Monotonic clock in seconds.
    """

    def __init__(
        self,
        timeout: float | None,
        *,
        validate_only: bool,
        prefix: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        # At least 1: a timeout below half a millisecond would round to 0, which means no timeout.
        self._timeout_ms = 0 if timeout is None else min(2**32 - 1, max(1, round(timeout * 1000)))
        self._validate_only = validate_only
        self._prefix = prefix or uuid.uuid4().hex
        self._pending: dict[str, _Pending] = {}
        self._opened = 0
        self._clock = clock
        self._opened_at = clock()
        self._reading_since: float | None = None
        self.patience_s = None if timeout is None else timeout + GRACE_S
        """Seconds that the reader waits for any answer while requests are in flight; None for no limit."""

    @property
    def pending(self) -> int:
        """Number of requests in flight."""
        return len(self._pending)

    def open(self, request: wire.InferRequest) -> wire.StreamInferRequest:
        """Set the request's id, register it, and return the message to send."""
        request.request_id = f"{self._prefix}-{self._opened}"
        count = len(request.sequences)
        self._pending[request.request_id] = _Pending(self._opened, count)
        self._opened += count
        self._opened_at = self._clock()
        return wire.StreamInferRequest(request=request, timeout_ms=self._timeout_ms)

    def reading(self) -> None:
        """Start to count the reader's wait. Time between answers in which the reader is busy is no stall."""
        self._reading_since = self._clock()

    def stalled_in_s(self, patience_s: float) -> float:
        """Return the seconds until the stream counts as stalled if nothing arrives; 0 or less for a stalled stream.

        The server enforces the timeout of each request. A stream is stalled when the server has stopped doing so:
        requests are in flight, and neither a result nor an error arrived for longer than any of them may take.
        """
        since = self._reading_since
        if since is None or not self._pending:
            return patience_s
        return max(since, self._opened_at) + patience_s - self._clock()

    def stalled(self) -> DeadlineExpired:
        """Return the error for a stalled stream."""
        problem = f"the stream gave no answer for {self.patience_s} s with {len(self._pending)} requests in flight"
        return DeadlineExpired(problem, code="DEADLINE_EXCEEDED")

    def take(self, message: wire.StreamInferResponse) -> list[StreamAnswer]:
        """Take a received message. Return the answers that it completes: none, or one for each input of its request.

        Raises:
            BadAnswer: The message belongs to no request in flight, or its pieces are out of order.
        """
        self._reading_since = None
        request_id = message.request_id
        pending = self._pending.get(request_id)
        if pending is None:
            raise bad_answer(f"it is for request {request_id!r}, which is not in flight", request_id)
        outcome = self._outcome(message, pending)
        if outcome is None:
            return []
        del self._pending[request_id]
        outcomes: list[InferenceResult | AttnserveError] = (
            [outcome] * pending.count if isinstance(outcome, AttnserveError) else list(outcome)
        )
        return [StreamAnswer(pending.index + place, request_id, each) for place, each in enumerate(outcomes)]

    def check_done(self) -> None:
        """Check that all requests are answered when the server ends the stream.

        Raises:
            BadAnswer: A request is in flight.
        """
        if self._pending:
            raise bad_answer(f"the stream ended with {len(self._pending)} requests unanswered")

    def _outcome(
        self, message: wire.StreamInferResponse, pending: _Pending
    ) -> list[InferenceResult] | AttnserveError | None:
        kind = message.WhichOneof("message")
        if kind == "status":
            return from_status_bytes(message.status, message.request_id)
        if kind == "response":
            return self._results(message.response, pending)
        if kind != "chunk":
            raise bad_answer("a message holds no response, chunk or status", message.request_id)
        chunk = message.chunk
        if chunk.index != len(pending.pieces) or chunk.index >= chunk.count:
            problem = f"chunk {chunk.index} of {chunk.count} arrived after {len(pending.pieces)} others"
            raise bad_answer(problem, message.request_id)
        pending.pieces.append(chunk.data)
        if chunk.index + 1 < chunk.count:
            return None
        try:
            return self._results(wire.InferResponse.FromString(b"".join(pending.pieces)), pending)
        except DecodeError:
            raise bad_answer("its joined chunks are no InferResponse", message.request_id) from None

    def _results(self, response: wire.InferResponse, pending: _Pending) -> list[InferenceResult]:
        return results_of(response, pending.count, validate_only=self._validate_only)


class Ordering:
    """Passes answers on in the order of the inputs, or with `ordered=False` as they arrive."""

    def __init__(self, *, ordered: bool) -> None:
        self._ordered = ordered
        self._next = 0
        self._waiting: dict[int, StreamAnswer] = {}

    def add(self, answer: StreamAnswer) -> Iterator[StreamAnswer]:
        """Take an answer, and yield those that are next in order."""
        if not self._ordered:
            yield answer
            return
        self._waiting[answer.index] = answer
        while self._next in self._waiting:
            yield self._waiting.pop(self._next)
            self._next += 1
