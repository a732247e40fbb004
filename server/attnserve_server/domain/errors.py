"""The error tree: one class for each thing that a caller can do about it. Fields, not sentences.

    AttnserveError
    +-- InvalidRequest           mend the request                     INVALID_ARGUMENT
    +-- ModelNotFound            ask for another model                NOT_FOUND
    +-- AttentionUnavailable     do not ask this model for this       FAILED_PRECONDITION
    +-- TextUnavailable          send tensors instead                 FAILED_PRECONDITION
    +-- ResponseTooLarge         ask for less                         RESOURCE_EXHAUSTED
    +-- Overloaded               try again later                      RESOURCE_EXHAUSTED, with RetryInfo
    +-- NotServing               try again later, or elsewhere        UNAVAILABLE, with RetryInfo
    +-- DeadlineExpired          wait longer                          DEADLINE_EXCEEDED
    +-- RequestCancelled         nothing: the caller left             CANCELLED
    +-- InternalFault            tell the operator the request id     INTERNAL

`transport/status.py` alone maps these to gRPC.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


class AttnserveError(Exception):
    """Base of everything that the server raises on purpose. Messages are safe to show to callers."""

    reason: ClassVar[str] = "UNSPECIFIED"

    def metadata(self) -> dict[str, str]:
        """Machine-readable facts for `google.rpc.ErrorInfo.metadata`."""
        return {}


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One field at fault: its path in the request, and what was wrong with limit and value."""

    field: str
    description: str


class InvalidRequest(AttnserveError):
    """The request is wrong in itself; sending it again cannot help."""

    reason = "INVALID_REQUEST"

    def __init__(self, *violations: FieldViolation) -> None:
        self.violations = violations
        super().__init__("; ".join(f"{violation.field}: {violation.description}" for violation in violations))

    @classmethod
    def of(cls, field: str, description: str) -> InvalidRequest:
        """A request with one field at fault."""
        return cls(FieldViolation(field, description))


class ModelNotFound(AttnserveError):
    """There is no such model or version."""

    reason = "MODEL_NOT_FOUND"

    def __init__(self, model: str, version: str) -> None:
        self.model, self.version = model, version
        super().__init__(f"no model {model!r}" + (f" of version {version!r}" if version else ""))

    def metadata(self) -> dict[str, str]:
        """What was asked for."""
        return {"model": self.model, "version": self.version}


class AttentionUnavailable(AttnserveError):
    """The model cannot give the attention that was asked for."""

    reason = "ATTENTION_UNAVAILABLE"

    def __init__(self, model: str, why: str) -> None:
        self.model, self.why = model, why
        super().__init__(f"model {model!r}: {why}")

    def metadata(self) -> dict[str, str]:
        """The model."""
        return {"model": self.model}


class TextUnavailable(AttnserveError):
    """The model has no tokenizer, so it takes tensors only."""

    reason = "TEXT_UNAVAILABLE"

    def __init__(self, model: str) -> None:
        self.model = model
        super().__init__(f"model {model!r} has no tokenizer: send tensors")

    def metadata(self) -> dict[str, str]:
        """The model."""
        return {"model": self.model}


class ResponseTooLarge(AttnserveError):
    """The answer would hold more bytes of tensor data than the server allows."""

    reason = "RESPONSE_TOO_LARGE"

    def __init__(self, predicted_bytes: int, allowed_bytes: int) -> None:
        self.predicted_bytes, self.allowed_bytes = predicted_bytes, allowed_bytes
        super().__init__(f"the answer would hold {predicted_bytes} bytes; at most {allowed_bytes} are allowed")

    def metadata(self) -> dict[str, str]:
        """Both byte counts."""
        return {"predicted_bytes": str(self.predicted_bytes), "allowed_bytes": str(self.allowed_bytes)}


class Overloaded(AttnserveError):
    """The queue cannot take this request now; `cause` is `queue_full`, `queue_bytes` or `predicted_wait`."""

    reason = "OVERLOADED"

    def __init__(self, cause: str, limit: float, value: float, retry_delay_s: float) -> None:
        self.cause, self.limit, self.value, self.retry_delay_s = cause, limit, value, retry_delay_s
        said = f"{_shown(value)} exceeds {_shown(limit)}; try again in {retry_delay_s:.3f} s"
        super().__init__(f"overloaded ({cause}): {said}")

    def metadata(self) -> dict[str, str]:
        """Which bound, its limit and the value that met it."""
        return {"cause": self.cause, "limit": _shown(self.limit), "value": _shown(self.value)}


class NotServing(AttnserveError):
    """The model or the server is not answering now: loading, draining, or failed to load."""

    reason = "NOT_SERVING"

    def __init__(self, model: str, state: str, retry_delay_s: float = 1.0) -> None:
        self.model, self.state, self.retry_delay_s = model, state, retry_delay_s
        super().__init__(f"model {model!r} is {state}" if model else f"the server is {state}")

    def metadata(self) -> dict[str, str]:
        """The model and its state."""
        return {"model": self.model, "state": self.state}


class DeadlineExpired(AttnserveError):
    """The caller's deadline passed before the answer was ready, or is so `early` ahead that no run would end before."""

    reason = "DEADLINE_EXPIRED"

    def __init__(self, waited_s: float, *, early: bool = False) -> None:
        self.waited_s = waited_s
        why = "no run would end before the deadline: given up" if early else "the deadline passed"
        super().__init__(f"{why} after {waited_s:.3f} s")


class RequestCancelled(AttnserveError):
    """The caller cancelled the request."""

    reason = "CANCELLED"

    def __init__(self) -> None:
        super().__init__("cancelled by the caller")


class InternalFault(AttnserveError):
    """Our fault. The caller learns the request id; the log has the rest."""

    reason = "INTERNAL"

    def __init__(self, request_id: str = "") -> None:
        self.request_id = request_id
        super().__init__(f"internal error; request id {request_id}" if request_id else "internal error")

    def metadata(self) -> dict[str, str]:
        """The request id, to find the log line by."""
        return {"request_id": self.request_id} if self.request_id else {}


def _shown(number: float) -> str:
    """Whole numbers (bytes, sequences) in full, seconds to six digits."""
    return str(int(number)) if float(number).is_integer() else f"{number:g}"
