"""The error tree, one class for each remedy that a caller has, and the collector of a request's violations.

    AttnserveError
    +-- InvalidRequest           fix the request                      INVALID_ARGUMENT
    +-- ModelNotFound            name another model                   NOT_FOUND
    +-- AttentionUnavailable     select other sites, or another model FAILED_PRECONDITION
    +-- TextUnavailable          send tensors instead                 FAILED_PRECONDITION
    +-- ResponseTooLarge         request less                         RESOURCE_EXHAUSTED
    +-- Overloaded               retry after the delay                RESOURCE_EXHAUSTED, with RetryInfo
    +-- NotServing               retry after the delay, or elsewhere  UNAVAILABLE, with RetryInfo
    +-- ModelFailed              name another version, or repair it   FAILED_PRECONDITION
    +-- RepositoryUnusable       repair the repository                FAILED_PRECONDITION
    +-- Unsupported              restart the server with other flags  UNIMPLEMENTED
    +-- DeadlineExpired          set a longer deadline                DEADLINE_EXCEEDED
    +-- RequestCancelled         none: the caller cancelled           CANCELLED
    +-- Unauthenticated          present a valid token                UNAUTHENTICATED
    +-- PermissionDenied         use a token with the scope           PERMISSION_DENIED
    +-- InternalFault            report the request id                INTERNAL
    +-- EngineCrashed            report the request id                INTERNAL

Errors hold fields, from which `transport/status.py`, and no other module, makes gRPC statuses.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import ClassVar, Final, Self

MAX_VIOLATIONS: Final = 16
"""Most violations that are reported for one request: the list travels in a gRPC trailer, whose size is bounded."""
_MAX_QUOTED: Final = 64


class AttnserveError(Exception):
    """Base of every error that the server raises on purpose. Its message may be sent to the caller."""

    reason: ClassVar[str] = "UNSPECIFIED"

    def metadata(self) -> dict[str, str]:
        """Machine-readable facts for `google.rpc.ErrorInfo.metadata`."""
        return {}


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One invalid field: its path in the request, and a description with the value and its limit."""

    field: str
    description: str


class InvalidRequest(AttnserveError):
    """The request itself is invalid: a retry fails again."""

    reason = "INVALID_REQUEST"

    def __init__(self, *violations: FieldViolation) -> None:
        self.violations = violations
        super().__init__("; ".join(f"{violation.field}: {violation.description}" for violation in violations))

    @classmethod
    def of(cls, field: str, description: str) -> Self:
        """Make the error for one invalid field."""
        return cls(FieldViolation(field, description))

    def relative_to(self, path: str) -> InvalidRequest:
        """Return the error with field paths that begin after `path`."""
        inner = (FieldViolation(one.field.removeprefix(path), one.description) for one in self.violations)
        return InvalidRequest(*inner)


class Violations:
    """Collects what is wrong with one request, so that one answer reports all of it; at most `MAX_VIOLATIONS`.

    As a context manager it takes in the `InvalidRequest` that a check of one part of the request raises:

        with violations:
            priority = priority_of(message.priority)
    """

    def __init__(self) -> None:
        self._found: list[FieldViolation] = []

    def __len__(self) -> int:
        return len(self._found)

    @property
    def full(self) -> bool:
        """Whether the limit is reached, so that further checks have no use."""
        return len(self._found) >= MAX_VIOLATIONS

    def add(self, field: str, description: str) -> None:
        """Add a violation of `field`, unless the limit is reached."""
        if not self.full:
            self._found.append(FieldViolation(field, description))

    def add_once(self, field: str, description: str) -> None:
        """Add a violation of `field`, unless that field has one already."""
        if all(known.field != field for known in self._found):
            self.add(field, description)

    def extend(self, violations: Iterable[FieldViolation]) -> None:
        """Add these, up to the limit."""
        for violation in violations:
            self.add(violation.field, violation.description)

    def raise_any(self) -> None:
        """Raise InvalidRequest with all violations, if there are any."""
        if self._found:
            raise InvalidRequest(*self._found)

    def __enter__(self) -> Violations:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> bool:
        if not isinstance(error, InvalidRequest):
            return False
        self.extend(error.violations)
        return True


def quoted(text: str) -> str:
    """Quote a caller's text for a message: escaped to ASCII, cut to 64 characters."""
    return ascii(text if len(text) <= _MAX_QUOTED else text[:_MAX_QUOTED] + "...")


class ModelNotFound(AttnserveError):
    """The catalog has no such model or version."""

    reason = "MODEL_NOT_FOUND"

    def __init__(self, model: str, version: str) -> None:
        self.model, self.version = model, version
        super().__init__(f"no model {model!r}" + (f" of version {version!r}" if version else ""))

    def metadata(self) -> dict[str, str]:
        """The requested name and version."""
        return {"model": self.model, "version": self.version}


class AttentionUnavailable(AttnserveError):
    """The model cannot return the selected attention."""

    reason = "ATTENTION_UNAVAILABLE"

    def __init__(self, model: str, why: str) -> None:
        self.model, self.why = model, why
        super().__init__(f"model {model!r}: {why}")

    def metadata(self) -> dict[str, str]:
        """The model."""
        return {"model": self.model}


class TextUnavailable(AttnserveError):
    """The request holds text, and the model has no tokenizer."""

    reason = "TEXT_UNAVAILABLE"

    def __init__(self, model: str) -> None:
        self.model = model
        super().__init__(f"model {model!r} has no tokenizer: send tensors")

    def metadata(self) -> dict[str, str]:
        """The model."""
        return {"model": self.model}


class ResponseTooLarge(AttnserveError):
    """The response would hold more bytes of tensor data than the server allows."""

    reason = "RESPONSE_TOO_LARGE"

    def __init__(self, predicted_bytes: int, allowed_bytes: int) -> None:
        self.predicted_bytes, self.allowed_bytes = predicted_bytes, allowed_bytes
        super().__init__(f"the answer would hold {predicted_bytes} bytes; at most {allowed_bytes} are allowed")

    def metadata(self) -> dict[str, str]:
        """Both byte counts."""
        return {"predicted_bytes": str(self.predicted_bytes), "allowed_bytes": str(self.allowed_bytes)}


class Overloaded(AttnserveError):
    """The queue has no room for this request now, or its token's quota is used up.

    `cause` is `queue_full`, `queue_bytes`, `predicted_wait` or `quota`; before a message is read `calls`, `streams` or
    `bodies`, and for an answer that has no room `unread_bytes`.
    """

    reason = "OVERLOADED"

    def __init__(self, cause: str, limit: float, value: float, retry_delay_s: float) -> None:
        self.cause, self.limit, self.value, self.retry_delay_s = cause, limit, value, retry_delay_s
        excess = f"{_number(value)} exceeds {_number(limit)}"
        if cause == "quota":
            excess = f"the token's {_number(limit)} sequences a second are used up"
        super().__init__(f"overloaded ({cause}): {excess}; try again in {retry_delay_s:.3f} s")

    def metadata(self) -> dict[str, str]:
        """The limit's name, the limit, and the value that exceeds it."""
        return {"cause": self.cause, "limit": _number(self.limit), "value": _number(self.value)}


class NotServing(AttnserveError):
    """The model or the server is loading or draining, or has failed while it served."""

    reason = "NOT_SERVING"

    def __init__(self, model: str, state: str, retry_delay_s: float = 1.0) -> None:
        self.model, self.state, self.retry_delay_s = model, state, retry_delay_s
        super().__init__(f"model {model!r} is {state}" if model else f"the server is {state}")

    def metadata(self) -> dict[str, str]:
        """The model and its state."""
        return {"model": self.model, "state": self.state}


class ModelFailed(AttnserveError):
    """The model could not be loaded. A retry of the same request fails again until its bundle is repaired."""

    reason = "MODEL_FAILED"

    def __init__(self, model: str, version: str, why: str) -> None:
        self.model, self.version, self.why = model, version, why
        super().__init__(f"model {model!r}, version {version!r}, could not be loaded: {why}")

    def metadata(self) -> dict[str, str]:
        """The model, its version, and why it could not be loaded."""
        return {"model": self.model, "version": self.version, "why": self.why}


class RepositoryUnusable(AttnserveError):
    """The repository cannot be compared with what is loaded. Nothing was changed."""

    reason = "REPOSITORY_UNUSABLE"

    def __init__(self, why: str) -> None:
        super().__init__(f"nothing was changed: {why}")


class Unsupported(AttnserveError):
    """The server was started so that it cannot do this."""

    reason = "UNSUPPORTED"

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(f"{what}; {remedy}")


class DeadlineExpired(AttnserveError):
    """The caller's deadline passed before the answer was ready.

    `early`: the deadline has not passed, but even a run started now would end after it.
    """

    reason = "DEADLINE_EXPIRED"

    def __init__(self, waited_s: float, *, early: bool = False) -> None:
        self.waited_s = waited_s
        why = "dropped, because no run would end before the deadline," if early else "the deadline passed"
        super().__init__(f"{why} after {waited_s:.3f} s")


class RequestCancelled(AttnserveError):
    """The caller cancelled the request."""

    reason = "CANCELLED"

    def __init__(self) -> None:
        super().__init__("cancelled by the caller")


class Unauthenticated(AttnserveError):
    """The call has no valid bearer token; `cause` is `missing`, `malformed`, `unknown` or `backed_off`.

    `backed_off`: the address sent too many unknown tokens, and this one was not examined.
    """

    reason = "UNAUTHENTICATED"

    def __init__(self, cause: str, retry_delay_s: float = 0.0) -> None:
        self.cause, self.retry_delay_s = cause, retry_delay_s
        super().__init__(
            {
                "missing": "no token; send the metadata, or the header, `authorization: Bearer TOKEN`",
                "malformed": "the authorization is not `Bearer TOKEN`",
                "unknown": "the token is unknown, expired or revoked; ask the operator for another",
                "backed_off": "too many unknown tokens came from this address, so that this one was not examined; "
                f"try again in {retry_delay_s:.0f} s",
            }[cause]
        )

    def metadata(self) -> dict[str, str]:
        """What is wrong with the token."""
        return {"cause": self.cause}


class PermissionDenied(AttnserveError):
    """The token is valid, and lacks the scope of the method or of a part of the request."""

    reason = "PERMISSION_DENIED"

    def __init__(self, scope: str, token: str, what: str) -> None:
        self.scope, self.token = scope, token
        super().__init__(f"{what} needs the scope {scope!r}, which the token {token!r} lacks; ask the operator for it")

    def metadata(self) -> dict[str, str]:
        """The missing scope, and the token's name."""
        return {"scope": self.scope, "token": self.token}


class InternalFault(AttnserveError):
    """An internal error. The caller gets the request id; the log has the details."""

    reason = "INTERNAL"

    def __init__(self, request_id: str = "") -> None:
        self.request_id = request_id
        super().__init__(f"internal error; request id {request_id}" if request_id else "internal error")

    def metadata(self) -> dict[str, str]:
        """The request id, which the log line has too."""
        return {"request_id": self.request_id} if self.request_id else {}


class EngineCrashed(AttnserveError):
    """The model's engine crashed, hung or ran out of memory with this request alone in its run: do not retry it."""

    reason = "ENGINE_CRASHED"

    def __init__(self, model: str) -> None:
        self.model = model
        super().__init__(f"the engine of model {model!r} ends when it runs this request; it was tried alone")

    def metadata(self) -> dict[str, str]:
        """The model."""
        return {"model": self.model}


def _number(number: float) -> str:
    """Format whole numbers (bytes, sequences) in full, and seconds with six digits."""
    return str(int(number)) if float(number).is_integer() else f"{number:g}"
