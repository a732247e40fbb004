"""The one table from the error tree to gRPC codes and google.rpc details. Nothing else chooses a status."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

import grpc
from google.protobuf import any_pb2, message
from google.rpc import error_details_pb2, status_pb2

from attnserve_server.domain import errors

DOMAIN: Final = "attnserve"
DETAILS_KEY: Final = "grpc-status-details-bin"
"""The trailer that gRPC clients in every language look for the serialised google.rpc.Status in."""

_MAX_TEXT: Final = 200
_MAX_MESSAGE: Final = 512
_MAX_STATUS_BYTES: Final = 4096
# Trailers count against the peer's header limit, 8 KiB by default, and binary ones grow by a third on the wire.
_UNSAFE: Final = re.compile(r"[^\x20-\x7e]")


@dataclass(frozen=True, slots=True)
class StatusRow:
    """How one class of error is told to callers. `retry`: whether a RetryInfo says when to try again."""

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
        "Mend the fields that the BadRequest detail names; the same request fails again.",
    ),
    StatusRow(
        errors.ModelNotFound,
        grpc.StatusCode.NOT_FOUND,
        False,
        ("model", "version"),
        "Ask `ListModels` what there is.",
    ),
    StatusRow(
        errors.AttentionUnavailable,
        grpc.StatusCode.FAILED_PRECONDITION,
        False,
        ("model",),
        "Ask for another site or unit, or another model: `GetModel` lists the sites and why one is unavailable.",
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
        "Ask for less: fewer sites, heads, rows or sequences, `top_k`, or a smaller dtype. Nothing was run.",
    ),
    StatusRow(
        errors.Overloaded,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        True,
        ("cause", "limit", "value"),
        "Try again after the RetryInfo delay, or send to another replica.",
    ),
    StatusRow(
        errors.NotServing,
        grpc.StatusCode.UNAVAILABLE,
        True,
        ("model", "state"),
        "Try again after the RetryInfo delay, or send to another replica.",
    ),
    StatusRow(
        errors.DeadlineExpired,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        False,
        (),
        "Wait longer, or send less at a time.",
    ),
    StatusRow(errors.RequestCancelled, grpc.StatusCode.CANCELLED, False, (), "Nothing: the caller left."),
    StatusRow(
        errors.InternalFault,
        grpc.StatusCode.INTERNAL,
        False,
        (),
        "Tell the operator the request id: the server's log has the rest under it.",
    ),
)
_ROWS: Final = {row.error: row for row in TABLE}
_INTERNAL: Final = _ROWS[errors.InternalFault]


def row_of(error: BaseException) -> StatusRow:
    """The table's row for `error`. Whatever is not in the table is a fault of ours."""
    return next((_ROWS[kind] for kind in type(error).__mro__ if kind in _ROWS), _INTERNAL)


def is_fault(error: BaseException) -> bool:
    """Whether `error` is ours, so that it is logged with its traceback and told as INTERNAL."""
    return row_of(error) is _INTERNAL


def plain(text: str, limit: int = _MAX_TEXT) -> str:
    r"""`text` in printable ASCII, the rest written as \x, \u or \U escapes, cut to `limit` characters."""
    escaped = _UNSAFE.sub(lambda found: found.group().encode("unicode_escape").decode(), text[:limit])
    return escaped if len(escaped) <= limit and len(text) <= limit else escaped[: limit - 3] + "..."


def status_of(error: BaseException, request_id: str) -> status_pb2.Status:
    """The google.rpc.Status for `error`: at most 4 KiB, without a path, a traceback or an unprintable character.

    Args:
        error: Anything that a handler raised, cancellation excepted.
        request_id: The request's name; it travels in the ErrorInfo's metadata.
    """
    row = row_of(error)
    known = error if isinstance(error, errors.AttnserveError) and row is not _INTERNAL else None
    told = known or errors.InternalFault(request_id)
    metadata = {key: plain(value) for key, value in told.metadata().items()}
    if request_id:
        metadata["request_id"] = plain(request_id)
    status = status_pb2.Status(code=row.code.value[0], message=plain(str(told), _MAX_MESSAGE))
    status.details.append(
        _packed(error_details_pb2.ErrorInfo(reason=told.reason, domain=DOMAIN, metadata=metadata)),
    )
    if isinstance(told, errors.Overloaded | errors.NotServing):
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(max(0, round(told.retry_delay_s * 1e9)))
        status.details.append(_packed(retry))
    if isinstance(told, errors.InvalidRequest):
        _add_violations(status, told)
    return status


def trailers_of(status: status_pb2.Status) -> tuple[tuple[str, bytes], ...]:
    """The trailing metadata that carries `status` beside its code and message."""
    return ((DETAILS_KEY, status.SerializeToString()),)


def code_of(status: status_pb2.Status) -> grpc.StatusCode:
    """The gRPC code of `status`."""
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
