"""Requests, results and errors arrive as they were sent, and memory that is read no more is free again."""

from __future__ import annotations

import asyncio
import gc
import os

import msgspec
import numpy as np
import pytest
from attnserve_server.domain import errors
from attnserve_server.domain.errors import (
    AttnserveError,
    DeadlineExpired,
    FieldViolation,
    InternalFault,
    InvalidRequest,
    NotServing,
    Overloaded,
)
from attnserve_server.domain.values import Array, PreparedSequence, Priority, RunFacts, SequenceResult
from attnserve_server.isolation.arena import SLOT_BYTES, Arena
from attnserve_server.isolation.messages import (
    ENCODER,
    INLINE_BYTES,
    TO_ENGINE,
    TO_FRONT,
    Answer,
    Ask,
    Failed,
    Inbox,
    Outbox,
    Released,
    error_of,
    failure,
)

SLOTS = 16
ARRAYS: dict[str, Array] = {
    "small": np.arange(6, dtype=np.int64),
    "matrix": np.arange(12, dtype=np.float32).reshape(3, 4),
    "empty": np.zeros((0, 5), np.float32),
    "scalar": np.array(2.5, np.float16),
    "booleans": np.array([True, False]),
    "at the limit": np.arange(INLINE_BYTES, dtype=np.uint8),
    "above the limit": np.arange(INLINE_BYTES + 1, dtype=np.uint32).astype(np.uint8),
    "large": np.random.default_rng(1).standard_normal((2, 3, 1500)).astype(np.float32),
    "not contiguous": np.arange(5000, dtype=np.int64)[::-1].reshape(50, 100).T,
}


class Ends:
    """A sender's and a receiver's view of one arena, and the numbers that were released."""

    def __init__(self) -> None:
        descriptor = Arena.create_descriptor(SLOTS * SLOT_BYTES)
        self.arena, read = (Arena(descriptor, SLOTS * SLOT_BYTES) for _ in range(2))
        os.close(descriptor)
        self.released: list[int] = []
        self.outbox, self.inbox = Outbox(self.arena), Inbox(read, self.take_released)

    def take_released(self, data: bytes) -> None:
        message = TO_FRONT.decode(data)
        assert isinstance(message, Released)
        self.released += message.numbers

    def ask(self, number: int, *sequences: PreparedSequence) -> tuple[PreparedSequence, ...]:
        sent = self.outbox.ask(number, "id", 12.5, 99, Priority.HIGH.value, sequences)
        self.outbox.sent(number)
        message = TO_ENGINE.decode(sent)
        assert isinstance(message, Ask)
        assert (message.request_id, message.deadline_s, message.received_bytes) == ("id", 12.5, 99)
        assert Priority(message.priority) is Priority.HIGH
        return self.inbox.sequences(message)

    def answer(self, number: int, *results: SequenceResult) -> list[SequenceResult]:
        message = TO_FRONT.decode(self.outbox.answer(number, results))
        assert isinstance(message, Answer)
        return self.inbox.results(message)


def equal(one: Array, other: Array) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and bool((one == other).all())


@pytest.mark.parametrize("array", ARRAYS.values(), ids=ARRAYS)
async def test_arrays_arrive_bit_by_bit(array: Array) -> None:
    ends = Ends()
    (sequence,) = ends.ask(1, PreparedSequence({"x": array}, {"seq": 3}, ("y",), response_bytes=8, past=2))
    assert equal(sequence.tensors["x"], array)
    assert (sequence.lengths, sequence.outputs, sequence.response_bytes) == ({"seq": 3}, ("y",), 8)
    assert (sequence.past, sequence.attention, sequence.unpadded, sequence.is_whole_request) == (2, None, False, False)
    facts = RunFacts(4, 10, 12, 0.5, 1, wide=True)
    (result,) = ends.answer(2, SequenceResult({"y": array}, None, facts, 0.25, attention_s=0.125))
    assert equal(result.outputs["y"], array)
    assert (result.run, result.queue_s, result.attention_s) == (facts, 0.25, 0.125)
    assert (result.attention, result.labels) == (None, None)


async def test_memory_is_freed_once_no_array_of_a_message_is_in_use() -> None:
    ends = Ends()
    one, other = (np.full(20_000, value, np.uint8) for value in (1, 2))
    (sequence,) = ends.ask(7, PreparedSequence({"a": one, "b": other}, {}, ()))
    assert ends.arena.free_slots == SLOTS - 4
    part = sequence.tensors["b"][5:10]
    del sequence
    gc.collect()
    await asyncio.sleep(0.01)
    assert ends.released == []
    assert part.tolist() == [2] * 5
    del part
    await asyncio.sleep(0.01)
    assert ends.released == [7]
    ends.outbox.released(ends.released)
    assert ends.arena.free_slots == SLOTS - 4, "the request may be sent again"
    ends.outbox.ended(7)
    assert ends.arena.free_slots == SLOTS


async def test_memory_of_a_replaced_receiver_is_freed_but_for_requests_that_go_on() -> None:
    ends = Ends()
    large = np.full(20_000, 1, np.uint8)
    sequences = [ends.ask(number, PreparedSequence({"a": large}, {}, ())) for number in (1, 2)]
    ends.outbox.ended(1)
    assert ends.arena.free_slots == SLOTS - 4, "the receiver still reads it"
    ends.outbox.replaced()
    assert ends.arena.free_slots == SLOTS - 2
    ends.outbox.ended(2)  # it was not sent to the next receiver
    assert ends.arena.free_slots == SLOTS
    del sequences


async def test_arrays_without_room_in_the_arena_are_part_of_the_message() -> None:
    ends = Ends()
    whole = np.arange(SLOTS * SLOT_BYTES, dtype=np.uint32).astype(np.uint8)
    (first,) = ends.ask(1, PreparedSequence({"x": whole}, {}, ()))
    (second,) = ends.ask(2, PreparedSequence({"x": whole, "y": whole[:-1]}, {}, ()))
    assert ends.arena.free_slots == 0
    assert equal(first.tensors["x"], whole)
    assert equal(second.tensors["x"], whole)
    assert equal(second.tensors["y"], whole[:-1])
    ends.outbox.released([2])  # it holds nothing
    assert ends.arena.free_slots == 0


ERRORS: list[AttnserveError] = [
    Overloaded("queue_full", 3, 4, 0.5),
    NotServing("m", "draining"),
    DeadlineExpired(0.25, early=True),
    InvalidRequest(FieldViolation("sequences[0]", "is empty")),
    InternalFault("abc"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_errors_arrive_with_class_message_and_fields(error: AttnserveError) -> None:
    message = TO_FRONT.decode(ENCODER.encode(failure(5, error)))
    assert isinstance(message, Failed)
    found = error_of(message)
    assert (message.number, type(found), str(found), vars(found)) == (5, type(error), str(error), vars(error))
    assert found.reason == error.reason
    assert found.metadata() == error.metadata()


def test_an_error_that_is_none_of_the_domain_is_an_internal_fault() -> None:
    assert isinstance(error_of(failure(1, KeyError("secret"))), InternalFault)
    assert "secret" not in repr(failure(1, KeyError("secret")))


def test_every_error_of_the_domain_is_found_by_its_name() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, AttnserveError)]
    assert all(getattr(errors, kind.__name__) is kind for kind in kinds)


@pytest.mark.parametrize(
    ("trace", "valid"),
    [
        (None, True),
        ((f"00-{'a' * 32}-{'1' * 16}-01", ""), True),
        ((f"00-{'a' * 32}-{'1' * 16}-01", "b=" + "c" * 510), True),
        ((f"00-{'a' * 32}-{'1' * 16}-01", "b=" + "c" * 511), False),
        ((f"00-{'A' * 32}-{'1' * 16}-01", ""), False),
        ((f"00-{'a' * 32}-{'1' * 16}-01\n", ""), False),
        (("", ""), False),
    ],
)
async def test_a_trace_context_arrives_only_in_its_form(trace: tuple[str, str] | None, *, valid: bool) -> None:
    sent = Ends().outbox.ask(1, "id", None, 1, 0, [PreparedSequence({}, {}, ())], "", trace)
    if not valid:
        with pytest.raises(msgspec.ValidationError):
            TO_ENGINE.decode(sent)
        return
    message = TO_ENGINE.decode(sent)
    assert isinstance(message, Ask)
    assert message.trace == trace
