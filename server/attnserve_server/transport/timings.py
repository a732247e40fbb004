"""The timings of a request: where its time went, from the results of its sequences, and their form on the wire."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from attnserve.v1 import inference_service_pb2

from attnserve_server.domain.values import SequenceResult
from attnserve_server.transport.fields import delimiter

_NUMBERS: Final = struct.Struct("<BdBdBdBd")
"""A tag and a double for each of the four fields."""
_HEAD: Final = delimiter(inference_service_pb2.Receipt.TIMINGS_FIELD_NUMBER, _NUMBERS.size)
_QUEUE, _COMPUTE, _ATTENTION, _ENCODE = (
    number << 3 | 1
    for number in (
        inference_service_pb2.Timings.QUEUE_SECONDS_FIELD_NUMBER,
        inference_service_pb2.Timings.COMPUTE_SECONDS_FIELD_NUMBER,
        inference_service_pb2.Timings.ATTENTION_SECONDS_FIELD_NUMBER,
        inference_service_pb2.Timings.ENCODE_SECONDS_FIELD_NUMBER,
    )
)


class Timings(NamedTuple):
    """Seconds of one request, as the contract's message of this name defines them."""

    queue_s: float
    compute_s: float
    attention_s: float
    encode_s: float

    def field(self) -> bytes:
        """Serialize them as the field `timings` of a Receipt."""
        queue_s, compute_s, attention_s, encode_s = self
        numbers = _NUMBERS.pack(_QUEUE, queue_s, _COMPUTE, compute_s, _ATTENTION, attention_s, _ENCODE, encode_s)
        return _HEAD + numbers


def timings_of(results: Sequence[SequenceResult], encode_s: float) -> Timings:
    """Return the timings of a request from the results of its sequences, one or more, and the time of its encoding.

    Its sequences wait and run beside each other, so that of these times the longest counts. The reductions of their
    attention are added up.
    """
    if len(results) == 1:  # the usual case
        (one,) = results
        return Timings(one.queue_s, one.run.compute_s, one.attention_s, encode_s)
    return Timings(
        max([one.queue_s for one in results]),
        max([one.run.compute_s for one in results]),
        sum([one.attention_s for one in results]),
        encode_s,
    )


Clocked = Callable[[], Timings]
"""Returns where the time of a request went; called once its outputs are written, which it counts as encoding."""
