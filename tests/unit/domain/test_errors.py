"""The error tree: one reason for each class, and messages that give limit and value in full."""

from __future__ import annotations

import pytest
from attnserve_server.domain import errors
from attnserve_server.domain.errors import AttnserveError, FieldViolation, InvalidRequest, Overloaded

RAISED = [
    InvalidRequest.of("a.b[0]", "3 exceeds 2"),
    errors.ModelNotFound("m", "3"),
    errors.AttentionUnavailable("m", "it has no attention sites"),
    errors.TextUnavailable("m"),
    errors.ResponseTooLarge(11, 10),
    Overloaded("queue_bytes", 2**30, 2**30 + 1, 0.25),
    errors.NotServing("m", "draining"),
    errors.DeadlineExpired(0.5),
    errors.RequestCancelled(),
    errors.InternalFault("r-1"),
]


def test_every_class_is_here_with_a_reason_of_its_own():
    classes = {each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, AttnserveError)}
    assert classes - {AttnserveError} == {type(each) for each in RAISED}
    assert len({each.reason for each in RAISED}) == len(RAISED)
    assert AttnserveError.reason not in {each.reason for each in RAISED}


@pytest.mark.parametrize("error", RAISED, ids=lambda error: type(error).__name__)
def test_metadata_is_text_and_the_message_is_not_empty(error):
    assert str(error)
    assert all(isinstance(value, str) for pair in error.metadata().items() for value in pair)


def test_violations_are_told_together():
    error = InvalidRequest(FieldViolation("a", "1 is below 2"), FieldViolation("b", "missing"))
    assert str(error) == "a: 1 is below 2; b: missing"
    assert [violation.field for violation in error.violations] == ["a", "b"]


def test_byte_counts_are_not_rounded():
    error = Overloaded("queue_bytes", 1073741824, 1073741825, 0.25)
    assert str(error) == "overloaded (queue_bytes): 1073741825 exceeds 1073741824; try again in 0.250 s"
    assert error.metadata() == {"cause": "queue_bytes", "limit": "1073741824", "value": "1073741825"}


@pytest.mark.parametrize(("value", "shown"), [(0.25, "0.25"), (1 / 3, "0.333333"), (2.0, "2"), (float("inf"), "inf")])
def test_seconds_are_told_to_six_digits(value, shown):
    assert Overloaded("predicted_wait", 1, value, 0.1).metadata()["value"] == shown


def test_a_model_is_named_with_its_version_where_one_was_asked_for():
    assert str(errors.ModelNotFound("m", "")) == "no model 'm'"
    assert str(errors.ModelNotFound("m", "3")) == "no model 'm' of version '3'"
    assert str(errors.NotServing("", "draining")) == "the server is draining"
    assert errors.InternalFault().metadata() == {}
