"""Errors: how gRPC statuses map to the client's error classes, and what the classes hold.

Malformed details of a status are skipped, and a malformed status becomes BadAnswer. Nothing is sent.
"""

from __future__ import annotations

import pickle
import re

import pytest
from attnserve_client import AttnserveError, InvalidRequest, errors
from attnserve_client._status import BY_CODE, BY_REASON, from_status_bytes, is_lost_connection
from attnserve_client.errors import BadAnswer, DeadlineExpired, NotServing, ServerUnreachable
from attnserve_client.testing._refusals import status_of
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2


def test_every_error_class_is_documented_and_mapped() -> None:
    tree = {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, AttnserveError)}
    public = {kind.__name__ for kind in tree if not kind.__name__.startswith("_")}
    drawn = set(re.findall(r"^\s+(?:[|+\- ]*)([A-Z]\w+)", errors.__doc__ or "", flags=re.MULTILINE))
    assert drawn == public
    mapped = {kind.__name__ for kind in (*BY_REASON.values(), *BY_CODE.values())}
    assert public - mapped == {"AttnserveError", "BadAnswer"}


@pytest.mark.parametrize("reason", sorted(BY_REASON))
def test_each_reason_round_trips_with_all_its_details(reason: str) -> None:
    sent = BY_REASON[reason](
        "what went wrong",
        code="UNAVAILABLE",
        reason=reason,
        metadata={"model": "m", "state": "draining", "cause": "queue_full", "version": "2"},
        violations=(errors.FieldViolation("text", "length 0 is below 1"),),
        retry_delay_s=1.5,
    )
    received = from_status_bytes(status_of(sent, "mine").SerializeToString())
    assert type(received) is type(sent)
    assert (received.message, received.reason, received.code, received.request_id) == (
        "what went wrong",
        reason,
        "UNAVAILABLE",
        "mine",
    )
    assert dict(received.metadata) == {**sent.metadata, "request_id": "mine"}
    assert received.violations == sent.violations
    assert received.retry_delay_s == 1.5


def test_metadata_of_errors_has_properties() -> None:
    assert errors.NotServing("x", metadata={"state": "draining"}).state == "draining"
    assert errors.Overloaded("x", metadata={"cause": "queue_full"}).cause == "queue_full"
    assert errors.ResponseTooLarge("x", metadata={"predicted_bytes": "many"}).predicted_bytes == 0


def test_reasons_of_other_domains_are_ignored() -> None:
    status = status_of(AttnserveError("busy", code="RESOURCE_EXHAUSTED", reason="OVERLOADED"), "")
    info = error_details_pb2.ErrorInfo()
    status.details[0].Unpack(info)
    info.domain = "elsewhere.example"
    status.details[0].Pack(info)
    assert type(from_status_bytes(status.SerializeToString())) is AttnserveError


def test_malformed_details_are_skipped() -> None:
    broken = any_pb2.Any(type_url="type.googleapis.com/google.rpc.BadRequest", value=b"\xff\xff")
    unknown = any_pb2.Any(type_url="type.googleapis.com/some.Thing", value=b"")
    status = status_pb2.Status(code=code_pb2.INVALID_ARGUMENT, message="wrong", details=[broken, unknown])
    error = from_status_bytes(status.SerializeToString(), "mine")
    assert type(error) is InvalidRequest
    assert (error.message, error.request_id, error.violations) == ("wrong", "mine", ())


def test_malformed_status_is_a_bad_answer_and_unknown_code_is_unknown() -> None:
    assert isinstance(from_status_bytes(b"\xff\xff"), BadAnswer)
    assert from_status_bytes(status_pb2.Status(code=99).SerializeToString()).code == "UNKNOWN"


def test_errors_survive_pickling() -> None:
    error = InvalidRequest.of("text", "length 0 is below 1")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is InvalidRequest
    assert (again.message, again.violations, again.code) == (error.message, error.violations, error.code)


@pytest.mark.parametrize(
    ("message", "lost"),
    [
        ("Stream removed (Socket closed)", True),  # grpcio 1.83
        ("Socket closed", True),  # grpcio 1.76
        ("Stream removed (ping timeout)", True),
        ("Cancelling all calls", True),
        ("failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:1: Connection refused", True),
        ("connections to all backends failing; last error: UNKNOWN: ipv4:127.0.0.1:1: Connection refused", True),
        ("errors resolving nowhere.invalid:1: [field:hostname lookup error:address lookup failed]", True),
        ("no healthy upstream", False),
        ("upstream connect error or disconnect/reset before headers. reset reason: connection termination", False),
        ("refused by the proxy: Socket closed", False),
        ("unavailable", False),
    ],
)
def test_messages_of_a_lost_connection_differ_from_those_of_a_refusal(message: str, lost: bool) -> None:
    assert is_lost_connection(ServerUnreachable(message, code="UNAVAILABLE")) is lost
    assert not is_lost_connection(NotServing(message, code="UNAVAILABLE", reason="NOT_SERVING"))
    assert not is_lost_connection(DeadlineExpired(message, code="DEADLINE_EXCEEDED"))
