"""Encoding of errors as a server sends them: a google.rpc.Status with details."""

from __future__ import annotations

from typing import Any

from google.protobuf import any_pb2, duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2

from attnserve_client._status import DOMAIN
from attnserve_client.errors import AttnserveError


def status_of(error: AttnserveError, request_id: str) -> status_pb2.Status:
    """Return the status that a server sends for an error.

    An attribute of the error that is empty or None adds no detail, nor does an empty `request_id`.

    Raises:
        ValueError: the error's code is not the name of a google.rpc code.
    """
    details: list[Any] = []
    if error.reason:
        facts = {**error.metadata, **({"request_id": request_id} if request_id else {})}
        details.append(error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=facts))
    if error.violations:
        fields = [
            error_details_pb2.BadRequest.FieldViolation(field=each.field, description=each.description)
            for each in error.violations
        ]
        details.append(error_details_pb2.BadRequest(field_violations=fields))
    if error.retry_delay_s is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(round(error.retry_delay_s * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    if request_id:
        details.append(error_details_pb2.RequestInfo(request_id=request_id))
    status = status_pb2.Status(code=code_pb2.Code.Value(error.code), message=error.message)
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status
