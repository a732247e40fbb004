"""The only mapping from gRPC codes and google.rpc details to the client's errors."""

from __future__ import annotations

import re
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
    ModelFailed,
    ModelNotFound,
    NotServing,
    Overloaded,
    PermissionDenied,
    RepositoryUnusable,
    RequestCancelled,
    ResponseTooLarge,
    ServerUnreachable,
    TextUnavailable,
    Unauthenticated,
    Unsupported,
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
    "MODEL_FAILED": ModelFailed,
    "REPOSITORY_UNUSABLE": RepositoryUnusable,
    "DEADLINE_EXPIRED": DeadlineExpired,
    "CANCELLED": RequestCancelled,
    "UNAUTHENTICATED": Unauthenticated,
    "PERMISSION_DENIED": PermissionDenied,
    "INTERNAL": InternalFault,
    # The request may be what ended the engine, so it must not reach another one.
    "ENGINE_CRASHED": InternalFault,
}

# For failures without details of attnserve: from gRPC itself, a proxy, or another service at that address. There,
# RESOURCE_EXHAUSTED is not Overloaded but a message over a size limit, which fails again on each retry.
BY_CODE: Final[dict[str, type[AttnserveError]]] = {
    "INVALID_ARGUMENT": InvalidRequest,
    "UNAVAILABLE": ServerUnreachable,
    "DEADLINE_EXCEEDED": DeadlineExpired,
    "CANCELLED": RequestCancelled,
    "UNAUTHENTICATED": Unauthenticated,
    "PERMISSION_DENIED": PermissionDenied,
    "INTERNAL": InternalFault,
    "UNIMPLEMENTED": Unsupported,
}

# Replaces gRPC's messages, which vary with the place where the deadline was noticed, or name no remedy.
_MESSAGES: Final = {
    "DEADLINE_EXCEEDED": "the timeout passed before the response arrived",
    "UNIMPLEMENTED": "the server does not have this method; use a server of the client's version, and start it with "
    "--admin to change models",
}

# The messages of grpcio 1.76 to 1.85. A message that is not listed counts as a refusal, so retries are fewer, not more.
_LOST: Final = re.compile(
    r"the server cancelled the call|(stream removed \()?"
    r"(socket closed|ping timeout|keepalive|cancelling all calls|goaway|connection reset|broken pipe|recvmsg|sendmsg"
    r"|endpoint|transport)"
    r"|failed to connect to all addresses|connections to all backends failing|errors resolving|dns resolution failed",
    re.IGNORECASE,
)

_NEVER_OPENED: Final = re.compile(
    r"failed to connect to all addresses|connections to all backends failing|errors resolving|dns resolution failed",
    re.IGNORECASE,
)
_WRONG_ADDRESS: Final = re.compile("handshake failed|misformatted", re.IGNORECASE)
"""In the message of a connection that also fails once the server has started."""

_RETRYABLE: Final = (NotServing, Overloaded)


def is_retryable(error: AttnserveError) -> bool:
    """Return whether a retry of the same request may succeed. All calls of the service are idempotent."""
    return isinstance(error, _RETRYABLE)


def is_lost_connection(error: AttnserveError) -> bool:
    """Return whether gRPC itself made the error, because a connection broke or could not be opened.

    Then all calls of the connection have it at the same time. A server, or a proxy before it, that refuses requests
    sends UNAVAILABLE for each of them; without details, only the message distinguishes the two.
    """
    return isinstance(error, ServerUnreachable) and not error.reason and _LOST.match(error.message) is not None


def may_start(error: AttnserveError) -> bool:
    """Return whether no server could be reached, but the same address may reach one that still has to start."""
    never_opened = is_lost_connection(error) and _NEVER_OPENED.match(error.message) is not None
    return never_opened and _WRONG_ADDRESS.search(error.message) is None


def from_rpc_error(error: Any, request_id: str = "", *, by_server: bool = False) -> AttnserveError:
    """Return the error for a failed call of grpc or grpc.aio.

    Args:
        error: gRPC's error.
        request_id: Id of the request, unless the error holds one.
        by_server: The client did not cancel the call, so that CANCELLED means a server that stops.
    """
    # grpc.RpcError declares none of these methods, but the errors of both libraries have them.
    code: grpc.StatusCode = error.code()
    message: str = _MESSAGES.get(code.name) or error.details() or ""
    for key, value in error.trailing_metadata() or ():
        if key == DETAILS_KEY:
            return from_status_bytes(value, request_id)
    if by_server and code is grpc.StatusCode.CANCELLED:
        return ServerUnreachable(f"the server cancelled the call: {message}", code=code.name, request_id=request_id)
    return _make(code.name, message, status_pb2.Status(), request_id)


def from_status_bytes(data: bytes, request_id: str = "") -> AttnserveError:
    """Return the error for a serialized google.rpc.Status, from a trailer or from a message of a stream."""
    try:
        status = status_pb2.Status.FromString(data)
    except DecodeError as error:
        return bad_answer(f"its error details are no google.rpc.Status: {error}", request_id)
    known = status.code in code_pb2.Code.values()
    return _make(code_pb2.Code.Name(status.code) if known else "UNKNOWN", status.message, status, request_id)


def bad_answer(why: str, request_id: str = "") -> BadAnswer:
    """Return the error for an answer that breaks the contract."""
    return BadAnswer(f"the server's answer breaks the contract: {why}", request_id=request_id)


def closed() -> RequestCancelled:
    """Return the error for a call on a closed client."""
    return RequestCancelled("this client is closed; create a new one", code="CANCELLED")


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
            continue  # keep the other details
    from_attnserve = info.domain == DOMAIN
    kind = (BY_REASON.get(info.reason) if from_attnserve else None) or BY_CODE.get(code, AttnserveError)
    return kind(
        message or code.lower().replace("_", " "),
        code=code,
        reason=info.reason,
        metadata=dict(info.metadata),
        request_id=info.metadata.get("request_id", "") or request_id,
        violations=violations,
        retry_delay_s=retry_delay_s,
    )
