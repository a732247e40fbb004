"""The error tree: each class has its own reason, and messages hold limit and value in full.

`RAISED` has an error of each class. `Violations` collects the faults of a request; it raises all of them as one
InvalidRequest.
"""

from __future__ import annotations

import pytest
from attnserve_server.domain import errors
from attnserve_server.domain.errors import (
    MAX_VIOLATIONS,
    AttnserveError,
    FieldViolation,
    InvalidRequest,
    Overloaded,
    Violations,
    quoted,
)

RAISED = [
    InvalidRequest.of("a.b[0]", "3 exceeds 2"),
    errors.ModelNotFound("m", "3"),
    errors.AttentionUnavailable("m", "it has no attention sites"),
    errors.TextUnavailable("m"),
    errors.ResponseTooLarge(11, 10),
    Overloaded("queue_bytes", 2**30, 2**30 + 1, 0.25),
    errors.NotServing("m", "draining"),
    errors.ModelFailed("m", "2", "its file is cut short"),
    errors.RepositoryUnusable("the repository has no bundle"),
    errors.Unsupported("models are not loaded by callers", "start it with --admin"),
    errors.DeadlineExpired(0.5),
    errors.RequestCancelled(),
    errors.EngineCrashed("m"),
    errors.Unauthenticated("backed_off", 6.0),
    errors.PermissionDenied("attention", "nightly", "a selection of attention"),
    errors.InternalFault("r-1"),
]


def test_every_error_class_has_its_own_reason():
    classes = {each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, AttnserveError)}
    assert classes - {AttnserveError} == {type(each) for each in RAISED}
    assert len({each.reason for each in RAISED}) == len(RAISED)
    assert AttnserveError.reason not in {each.reason for each in RAISED}


@pytest.mark.parametrize("error", RAISED, ids=lambda error: type(error).__name__)
def test_metadata_is_text_and_the_message_is_not_empty(error):
    assert str(error)
    assert all(isinstance(value, str) for pair in error.metadata().items() for value in pair)


def test_violations_beyond_the_limit_are_dropped():
    violations = Violations()
    for number in range(MAX_VIOLATIONS + 3):
        assert violations.full == (number >= MAX_VIOLATIONS)
        violations.add("field", str(number))
    assert len(violations) == MAX_VIOLATIONS


def test_add_once_keeps_the_first_violation_of_a_field():
    violations = Violations()
    for field, description in (("a", "first"), ("a", "second"), ("b", "other")):
        violations.add_once(field, description)
    with pytest.raises(InvalidRequest) as raised:
        violations.raise_any()
    assert raised.value.violations == (FieldViolation("a", "first"), FieldViolation("b", "other"))


def test_violations_take_in_an_invalid_request_and_nothing_else():
    violations = Violations()
    violations.raise_any()
    with violations:
        raise InvalidRequest.of("a", "1 is below 2")
    assert len(violations) == 1
    with pytest.raises(errors.TextUnavailable), violations:
        raise errors.TextUnavailable("m")
    with violations:
        pass
    assert len(violations) == 1


def test_quoted_text_is_escaped_and_cut():
    assert quoted("a\x1b") == r"'a\x1b'"
    assert len(quoted("x" * 1000)) == 64 + 3 + 2


def test_invalid_request_lists_all_its_violations():
    error = InvalidRequest(FieldViolation("a", "1 is below 2"), FieldViolation("b", "missing"))
    assert str(error) == "a: 1 is below 2; b: missing"
    assert [violation.field for violation in error.violations] == ["a", "b"]


def test_byte_counts_are_not_rounded():
    error = Overloaded("queue_bytes", 1073741824, 1073741825, 0.25)
    assert str(error) == "overloaded (queue_bytes): 1073741825 exceeds 1073741824; try again in 0.250 s"
    assert error.metadata() == {"cause": "queue_bytes", "limit": "1073741824", "value": "1073741825"}


@pytest.mark.parametrize(("value", "shown"), [(0.25, "0.25"), (1 / 3, "0.333333"), (2.0, "2"), (float("inf"), "inf")])
def test_seconds_are_formatted_with_six_digits(value, shown):
    assert Overloaded("predicted_wait", 1, value, 0.1).metadata()["value"] == shown


def test_model_not_found_names_the_version_if_one_was_requested():
    assert str(errors.ModelNotFound("m", "")) == "no model 'm'"
    assert str(errors.ModelNotFound("m", "3")) == "no model 'm' of version '3'"
    assert str(errors.NotServing("", "draining")) == "the server is draining"
    assert errors.InternalFault().metadata() == {}
