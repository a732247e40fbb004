"""Settings that bound what callers can take: queue, messages, answers, connections, streams and time.

The formula of memory that rests on them is in `memory`. An invalid value raises pydantic's ValidationError, which
`Settings.load` turns into SettingsInvalid.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from pydantic_settings import BaseSettings

MIB = 2**20

_UNITS = {"KIB": 2**10, "MIB": MIB, "GIB": 2**30}

Count = Annotated[int, Field(ge=1)]


def size_of(text: str) -> str:
    """Return a size such as `64MiB` or `0.5 GiB` in bytes, as digits; any other text unchanged."""
    number, unit = text.strip()[:-3].strip(), text.strip()[-3:].upper()
    if unit not in _UNITS:
        return text
    try:
        return str(int(float(number) * _UNITS[unit]))
    except (ValueError, OverflowError):
        return text


def size_text(count: int) -> str:
    """Return a number of bytes in the greatest unit of which it is a multiple: `48 MiB`, or the number itself."""
    whole = [(size, name) for name, size in (("GiB", 2**30), ("MiB", MIB), ("KiB", 2**10)) if count % size == 0]
    return f"{count // whole[0][0]} {whole[0][1]}" if count and whole else str(count)


class Bounds(BaseSettings):
    """Bounds of one server. Each description ends with the reason for the default."""

    max_queue_size: Count = Field(
        4096,
        description="Maximum number of sequences in the queue of one model. Default: seconds of work on a CPU, not "
        "minutes.",
    )
    max_queue_bytes: Count = Field(
        512 * MIB,
        description="Maximum bytes of the sequences in the queue of one model and of their answers. Default: eight "
        "requests of the maximum size.",
    )
    max_text_bytes: Count = Field(
        65_536,
        description="Maximum bytes of UTF-8 in one text, before tokenization. Default: twice 8192 English tokens.",
    )
    max_request_bytes: Annotated[int, Field(ge=1024, le=2**31 - 1)] = Field(
        64 * MIB,
        description="Maximum bytes of one gRPC message, or body of HTTP, from a caller; less where the "
        "largest request of the loaded models is smaller. Default: the SDK's limit in both directions.",
    )
    max_response_bytes: Annotated[int, Field(ge=1, le=2**31 - 64 * MIB)] = Field(
        48 * MIB,
        description="Maximum bytes of tensor data in one answer. Default: leaves room for tokens in a 64 MiB message.",
    )
    max_stream_in_flight: Annotated[int, Field(ge=1, le=65_536)] = Field(
        256,
        description="Maximum number of unanswered requests on one stream; at the limit the server stops reading. "
        "Default: keeps a batch full while another runs.",
    )
    max_stream_answer_bytes: Count = Field(
        128 * MIB,
        description="Maximum bytes of tensor data in the answers of one stream that are computed or not read yet; "
        "further requests wait. Default: a few answers of the maximum size, so that a slow reader cannot fill the "
        "memory.",
    )
    keepalive_s: Annotated[float, Field(ge=1, le=7200)] = Field(
        15.0,
        description="Idle seconds before the server pings a connection; a peer that does not answer within 5 s is "
        "dead, and its calls end. Default: frees the state of a dead peer within 20 s.",
    )
    keepalive_min_interval_s: Annotated[float, Field(ge=0, le=7200)] = Field(
        5.0,
        description="Minimum seconds between pings of a client; the server closes a connection with faster ones. "
        "Default: below gRPC's own minutes, as clients behind load balancers need faster pings.",
    )
    call_timeout_s: Annotated[float, Field(gt=0, le=86_400)] = Field(
        60.0,
        description="Seconds after which a call, or a request of a stream, without a deadline ends with "
        "DEADLINE_EXCEEDED. Default: more than any request takes in a queue of seconds, so that a caller that is lost "
        "does not hold memory without a limit.",
    )
    max_connections: Annotated[int, Field(ge=1, le=65_536)] = Field(
        768,
        description="Maximum number of connections to the gRPC port, shared by the fronts, and a quarter as many to "
        "the REST port; further ones are closed at once. Default: leaves room below the 1,024 file descriptors that a "
        "process may usually open.",
    )
    max_streams_per_connection: Annotated[int, Field(ge=1, le=65_536)] = Field(
        256,
        description="Maximum number of concurrent calls on one connection; a client holds further ones back. Default: "
        "four times the callers that keep two cores busy, so that one connection is enough.",
    )
    accept_compression: bool = Field(
        False,
        description="Accept compressed messages. Default: false, as gRPC expands a message of 63 KB to 63 MiB before "
        "any check, and tensors hardly shrink.",
    )
    receive_budget_bytes: Annotated[int, Field(ge=MIB)] | None = Field(
        None,
        description="Maximum bytes of messages that are being received, over all connections: half for messages at "
        "the limit, which derives from the loaded models, and half for calls whose message waits, and for bodies of "
        "HTTP. Further calls wait, or are refused; the server does not start where two messages do not fit. Default: a "
        "quarter of the machine's memory, or of the limit of its control group.",
    )
    max_unread_bytes: Count = Field(
        512 * MIB,
        description="Maximum bytes of tensor data in answers of over 64 KiB that are computed or not read yet, over "
        "all calls. Further ones wait, or are refused as overload. Default: four streams at their own limit.",
    )
    unread_timeout_s: Annotated[float, Field(gt=0, le=3600)] = Field(
        20.0,
        description="Seconds after which a caller that does not read an answer of over 64 KiB loses its connection; a "
        "quarter of that where `--max-unread-bytes` is used up. Default: as for a dead peer.",
    )
