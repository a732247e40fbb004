"""The error tree that callers catch: one class for each thing that can be done about it.

    AttnserveError                code, reason, metadata, request_id, violations, retry_delay_s
    +-- InvalidRequest            mend the request: `violations` names field, limit and value
    +-- ModelNotFound             ask for another model: `model`, `version`
    +-- AttentionUnavailable      do not ask this model for this: `model`
    +-- TextUnavailable           send token ids or arrays instead: `model`
    +-- ResponseTooLarge          ask for less: `predicted_bytes`, `allowed_bytes`
    +-- Overloaded                try again later, which the client already did: `cause`, `retry_delay_s`
    +-- NotServing                try again later, or elsewhere: `model`, `state`
    |   +-- ServerUnreachable     no server answered at all
    +-- DeadlineExpired           wait longer
    +-- RequestCancelled          nothing: the caller left, or the client was closed
    +-- InternalFault             tell the operator the `request_id`
    +-- BadAnswer                 the answer breaks the contract: the server and this client do not match

`_status` alone turns what gRPC raises into these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

_NOTHING: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One field at fault: its path in the request, and what was wrong with limit and value."""

    field: str
    description: str


class AttnserveError(Exception):
    """Base of everything that the client raises about a call.

    Attributes:
        code: The gRPC status code's name, for example `INVALID_ARGUMENT`.
        reason: `google.rpc.ErrorInfo.reason`, for example `OVERLOADED`; empty where the server sent none.
        metadata: The machine-readable facts of the error, by name.
        request_id: The failed request's id; empty where it is not known.
        violations: The fields at fault; empty except on an invalid request.
        retry_delay_s: When to try again, in seconds, as the server told; None where it did not.
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
    """Makes an error again that travelled between processes."""
    return kind(message, **facts)  # type: ignore[arg-type] # what __reduce__ wrote


class _AboutModel(AttnserveError):
    """Shared by the errors that name a model."""

    @property
    def model(self) -> str:
        """The model that was asked for; empty where the server did not say."""
        return self.metadata.get("model", "")


class InvalidRequest(AttnserveError):
    """The request is wrong in itself; sending it again cannot help. `violations` says where."""

    @classmethod
    def of(cls, field: str, description: str) -> InvalidRequest:
        """A request that this client refuses to send, with one field at fault."""
        return cls(
            f"{field}: {description}",
            code="INVALID_ARGUMENT",
            reason="INVALID_REQUEST",
            violations=(FieldViolation(field, description),),
        )


class ModelNotFound(_AboutModel):
    """There is no such model or version."""

    @property
    def version(self) -> str:
        """The version that was asked for; empty for the highest."""
        return self.metadata.get("version", "")


class AttentionUnavailable(_AboutModel):
    """The model cannot give the attention that was asked for."""


class TextUnavailable(_AboutModel):
    """The model has no tokenizer, so it takes token ids or arrays only."""


class ResponseTooLarge(AttnserveError):
    """The answer would hold more bytes of tensor data than the server allows. Nothing was run."""

    @property
    def predicted_bytes(self) -> int:
        """Bytes that the answer would hold; 0 where the server did not say."""
        return _integer(self.metadata.get("predicted_bytes"))

    @property
    def allowed_bytes(self) -> int:
        """Most bytes that the server allows; 0 where it did not say."""
        return _integer(self.metadata.get("allowed_bytes"))


class Overloaded(AttnserveError):
    """The server cannot take this request now; the retries that were safe have been made."""

    @property
    def cause(self) -> str:
        """Which bound was met, for example `queue_full` or `predicted_wait`."""
        return self.metadata.get("cause", "")


class NotServing(_AboutModel):
    """The model or the server is not answering now: loading, draining, or failed to load."""

    @property
    def state(self) -> str:
        """What it is doing instead; empty where the server did not say."""
        return self.metadata.get("state", "")


class ServerUnreachable(NotServing):
    """No server answered: wrong address, not started, or the connection broke."""


class DeadlineExpired(AttnserveError):
    """The timeout passed before the answer was there, retries included."""


class RequestCancelled(AttnserveError):
    """The call was cancelled, or its client closed."""


class InternalFault(AttnserveError):
    """The server's fault. Its log has the rest under `request_id`."""


class BadAnswer(AttnserveError):
    """The answer breaks the contract, so that the server and this client do not match."""


def _integer(text: str | None) -> int:
    return int(text) if text and text.isdecimal() else 0
