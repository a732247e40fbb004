"""Errors as HTTP answers: one function gives any error of the table the form that the clients of its path expect.

`/v2/...` (Open Inference Protocol)      {"error": "..."}
`/v1/embeddings`, `/v1/models`           {"error": {"message", "type", "code"}}, as OpenAI's
`/rerank`, `/v1/rerank`, `/v2/rerank`    {"message", "error", "error_type"}, as Cohere's and that of TEI
all others                               problem details (RFC 9457)

Each has `reason` and `request_id` too, and the header `x-request-id`; 429 and 503 have `retry-after`. Raises nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import msgspec
from starlette.responses import Response

from attnserve_server.domain import errors
from attnserve_server.transport.status import http_status_of, is_fault, plain

REQUEST_ID: Final = "x-request-id"
_MAX_MESSAGE: Final = 512
_RERANK: Final = frozenset({"/rerank", "/v1/rerank", "/v2/rerank"})
_TYPES: Final[Mapping[int, str]] = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
_TEI_TYPES: Final[Mapping[int, str]] = {429: "overloaded", 503: "unhealthy"}


class HttpError(errors.InvalidRequest):
    """A request that HTTP alone can have wrong. `status` is its own."""

    status = 400


class PathNotFound(HttpError):
    """There is no such path."""

    reason = "PATH_NOT_FOUND"
    status = 404


class MethodNotAllowed(HttpError):
    """The path has other methods."""

    reason = "METHOD_NOT_ALLOWED"
    status = 405


class BodyNotReceived(HttpError):
    """The body did not arrive in time."""

    reason = "BODY_NOT_RECEIVED"
    status = 408


class BodyTooLarge(HttpError):
    """The body is longer than any request of the models can be."""

    reason = "BODY_TOO_LARGE"
    status = 413


class UnsupportedMediaType(HttpError):
    """The body is compressed, or no JSON by its content type."""

    reason = "UNSUPPORTED_MEDIA_TYPE"
    status = 415


class CertificateRequired(errors.PermissionDenied):
    """The connection has no client certificate."""

    reason = "CERTIFICATE_REQUIRED"

    def __init__(self) -> None:
        self.scope = self.token = ""
        Exception.__init__(self, "this path needs a client certificate of --tls-client-ca")

    def metadata(self) -> dict[str, str]:
        """Nothing: a certificate has no scope."""
        return {}


def status_of(error: BaseException) -> int:
    """Return the HTTP status of an error."""
    return error.status if isinstance(error, HttpError) else http_status_of(error)


def response_of(error: BaseException, request_id: str, path: str) -> Response:
    """Return the answer to a request that failed.

    Args:
        error: what its handler raised, cancellation excepted.
        request_id: of the request.
        path: as requested, which decides the form.
    """
    shown = _shown(error, request_id)
    status = status_of(shown)
    headers = {REQUEST_ID: request_id} if request_id else {}
    retry_s = _retry_s(shown)
    if retry_s is not None:
        headers["retry-after"] = str(max(1, math.ceil(retry_s)))
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    elif status in {408, 413}:
        headers["connection"] = "close"  # the rest of the body is not read
    if status >= 500 and retry_s is None:
        headers["x-should-retry"] = "false"  # OpenAI's clients retry all of these by default
    media_type, content = _content(shown, status, request_id, path)
    return Response(msgspec.json.encode(content), status, headers, media_type)


def content_of(error: BaseException, request_id: str, path: str) -> dict[str, Any]:
    """Return the body of that answer, for an event of a stream."""
    shown = _shown(error, request_id)
    return _content(shown, status_of(shown), request_id, path)[1]


def _content(shown: errors.AttnserveError, status: int, request_id: str, path: str) -> tuple[str, dict[str, Any]]:
    message = plain(str(shown), _MAX_MESSAGE)
    named: dict[str, Any] = {"reason": shown.reason, "request_id": request_id}
    if path in _RERANK:
        kind = _TEI_TYPES.get(status, "validation" if status < 500 else "backend")
        return "application/json", {"message": message, "error": message, "error_type": kind, **named}
    if path == "/v2" or path.startswith("/v2/"):
        return "application/json", {"error": message, **named}
    if is_openai(path):
        kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        inner = {"message": message, "type": kind, "param": _param(shown), "code": shown.reason, **named}
        return "application/json", {"error": inner}
    content = {"type": "about:blank", "status": status, "detail": message, **named}
    metadata = {key: plain(value) for key, value in shown.metadata().items() if key != "request_id"}
    if metadata:
        content["metadata"] = metadata
    if isinstance(shown, errors.InvalidRequest):
        content["violations"] = [
            {"field": plain(one.field), "description": plain(one.description)}
            for one in shown.violations[: errors.MAX_VIOLATIONS]
        ]
    return "application/problem+json", content


def is_openai(path: str) -> bool:
    """Return whether OpenAI's clients call this path."""
    return path in {"/v1/embeddings", "/v1/models"} or (path.startswith("/v1/models/") and not path.endswith(":infer"))


def _shown(error: BaseException, request_id: str) -> errors.AttnserveError:
    """Return what the caller may know of an error."""
    if isinstance(error, errors.AttnserveError) and (not is_fault(error) or isinstance(error, errors.InternalFault)):
        return error
    return errors.InternalFault(request_id)


def _param(error: errors.AttnserveError) -> str | None:
    named = isinstance(error, errors.InvalidRequest) and error.violations
    return plain(error.violations[0].field) if named else None  # type: ignore[attr-defined]


def _retry_s(error: errors.AttnserveError) -> float | None:
    """Return the seconds after which a retry may succeed; None if none may."""
    if isinstance(error, errors.Overloaded | errors.NotServing):
        return error.retry_delay_s
    if isinstance(error, errors.Unauthenticated) and error.retry_delay_s:
        return error.retry_delay_s
    return None
