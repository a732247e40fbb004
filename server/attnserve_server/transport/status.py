"""The table from the error tree to gRPC codes, google.rpc details and HTTP; no other module chooses a status.

Any error outside of the tree becomes INTERNAL, without its own message. `status_of` raises nothing.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from typing import Final

import grpc
from google.protobuf import any_pb2, message
from google.rpc import error_details_pb2, status_pb2

from attnserve_server.domain import errors

DOMAIN: Final = "attnserve"
DETAILS_KEY: Final = "grpc-status-details-bin"
"""The trailer in which gRPC clients of every language expect the serialized google.rpc.Status."""
DEADLINE_TOLERANCE_S: Final = 0.005
"""Clock tolerance: gRPC may cancel a call up to this long before the server's clock reaches the deadline."""

_MAX_TEXT: Final = 200
_MAX_MESSAGE: Final = 512
_MAX_STATUS_BYTES: Final = 4096
# Trailers count against the peer's header limit, 8 KiB by default, and binary ones grow by a third on the wire.
_UNSAFE: Final = re.compile(r"[^\x20-\x7e]")


@dataclass(frozen=True, slots=True)
class StatusRow:
    """How one class of error is reported. `retry`: whether a RetryInfo holds the delay before a retry."""

    error: type[errors.AttnserveError]
    code: grpc.StatusCode
    retry: bool
    metadata: tuple[str, ...]
    remedy: str


TABLE: Final[tuple[StatusRow, ...]] = (
    StatusRow(
        errors.InvalidRequest,
        grpc.StatusCode.INVALID_ARGUMENT,
        False,
        (),
        "Fix the fields listed in the BadRequest detail. Retrying the same request fails again.",
    ),
    StatusRow(
        errors.ModelNotFound,
        grpc.StatusCode.NOT_FOUND,
        False,
        ("model", "version"),
        "Name a model that `ListModels` returns.",
    ),
    StatusRow(
        errors.AttentionUnavailable,
        grpc.StatusCode.FAILED_PRECONDITION,
        False,
        ("model",),
        "Select another site, another unit or another model: `GetModel` lists the sites and why one is unavailable.",
    ),
    StatusRow(
        errors.TextUnavailable,
        grpc.StatusCode.FAILED_PRECONDITION,
        False,
        ("model",),
        "Send tensors: the bundle has no tokenizer.",
    ),
    StatusRow(
        errors.ResponseTooLarge,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        False,
        ("predicted_bytes", "allowed_bytes"),
        "Request less: fewer sites, heads, rows or sequences, `top_k`, or a smaller dtype. Nothing was run.",
    ),
    StatusRow(
        errors.Overloaded,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        True,
        ("cause", "limit", "value"),
        "Retry after the RetryInfo delay, or send the request to another replica.",
    ),
    StatusRow(
        errors.NotServing,
        grpc.StatusCode.UNAVAILABLE,
        True,
        ("model", "state"),
        "Retry after the RetryInfo delay, or send the request to another replica.",
    ),
    StatusRow(
        errors.ModelFailed,
        grpc.StatusCode.FAILED_PRECONDITION,
        False,
        ("model", "version", "why"),
        "Name a version that is ready, as `ListModels` returns it. The operator repairs the bundle, or writes a new "
        "version. Retrying the same request fails again until then.",
    ),
    StatusRow(
        errors.RepositoryUnusable,
        grpc.StatusCode.FAILED_PRECONDITION,
        False,
        (),
        "The operator repairs the repository: the message states what is wrong. Nothing was changed.",
    ),
    StatusRow(
        errors.Unsupported,
        grpc.StatusCode.UNIMPLEMENTED,
        False,
        (),
        "The operator starts the server with the flags that the message names.",
    ),
    StatusRow(
        errors.DeadlineExpired,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        False,
        (),
        "Set a longer deadline, or send fewer sequences in one request.",
    ),
    StatusRow(errors.RequestCancelled, grpc.StatusCode.CANCELLED, False, (), "None: the caller cancelled."),
    StatusRow(
        errors.Unauthenticated,
        grpc.StatusCode.UNAUTHENTICATED,
        False,
        ("cause",),
        "Send a valid token: `cause` states what is wrong with this one. Retrying the same request fails again.",
    ),
    StatusRow(
        errors.PermissionDenied,
        grpc.StatusCode.PERMISSION_DENIED,
        False,
        ("scope", "token"),
        "Use a token with the scope, or omit what needs it. Retrying the same request fails again.",
    ),
    StatusRow(
        errors.InternalFault,
        grpc.StatusCode.INTERNAL,
        False,
        (),
        "Report the request id to the operator: the server's log has the details under it.",
    ),
    StatusRow(
        errors.EngineCrashed,
        grpc.StatusCode.INTERNAL,
        False,
        ("model",),
        "Do not retry: the request ends the engine again. Report its id, with the request, to the operator.",
    ),
)
_ROWS: Final = {row.error: row for row in TABLE}
_INTERNAL: Final = _ROWS[errors.InternalFault]
_HTTP: Final = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.FAILED_PRECONDITION: 400,
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.CANCELLED: 499,
    grpc.StatusCode.INTERNAL: 500,
    grpc.StatusCode.UNIMPLEMENTED: 501,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}


def row_of(error: BaseException) -> StatusRow:
    """Return the table's row for `error`. An error without a row is an internal error."""
    return next((_ROWS[kind] for kind in type(error).__mro__ if kind in _ROWS), _INTERNAL)


def is_fault(error: BaseException) -> bool:
    """Return whether `error` is an internal error, which is logged with its traceback and reported as INTERNAL."""
    return row_of(error) is _INTERNAL


def http_status_of(error: BaseException) -> int:
    """Return the HTTP status of `error`. Source: the mapping of google.rpc.Code.

    An answer that would be too large is 413, because after 429 clients retry.
    """
    row = row_of(error)
    return 413 if row.error is errors.ResponseTooLarge else _HTTP[row.code]


def name_of_code(error: BaseException, left_s: float | None) -> str:
    """Return the name of the gRPC code with which a call ends.

    gRPC cancels the handler of a call both when the caller leaves and when the deadline passes; the remaining time
    distinguishes the two.

    Args:
        error: what the handler raised, cancellation included.
        left_s: seconds to the call's deadline; None: it has none.
    """
    if isinstance(error, asyncio.CancelledError):
        return "DEADLINE_EXCEEDED" if left_s is not None and left_s <= DEADLINE_TOLERANCE_S else "CANCELLED"
    return row_of(error).code.name


def plain(text: str, limit: int = _MAX_TEXT) -> str:
    r"""Return `text` in printable ASCII, other characters as \x, \u or \U escapes, cut to `limit` characters."""
    escaped = _UNSAFE.sub(lambda found: found.group().encode("unicode_escape").decode(), text[:limit])
    return escaped if len(escaped) <= limit and len(text) <= limit else escaped[: limit - 3] + "..."


def status_of(error: BaseException, request_id: str) -> status_pb2.Status:
    """Return the google.rpc.Status for `error`: at most 4 KiB, without paths, tracebacks and unprintable characters.

    Args:
        error: what a handler raised, cancellation excepted.
        request_id: the request's name, for the ErrorInfo's metadata; empty: none.
    """
    row = row_of(error)
    known = error if isinstance(error, errors.AttnserveError) and row is not _INTERNAL else None
    shown = known or errors.InternalFault(request_id)
    metadata = {key: plain(value) for key, value in shown.metadata().items()}
    if request_id:
        metadata["request_id"] = plain(request_id)
    status = status_pb2.Status(code=row.code.value[0], message=plain(str(shown), _MAX_MESSAGE))
    status.details.append(
        _packed(error_details_pb2.ErrorInfo(reason=shown.reason, domain=DOMAIN, metadata=metadata)),
    )
    if isinstance(shown, errors.Overloaded | errors.NotServing):
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(max(0, round(shown.retry_delay_s * 1e9)))
        status.details.append(_packed(retry))
    if isinstance(shown, errors.InvalidRequest):
        _add_violations(status, shown)
    return status


def trailers_of(status: status_pb2.Status) -> tuple[tuple[str, bytes], ...]:
    """Return the trailing metadata that holds `status`."""
    return ((DETAILS_KEY, status.SerializeToString()),)


def code_of(status: status_pb2.Status) -> grpc.StatusCode:
    """Return the gRPC code of `status`."""
    return _CODES[status.code]


_CODES: Final = {code.value[0]: code for code in grpc.StatusCode}


def _add_violations(status: status_pb2.Status, error: errors.InvalidRequest) -> None:
    bad = error_details_pb2.BadRequest(
        field_violations=[
            error_details_pb2.BadRequest.FieldViolation(
                field=plain(violation.field), description=plain(violation.description)
            )
            for violation in error.violations[: errors.MAX_VIOLATIONS]
        ]
    )
    while status.ByteSize() + bad.ByteSize() > _MAX_STATUS_BYTES:
        del bad.field_violations[-1]
    status.details.append(_packed(bad))


def _packed(detail: message.Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(detail)
    return packed
