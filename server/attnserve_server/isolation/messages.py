"""What crosses between a front and an engine: requests, results and errors, and their arrays.

An array of up to `INLINE_BYTES` is part of its message, and so is one for which the sender's arena has no room. Any
other is written to the arena once, and its message has the place. The receiver reads it there through views, and
reports with `Released` once no array of a message is in use; then the sender frees it.

An engine decodes what fronts send by declared types (msgspec), so that a front, which reads callers' bytes, could not
make it run other code. A front trusts its engine: maps of attention and errors are pickled, which few answers
have.

A message that is none of these raises msgspec.DecodeError, or ValueError for a place outside of the arena, or that an
array does not fill.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import pickle
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from typing import Annotated, Any, Final, Literal

import msgspec
import numpy as np

from attnserve_server.domain import errors
from attnserve_server.domain.errors import AttnserveError, InternalFault
from attnserve_server.domain.values import (
    Array,
    AxisUnits,
    EffectiveSelection,
    LabelSelection,
    PreparedSequence,
    RunFacts,
    SequenceResult,
)
from attnserve_server.isolation.arena import Arena

INLINE_BYTES: Final = 4096
"""Bytes of the largest array that is part of its message in any case."""

Place = bytes | tuple[int, int]
"""The bytes of an array, or their offset and size in the sender's arena."""
TraceParent = Annotated[str, msgspec.Meta(pattern=r"^00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}\Z")]
TraceState = Annotated[str, msgspec.Meta(max_length=512)]


class ArrayMessage(msgspec.Struct, array_like=True, gc=False):
    """An array: an input or an output by name. Other dtypes than those of tensors are no message."""

    name: str
    dtype: Literal["|b1", "|u1", "|i1", "<i4", "<i8", "<f2", "<f4", "<f8"]
    shape: tuple[Annotated[int, msgspec.Meta(ge=0)], ...]
    place: Place


class Selected(msgspec.Struct, array_like=True):
    """What only requests with attention or labels have."""

    attention: EffectiveSelection | None
    labels: LabelSelection | None
    units: dict[str, AxisUnits]


class SequenceMessage(msgspec.Struct, array_like=True):
    """One sequence, as `PreparedSequence`."""

    tensors: list[ArrayMessage]
    lengths: dict[str, int]
    outputs: tuple[str, ...]
    response_bytes: int
    is_whole_request: bool
    unpadded: bool
    past: int
    selected: Selected | None


class Ask(msgspec.Struct, array_like=True, tag=True):
    """A request. `number` names it on this link; times are monotonic seconds, which all processes share."""

    number: int
    request_id: str
    deadline_s: float | None
    received_bytes: int
    priority: int
    sequences: list[SequenceMessage]
    caller: str = ""
    trace: tuple[TraceParent, TraceState] | None = None


class Withdraw(msgspec.Struct, array_like=True, tag=True, gc=False):
    """The caller has left: the request is cancelled, or expired."""

    number: int
    expired: bool


class Released(msgspec.Struct, array_like=True, tag=True, gc=False):
    """The receiver reads the arrays of these messages no more."""

    numbers: list[int]


class Resent(msgspec.Struct, array_like=True, tag=True, gc=False):
    """The front has sent again all requests that an engine before this one has not answered."""


class ResultMessage(msgspec.Struct, array_like=True):
    """The result of one sequence. `pickled`: its maps and labels, with the places of their arrays."""

    outputs: list[ArrayMessage]
    queue_s: float
    run: tuple[int, int, int, float, int, bool]
    attention_s: float
    pickled: tuple[bytes, list[Place]] | None


class Answer(msgspec.Struct, array_like=True, tag=True):
    """The results of a request."""

    number: int
    results: list[ResultMessage]


class Failed(msgspec.Struct, array_like=True, tag=True):
    """The error of a request: its class in `domain.errors`, its message, and its fields, pickled."""

    number: int
    kind: str
    message: str
    fields: bytes


ENCODER: Final = msgspec.msgpack.Encoder()
TO_ENGINE: Final = msgspec.msgpack.Decoder(Ask | Withdraw | Released | Resent)
TO_FRONT: Final = msgspec.msgpack.Decoder(Answer | Failed | Released)


class Outbox:
    """Encodes what one process sends, and keeps the arena's memory until the receiver has released it.

    The memory of a request is also kept until the request has ended, because it may be sent again, to another engine.
    """

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._held: dict[int, list[tuple[int, int]]] = {}
        self._open: set[int] = set()  # requests with memory that have not ended
        self._unread: set[int] = set()  # those among them that the receiver does not read, or no more

    def ask(
        self, number: int, request_id: str, deadline_s: float | None, received_bytes: int, priority: int,
        sequences: Sequence[PreparedSequence], caller: str = "", trace: tuple[str, str] | None = None,
    ) -> bytes:  # fmt: skip
        """Encode a request. Call `sent` once it is sent, and `ended` at its end."""
        write = partial(self._place, number)
        parts = [_sequence_message(one, write) for one in sequences]
        if number in self._held:
            self._open.add(number)
            self._unread.add(number)
        return ENCODER.encode(Ask(number, request_id, deadline_s, received_bytes, priority, parts, caller, trace))

    def answer(self, number: int, results: Sequence[SequenceResult]) -> bytes:
        """Encode the results of a request."""
        write = partial(self._place, number)
        parts = [_result_message(one, write) for one in results]
        return ENCODER.encode(Answer(number, parts))

    def sent(self, number: int) -> None:
        """Note that the receiver reads a request from now on."""
        self._unread.discard(number)

    def released(self, numbers: Sequence[int]) -> None:
        """Free what the receiver has released; the memory of a request that has not ended when it ends."""
        for number in numbers:
            if number in self._open:
                self._unread.add(number)
            else:
                self._free(number)

    def ended(self, number: int) -> None:
        """Note that a request has ended. It is not sent again."""
        self._open.discard(number)
        if number in self._unread:
            self._unread.discard(number)
            self._free(number)

    def replaced(self) -> None:
        """Free the memory of all requests that have ended, because the receiver's process has. The others are kept."""
        self._unread |= self._open
        for number in self._held.keys() - self._open:
            self._free(number)

    def _free(self, number: int) -> None:
        for offset, size in self._held.pop(number, ()):
            self._arena.free(offset, size)

    def _place(self, number: int, data: Array | memoryview) -> Place:
        size = data.nbytes
        offset = None if size <= INLINE_BYTES else self._arena.allocate(size)
        if offset is None:
            return data.tobytes()
        self._held.setdefault(number, []).append((offset, size))
        self._arena.view(offset, size)[:] = np.ascontiguousarray(data).data.cast("B")
        return offset, size


def _array_message(name: str, array: Array, write: Callable[[Array | memoryview], Place]) -> ArrayMessage:
    # mypy cannot know that the string is one of these, which the manifest's dtypes ensure.
    return ArrayMessage(name, array.dtype.str, array.shape, write(array))  # type: ignore[arg-type]


def _sequence_message(one: PreparedSequence, write: Callable[[Array | memoryview], Place]) -> SequenceMessage:
    selected = None
    if one.attention is not None or one.labels is not None or one.units:
        selected = Selected(one.attention, one.labels, dict(one.units))
    return SequenceMessage(
        [_array_message(name, tensor, write) for name, tensor in one.tensors.items()],
        dict(one.lengths),
        one.outputs,
        one.response_bytes,
        one.is_whole_request,
        one.unpadded,
        one.past,
        selected,
    )


def _result_message(one: SequenceResult, write: Callable[[Array | memoryview], Place]) -> ResultMessage:
    run = one.run
    pickled = None
    if one.attention is not None or one.labels is not None:
        buffers: list[pickle.PickleBuffer] = []
        content = pickle.dumps((one.attention, one.labels), 5, buffer_callback=buffers.append)
        pickled = content, [write(buffer.raw()) for buffer in buffers]
    return ResultMessage(
        [_array_message(name, output, write) for name, output in one.outputs.items()],
        one.queue_s,
        (run.batch_size, run.useful_tokens, run.computed_tokens, run.compute_s, run.instance, run.wide),
        one.attention_s,
        pickled,
    )


class Inbox:
    """Decodes what the other process sends. Arrays are views of its arena, counted until none is in use.

    Event loop only; the arrays may be dropped in any thread.
    """

    def __init__(self, arena: Arena, send: Callable[[bytes], None]) -> None:
        """Store the parts.

        Args:
            arena: of the other process.
            send: sends a message to the other process: which arrays are no longer in use, once in a turn of the loop.
        """
        self._arena = arena
        self._send = send
        self._released: list[int] = []
        self._loop = asyncio.get_running_loop()
        self._views: dict[int, dict[int, weakref.ref[Array]]] = {}  # by number, then by that of the view
        self._made = count()

    def sequences(self, message: Ask) -> tuple[PreparedSequence, ...]:
        """Return the sequences of a request. Raises ValueError for a place that is not that of its array."""
        number = message.number
        return tuple([self._sequence(one, number) for one in message.sequences])

    def results(self, message: Answer) -> list[SequenceResult]:
        """Return the results of a request. Raises ValueError for a place that is not that of its array."""
        number = message.number
        return [self._result(one, number) for one in message.results]

    def _sequence(self, one: SequenceMessage, number: int) -> PreparedSequence:
        selected = one.selected
        return PreparedSequence(
            {array.name: self._array(array, number) for array in one.tensors},
            one.lengths,
            one.outputs,
            None if selected is None else selected.attention,
            None if selected is None else selected.labels,
            {} if selected is None else selected.units,
            response_bytes=one.response_bytes,
            is_whole_request=one.is_whole_request,
            unpadded=one.unpadded,
            past=one.past,
        )

    def _result(self, one: ResultMessage, number: int) -> SequenceResult:
        attention = labels = None
        if one.pickled is not None:
            content, places = one.pickled
            buffers = [self._bytes(place, number) for place in places]
            attention, labels = pickle.loads(content, buffers=buffers)  # noqa: S301 - a front trusts its engine
        outputs = {array.name: self._array(array, number) for array in one.outputs}
        return SequenceResult(outputs, attention, RunFacts(*one.run), one.queue_s, labels, one.attention_s)

    def _array(self, message: ArrayMessage, number: int) -> Array:
        data = self._bytes(message.place, number)
        array: Array = np.frombuffer(data, message.dtype)
        if array.size != math.prod(message.shape):
            raise ValueError(f"{array.size} values for an array of {message.shape}")
        return array if len(message.shape) == 1 else array.reshape(message.shape)

    def _bytes(self, place: Place, number: int) -> Any:
        if isinstance(place, bytes):
            return place
        whole = np.frombuffer(self._arena.view(*place), np.uint8)
        view = next(self._made)
        self._views.setdefault(number, {})[view] = weakref.ref(whole, partial(self._drop, number, view))
        return whole

    def _drop(self, number: int, view: int, _: weakref.ref[Array]) -> None:
        """Any thread: no array reads this view any more."""
        with contextlib.suppress(RuntimeError):  # the loop is closed, and so is the link
            self._loop.call_soon_threadsafe(self._gone, number, view)

    def _gone(self, number: int, view: int) -> None:
        views = self._views[number]
        del views[view]
        if not views:
            del self._views[number]
            if not self._released:
                self._loop.call_soon(self._send_released)
            self._released.append(number)

    def _send_released(self) -> None:
        numbers, self._released = self._released, []
        self._send(ENCODER.encode(Released(numbers)))


def failure(number: int, error: BaseException) -> Failed:
    """Encode an error of the domain; any other becomes InternalFault, because it was logged where it happened."""
    known = error if isinstance(error, AttnserveError) and hasattr(errors, type(error).__name__) else InternalFault()
    return Failed(number, type(known).__name__, str(known), pickle.dumps(vars(known)))


def error_of(message: Failed) -> AttnserveError:
    """Decode an error of the domain. Raises AttributeError for one that is none."""
    kind: type[AttnserveError] = getattr(errors, message.kind)
    error = kind.__new__(kind)  # without its constructor, whose arguments are not always its fields
    error.args = (message.message,)
    vars(error).update(pickle.loads(message.fields))  # noqa: S301 - a front trusts its engine
    return error
