"""One stream's bookkeeping, without input or output: who is under way, joining pieces, and order."""

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
"""What the server gets beyond a request's timeout to say that it has passed."""


@dataclass(frozen=True, slots=True)
class Flow:
    """How many inputs are under way at once, and how many travel in one message.

    Raises:
        InvalidRequest: one of them is below 1, or a message would take more than may be under way.
    """

    max_in_flight: int
    per_message: int

    def __post_init__(self) -> None:
        for name in ("max_in_flight", "per_message"):
            if getattr(self, name) < 1:
                raise InvalidRequest.of(name, f"{getattr(self, name)} is below 1")
        if self.per_message > self.max_in_flight:
            said = f"{self.per_message} exceeds max_in_flight, {self.max_in_flight}"
            raise InvalidRequest.of("per_message", said)


@dataclass(slots=True)
class _Pending:
    """A request under way: the place of its first input among all, how many it has, and the pieces that have come."""

    index: int
    count: int
    pieces: list[bytes] = field(default_factory=list)


class Exchange:
    """The requests of one stream and their answers, each exactly once.

    `open` is called by whoever feeds the stream, `take` by whoever reads it, in another thread: they share `_pending`
    alone, by single operations on a dict, and a request is entered before it is sent.
    """

    def __init__(
        self,
        timeout: float | None,
        *,
        validate_only: bool,
        prefix: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        # Rounded up: a timeout below a millisecond must not become 0, which means none.
        self._timeout_ms = 0 if timeout is None else min(2**32 - 1, max(1, round(timeout * 1000)))
        self._validate_only = validate_only
        self._prefix = prefix or uuid.uuid4().hex
        self._pending: dict[str, _Pending] = {}
        self._opened = 0
        self._clock = clock
        self._opened_at = clock()
        self._reading_since: float | None = None
        self.patience_s = None if timeout is None else timeout + GRACE_S
        """How long the reader waits for any answer while requests are under way; None for ever."""

    @property
    def pending(self) -> int:
        """How many requests are under way."""
        return len(self._pending)

    def open(self, request: wire.InferRequest) -> wire.StreamInferRequest:
        """Names a request and enters it; gives what to send."""
        request.request_id = f"{self._prefix}-{self._opened}"
        count = len(request.sequences)
        self._pending[request.request_id] = _Pending(self._opened, count)
        self._opened += count
        self._opened_at = self._clock()
        return wire.StreamInferRequest(request=request, timeout_ms=self._timeout_ms)

    def reading(self) -> None:
        """The reader waits from now on. While it does other things, answers may lie unread: that is no stall."""
        self._reading_since = self._clock()

    def stalled_in_s(self, patience_s: float) -> float:
        """Seconds until the stream counts as stalled, unless something happens before; 0 or less where it is.

        Each request's timeout is the server's to keep. This is for a server that keeps nothing any more: requests are
        under way, and neither an answer nor a refusal has come for longer than any of them may take.
        """
        since = self._reading_since
        if since is None or not self._pending:
            return patience_s
        return max(since, self._opened_at) + patience_s - self._clock()

    def stalled(self) -> DeadlineExpired:
        """The error for it."""
        said = f"the stream gave no answer for {self.patience_s} s with {len(self._pending)} requests under way"
        return DeadlineExpired(said, code="DEADLINE_EXCEEDED")

    def take(self, message: wire.StreamInferResponse) -> list[StreamAnswer]:
        """Takes what came; gives the answers that are complete with it, one for each input of the request.

        Raises:
            BadAnswer: The answer is nobody's, or its pieces do not follow one another.
        """
        self._reading_since = None
        request_id = message.request_id
        pending = self._pending.get(request_id)
        if pending is None:
            raise bad_answer(f"an answer came for {request_id!r}, which is not under way", request_id)
        outcome = self._outcome(message, pending)
        if outcome is None:
            return []
        del self._pending[request_id]
        outcomes: list[InferenceResult | AttnserveError] = (
            [outcome] * pending.count if isinstance(outcome, AttnserveError) else list(outcome)
        )
        return [StreamAnswer(pending.index + place, request_id, each) for place, each in enumerate(outcomes)]

    def check_done(self) -> None:
        """The server has ended the stream well: then nothing may be under way.

        Raises:
            BadAnswer: Something is.
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
            raise bad_answer("a stream message holds neither answer nor status", message.request_id)
        chunk = message.chunk
        if chunk.index != len(pending.pieces) or chunk.index >= chunk.count:
            said = f"piece {chunk.index} of {chunk.count} came after {len(pending.pieces)} others"
            raise bad_answer(said, message.request_id)
        pending.pieces.append(chunk.data)
        if chunk.index + 1 < chunk.count:
            return None
        try:
            return self._results(wire.InferResponse.FromString(b"".join(pending.pieces)), pending)
        except DecodeError:
            raise bad_answer("the joined pieces are no answer", message.request_id) from None

    def _results(self, response: wire.InferResponse, pending: _Pending) -> list[InferenceResult]:
        return results_of(response, pending.count, validate_only=self._validate_only)


class Ordering:
    """Hands answers on in the order of the inputs, or at once."""

    def __init__(self, *, ordered: bool) -> None:
        self._ordered = ordered
        self._next = 0
        self._waiting: dict[int, StreamAnswer] = {}

    def add(self, answer: StreamAnswer) -> Iterator[StreamAnswer]:
        """The answers whose turn it is now that this one has come."""
        if not self._ordered:
            yield answer
            return
        self._waiting[answer.index] = answer
        while self._next in self._waiting:
            yield self._waiting.pop(self._next)
            self._next += 1
