"""The one map from what gRPC tells (codes and google.rpc details) to the error tree. Nothing else makes this choice."""

from __future__ import annotations

from typing import Any, Final

import grpc
from google.protobuf.message import DecodeError
from google.rpc import code_pb2, error_details_pb2, status_pb2

from attnserve_client.errors import (
    AttentionUnavailable,
    AttnserveError,
    BadAnswer,
    DeadlineExpired,
    FieldViolation,
    InternalFault,
    InvalidRequest,
    ModelNotFound,
    NotServing,
    Overloaded,
    RequestCancelled,
    ResponseTooLarge,
    ServerUnreachable,
    TextUnavailable,
)

DOMAIN: Final = "attnserve"
DETAILS_KEY: Final = "grpc-status-details-bin"

BY_REASON: Final[dict[str, type[AttnserveError]]] = {
    "INVALID_REQUEST": InvalidRequest,
    "MODEL_NOT_FOUND": ModelNotFound,
    "ATTENTION_UNAVAILABLE": AttentionUnavailable,
    "TEXT_UNAVAILABLE": TextUnavailable,
    "RESPONSE_TOO_LARGE": ResponseTooLarge,
    "OVERLOADED": Overloaded,
    "NOT_SERVING": NotServing,
    "DEADLINE_EXPIRED": DeadlineExpired,
    "CANCELLED": RequestCancelled,
    "INTERNAL": InternalFault,
}

# Where no server of ours spoke: gRPC itself, a proxy, or another service at that address. A RESOURCE_EXHAUSTED of
# theirs is a message over a size limit, which no retry mends, so it is no Overloaded.
BY_CODE: Final[dict[str, type[AttnserveError]]] = {
    "INVALID_ARGUMENT": InvalidRequest,
    "UNAVAILABLE": ServerUnreachable,
    "DEADLINE_EXCEEDED": DeadlineExpired,
    "CANCELLED": RequestCancelled,
    "INTERNAL": InternalFault,
}

# What gRPC has only its own short words for, which vary with how it noticed.
_OWN_WORDS: Final = {"DEADLINE_EXCEEDED": "the timeout passed before the answer was there"}

_RETRYABLE: Final = (NotServing, Overloaded)


def is_retryable(error: AttnserveError) -> bool:
    """Whether the same request may succeed when it is sent again. All our calls are idempotent."""
    return isinstance(error, _RETRYABLE)


def from_rpc_error(error: Any, request_id: str = "") -> AttnserveError:
    """What a failed call means. Takes the errors of both `grpc` and `grpc.aio`."""
    # Both kinds of grpc.RpcError have these methods; the base class itself declares none of them.
    code: grpc.StatusCode = error.code()
    message: str = _OWN_WORDS.get(code.name) or error.details() or ""
    for key, value in error.trailing_metadata() or ():
        if key == DETAILS_KEY:
            return from_status_bytes(value, request_id)
    return _make(code.name, message, status_pb2.Status(), request_id)


def from_status_bytes(data: bytes, request_id: str = "") -> AttnserveError:
    """What a serialised google.rpc.Status means, from a trailer or from a message of a stream."""
    try:
        status = status_pb2.Status.FromString(data)
    except DecodeError as error:
        return bad_answer(f"the error's details cannot be read: {error}", request_id)
    known = status.code in code_pb2.Code.values()
    return _make(code_pb2.Code.Name(status.code) if known else "UNKNOWN", status.message, status, request_id)


def bad_answer(why: str, request_id: str = "") -> BadAnswer:
    """An answer that breaks the contract."""
    return BadAnswer(f"the server's answer breaks the contract: {why}", request_id=request_id)


def closed() -> RequestCancelled:
    """A call on a client that has been closed."""
    return RequestCancelled("this client is closed", code="CANCELLED")


def _make(code: str, message: str, status: status_pb2.Status, request_id: str) -> AttnserveError:
    info = error_details_pb2.ErrorInfo()
    violations: tuple[FieldViolation, ...] = ()
    retry_delay_s: float | None = None
    for detail in status.details:
        bad, retry, request = (
            error_details_pb2.BadRequest(),
            error_details_pb2.RetryInfo(),
            error_details_pb2.RequestInfo(),
        )
        try:
            if detail.Is(info.DESCRIPTOR):
                detail.Unpack(info)
            elif detail.Unpack(bad):
                violations = tuple(FieldViolation(each.field, each.description) for each in bad.field_violations)
            elif detail.Unpack(retry):
                retry_delay_s = max(0.0, retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9)
            elif detail.Unpack(request):
                request_id = request.request_id or request_id
        except DecodeError:
            continue  # one broken detail does not hide the others
    ours = info.domain == DOMAIN
    kind = (BY_REASON.get(info.reason) if ours else None) or BY_CODE.get(code, AttnserveError)
    return kind(
        message or code.lower().replace("_", " "),
        code=code,
        reason=info.reason,
        metadata=dict(info.metadata),
        request_id=info.metadata.get("request_id", "") or request_id,
        violations=violations,
        retry_delay_s=retry_delay_s,
    )
