"""The errors that the client raises about a call: one class for each thing that a caller can do about it.

    AttnserveError                code, reason, metadata, request_id, violations, retry_delay_s
    +-- InvalidRequest            fix the request: `violations` lists field, value and limit
    +-- ModelNotFound             use another model: `model`, `version`
    +-- AttentionUnavailable      omit this selection for this model: `model`
    +-- TextUnavailable           send token ids or arrays instead: `model`
    +-- ResponseTooLarge          request less: `predicted_bytes`, `allowed_bytes`
    +-- Overloaded                retry later, after the client's own retries: `cause`, `retry_delay_s`
    +-- NotServing                retry later, or elsewhere: `model`, `state`
    |   +-- ServerUnreachable     no server answered at all
    +-- ModelFailed               name another version, or ask the operator: `model`, `version`, `why`
    +-- RepositoryUnusable        repair the server's repository; nothing was changed
    +-- Unsupported               start the server so that it can do this, or use a newer one
    +-- DeadlineExpired           set a longer timeout
    +-- RequestCancelled          nothing: the call was cancelled, or the client was closed
    +-- Unauthenticated           send a valid token: `cause`
    +-- PermissionDenied          use a token with the `scope`, or omit what needs it
    +-- InternalFault             report the `request_id` to the operator
    +-- BadAnswer                 use a server and a client of matching versions: the response breaks the contract

`_status` alone maps gRPC statuses to these classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

_NOTHING: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One invalid field.

    Attributes:
        field: Its path in the request, for example `attention.layers[0]`.
        description: The value received and the limit.
    """

    field: str
    description: str


class AttnserveError(Exception):
    """Base of all errors that the client raises about a call.

    Attributes:
        code: Name of the gRPC status code, for example `INVALID_ARGUMENT`.
        reason: `google.rpc.ErrorInfo.reason`, for example `OVERLOADED`; empty if the server sent none.
        metadata: The error's machine-readable facts, by name.
        request_id: Id of the failed request; empty if unknown.
        violations: The invalid fields; empty except for an invalid request.
        retry_delay_s: Seconds after which the server accepts a retry; None if it gave no delay.
    """

    def __init__(
        self,
        message: str,
        *,
        code: str = "UNKNOWN",
        reason: str = "",
        metadata: Mapping[str, str] = _NOTHING,
        request_id: str = "",
        violations: tuple[FieldViolation, ...] = (),
        retry_delay_s: float | None = None,
    ) -> None:
        self.message = message
        self.code = code
        self.reason = reason
        self.metadata = MappingProxyType(dict(metadata))
        self.request_id = request_id
        self.violations = violations
        self.retry_delay_s = retry_delay_s
        super().__init__(message)

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (
            type(self),
            self.message,
            {
                "code": self.code,
                "reason": self.reason,
                "metadata": dict(self.metadata),
                "request_id": self.request_id,
                "violations": self.violations,
                "retry_delay_s": self.retry_delay_s,
            },
        )


def _rebuild(kind: type[AttnserveError], message: str, facts: dict[str, object]) -> AttnserveError:
    """Restore a pickled error."""
    return kind(message, **facts)  # type: ignore[arg-type] # what __reduce__ wrote


class _AboutModel(AttnserveError):
    """Base of the errors that name a model."""

    @property
    def model(self) -> str:
        """The requested model; empty if the server did not name it."""
        return self.metadata.get("model", "")


class InvalidRequest(AttnserveError):
    """The request is invalid, and a retry fails again. `violations` lists the fields."""

    @classmethod
    def of(cls, field: str, description: str) -> InvalidRequest:
        """Return the error for one invalid field of a request that this client does not send."""
        return cls(
            f"{field}: {description}",
            code="INVALID_ARGUMENT",
            reason="INVALID_REQUEST",
            violations=(FieldViolation(field, description),),
        )


class ModelNotFound(_AboutModel):
    """The server has no such model or version."""

    @property
    def version(self) -> str:
        """The requested version; empty for the highest that is ready."""
        return self.metadata.get("version", "")


class AttentionUnavailable(_AboutModel):
    """The model cannot return the selected attention."""


class TextUnavailable(_AboutModel):
    """The model has no tokenizer, so it takes token ids or arrays only."""


class ResponseTooLarge(AttnserveError):
    """The response would exceed the server's limit on tensor data. The model did not run."""

    @property
    def predicted_bytes(self) -> int:
        """Bytes of tensor data that the response would hold; 0 if the server did not report them."""
        return _integer(self.metadata.get("predicted_bytes"))

    @property
    def allowed_bytes(self) -> int:
        """The server's limit in bytes; 0 if it did not report one."""
        return _integer(self.metadata.get("allowed_bytes"))


class Overloaded(AttnserveError):
    """The server refused the request because of its load, after all retries that the policy allows."""

    @property
    def cause(self) -> str:
        """The limit that was reached, for example `queue_full` or `predicted_wait`."""
        return self.metadata.get("cause", "")


class NotServing(_AboutModel):
    """The model or the server does not serve now: it is loading or draining, or failed while it served."""

    @property
    def state(self) -> str:
        """The model's state, for example `draining`; empty if the server did not report it."""
        return self.metadata.get("state", "")


class ServerUnreachable(NotServing):
    """No server answered: the address is wrong, the server is not running, or the connection broke."""


class ModelFailed(_AboutModel):
    """The model could not be loaded. A retry fails again until its bundle is repaired."""

    @property
    def version(self) -> str:
        """The model's version; empty if the server did not report it."""
        return self.metadata.get("version", "")

    @property
    def why(self) -> str:
        """Why it could not be loaded; empty if the server did not report it."""
        return self.metadata.get("why", "")


class RepositoryUnusable(AttnserveError):
    """The server's repository cannot be compared with what is loaded. Nothing was changed."""


class Unsupported(AttnserveError):
    """The server does not have the method, or was started without it."""


class DeadlineExpired(AttnserveError):
    """The timeout passed before the response arrived, retries included."""


class RequestCancelled(AttnserveError):
    """The call was cancelled, or its client was closed."""


class Unauthenticated(AttnserveError):
    """The server needs a valid token. It is never retried."""

    @property
    def cause(self) -> str:
        """What is wrong with the token: `missing`, `malformed`, `unknown` or `backed_off`; empty if not reported."""
        return self.metadata.get("cause", "")


class PermissionDenied(AttnserveError):
    """The token lacks a scope that the call needs. It is never retried."""

    @property
    def scope(self) -> str:
        """The missing scope, for example `attention`; empty if the server did not report it."""
        return self.metadata.get("scope", "")

    @property
    def token(self) -> str:
        """The name that the operator gave the token; empty if the server did not report it."""
        return self.metadata.get("token", "")


class InternalFault(AttnserveError):
    """Internal error of the server. Its log has the details under `request_id`."""


class BadAnswer(AttnserveError):
    """The response breaks the contract: the versions of server and client do not match."""


def _integer(text: str | None) -> int:
    return int(text) if text and text.isdecimal() else 0
