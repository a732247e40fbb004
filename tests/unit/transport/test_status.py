"""Every error of the tree has a code and details that fit into a trailer and are safe to send.

The tree is the classes of domain/errors.py. Any other exception becomes INTERNAL, and only the request id is sent.
"""

from __future__ import annotations

import asyncio

import grpc
import pytest
from attnserve_server.domain import errors
from attnserve_server.transport.status import (
    DETAILS_KEY,
    TABLE,
    code_of,
    is_fault,
    name_of_code,
    plain,
    row_of,
    status_of,
    trailers_of,
)
from google.rpc import error_details_pb2, status_pb2
from hypothesis import given
from hypothesis import strategies as st

EXAMPLES: dict[errors.AttnserveError, grpc.StatusCode] = {
    errors.InvalidRequest.of("model", "empty"): grpc.StatusCode.INVALID_ARGUMENT,
    errors.ModelNotFound("tiny", "3"): grpc.StatusCode.NOT_FOUND,
    errors.AttentionUnavailable("tiny", "it has no sites"): grpc.StatusCode.FAILED_PRECONDITION,
    errors.TextUnavailable("tiny"): grpc.StatusCode.FAILED_PRECONDITION,
    errors.ResponseTooLarge(11, 10): grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.Overloaded("queue_full", 10, 11, 0.25): grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.NotServing("tiny", "draining", 1.5): grpc.StatusCode.UNAVAILABLE,
    errors.ModelFailed("tiny", "2", "its file is cut short"): grpc.StatusCode.FAILED_PRECONDITION,
    errors.RepositoryUnusable("the repository has no bundle"): grpc.StatusCode.FAILED_PRECONDITION,
    errors.Unsupported("models are not loaded by callers", "start it with --admin"): grpc.StatusCode.UNIMPLEMENTED,
    errors.DeadlineExpired(0.5): grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.RequestCancelled(): grpc.StatusCode.CANCELLED,
    errors.Unauthenticated("backed_off", 6.0): grpc.StatusCode.UNAUTHENTICATED,
    errors.PermissionDenied("attention", "nightly", "a selection of attention"): grpc.StatusCode.PERMISSION_DENIED,
    errors.InternalFault("id"): grpc.StatusCode.INTERNAL,
}


def detail(status: status_pb2.Status, kind):
    for packed in status.details:
        found = kind()
        if packed.Unpack(found):
            return found
    return None


def test_every_error_of_the_tree_has_a_row() -> None:
    tree = {
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.AttnserveError)
    }
    assert {row.error for row in TABLE} == tree - {errors.AttnserveError}


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_an_error_has_its_code_and_error_info(error: errors.AttnserveError) -> None:
    status = status_of(error, "my-id")
    assert code_of(status) is EXAMPLES[error]
    info = detail(status, error_details_pb2.ErrorInfo)
    assert (info.reason, info.domain) == (error.reason, "attnserve")
    assert dict(info.metadata) == error.metadata() | {"request_id": "my-id"}
    assert set(info.metadata) == {*row_of(error).metadata, "request_id"}
    assert "\n" not in status.message


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_retryable_errors_hold_the_retry_delay(error: errors.AttnserveError) -> None:
    retry = detail(status_of(error, ""), error_details_pb2.RetryInfo)
    assert (retry is not None) is row_of(error).retry
    if retry is not None:
        assert retry.retry_delay.ToTimedelta().total_seconds() == error.retry_delay_s  # type: ignore[attr-defined]


def test_an_invalid_request_names_its_fields() -> None:
    error = errors.InvalidRequest(
        errors.FieldViolation("sequences[0].text.text", "empty"), errors.FieldViolation("priority", "9 is none")
    )
    bad = detail(status_of(error, ""), error_details_pb2.BadRequest)
    assert [(found.field, found.description) for found in bad.field_violations] == [
        ("sequences[0].text.text", "empty"),
        ("priority", "9 is none"),
    ]


@pytest.mark.parametrize(
    "error", [ValueError("/home/me/secret.py, line 3"), OSError(2, "no", "/etc/passwd"), KeyError()]
)
def test_any_other_exception_is_internal_and_reports_only_the_request_id(error: Exception) -> None:
    status = status_of(error, "my-id")
    assert is_fault(error)
    assert code_of(status) is grpc.StatusCode.INTERNAL
    assert status.message == "internal error; request id my-id"
    assert b"secret" not in status.SerializeToString()
    assert b"passwd" not in status.SerializeToString()


def test_an_error_without_a_row_is_internal() -> None:
    class Strange(errors.AttnserveError):
        def metadata(self) -> dict[str, str]:
            return {"path": "/etc"}

    status = status_of(Strange("/etc"), "my-id")
    assert status.message == "internal error; request id my-id"
    assert b"/etc" not in status.SerializeToString()


def test_an_internal_fault_gets_the_id_of_its_request() -> None:
    assert status_of(errors.InternalFault(), "my-id").message == "internal error; request id my-id"


def test_a_subclass_has_the_status_of_its_parent() -> None:
    class Busy(errors.Overloaded):
        pass

    assert row_of(Busy("queue_full", 1, 2, 1.0)).code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert not is_fault(Busy("queue_full", 1, 2, 1.0))


def test_a_negative_retry_delay_is_sent_as_zero() -> None:
    retry = detail(status_of(errors.NotServing("", "draining", -1), ""), error_details_pb2.RetryInfo)
    assert retry.retry_delay.ToNanoseconds() == 0


def test_many_long_violations_fit_into_a_trailer() -> None:
    error = errors.InvalidRequest(*[errors.FieldViolation("f" * 500, "é" * 500)] * 40)
    status = status_of(error, "x" * 128)
    bad = detail(status, error_details_pb2.BadRequest)
    assert 1 <= len(bad.field_violations) <= errors.MAX_VIOLATIONS
    assert status.ByteSize() <= 4096 + 128  # what packing adds


def test_short_violations_are_sent_up_to_the_limit() -> None:
    error = errors.InvalidRequest(*[errors.FieldViolation("f", "d")] * 40)
    assert len(detail(status_of(error, ""), error_details_pb2.BadRequest).field_violations) == errors.MAX_VIOLATIONS


def test_the_trailer_is_the_serialised_status() -> None:
    status = status_of(errors.ModelNotFound("a", ""), "")
    ((key, value),) = trailers_of(status)
    assert key == DETAILS_KEY
    assert status_pb2.Status.FromString(value) == status


@given(st.text(max_size=400))
def test_a_status_holds_only_printable_ascii(text: str) -> None:
    status = status_of(errors.ModelNotFound(text, text), text)
    info = detail(status, error_details_pb2.ErrorInfo)
    for shown in (status.message, *info.metadata.values()):
        assert shown.isascii()
        assert shown.isprintable()
        assert len(shown) <= 512


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a b", "a b"),
        ("\r\n\x1b[", r"\r\n\x1b["),
        ("x" * 10, "x" * 10),
        ("x" * 11, "xxxxxxx..."),
        ("\xe9" * 9, r"\xe9\xe..."),
    ],
)
def test_text_is_escaped_and_cut_to_ten_characters(text: str, shown: str) -> None:
    assert plain(text, 10) == shown


@pytest.mark.parametrize(
    ("error", "left_s", "name"),
    [
        (asyncio.CancelledError(), None, "CANCELLED"),
        (asyncio.CancelledError(), 0.006, "CANCELLED"),
        (asyncio.CancelledError(), 0.004, "DEADLINE_EXCEEDED"),
        (asyncio.CancelledError(), -1.0, "DEADLINE_EXCEEDED"),
        (errors.NotServing("", "draining"), -1.0, "UNAVAILABLE"),
        (ValueError(), None, "INTERNAL"),
    ],
)
def test_a_cancelled_call_ends_with_the_code_that_its_deadline_implies(
    error: BaseException, left_s: float | None, name: str
) -> None:
    assert name_of_code(error, left_s) == name
