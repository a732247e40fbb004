"""Bytes that are no message are refused by name, whatever they are."""

from __future__ import annotations

from contextlib import suppress

import pytest
from attnserve.v1 import attention_pb2
from attnserve.v1 import inference_service_pb2 as pb
from attnserve_server.domain.errors import InvalidRequest
from attnserve_server.transport.wire import parse
from google.protobuf import message
from grpc_health.v1 import health_pb2
from hypothesis import given
from hypothesis import strategies as st

GOOD = pb.InferRequest(
    model="tiny",
    priority=pb.PRIORITY_HIGH,
    sequences=[pb.Sequence(text=pb.TextInput(text="MARK"))],
    attention=attention_pb2.AttentionSelection(sites=["layer0", "SITE"]),
).SerializeToString()


def test_a_message_is_itself() -> None:
    assert parse(pb.InferRequest, GOOD).model == "tiny"


@pytest.mark.parametrize(
    ("old", "new", "field", "description"),
    [
        (b"MARK", b"MA\xffK", "sequences[0].text.text", "not UTF-8: byte 2 is 0xff"),
        (b"MARK", b"\xed\xa0\x80K", "sequences[0].text.text", "not UTF-8: byte 0 is 0xed"),
        (b"SITE", b"SIT\xc3", "attention.sites[1]", "not UTF-8: byte 3 is 0xc3"),
        (b"tiny", b"t\x80ny", "model", "not UTF-8: byte 1 is 0x80"),
    ],
)
def test_broken_utf8_is_told_with_its_field_and_byte(old: bytes, new: bytes, field: str, description: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(pb.InferRequest, GOOD.replace(old, new))
    assert [(found.field, found.description) for found in caught.value.violations] == [(field, description)]


@pytest.mark.parametrize("kind", [pb.InferRequest, pb.StreamInferRequest, health_pb2.HealthCheckRequest])
def test_what_is_no_message_at_all_is_told_so(kind: type[message.Message]) -> None:
    with pytest.raises(InvalidRequest, match=f"the bytes are no {kind.DESCRIPTOR.full_name} message"):
        parse(kind, b"\xff\xff\xff")


def test_at_most_sixteen_broken_fields_are_told() -> None:
    many = pb.InferRequest(sequences=[pb.Sequence(text=pb.TextInput(text="MARK"))] * 40).SerializeToString()
    with pytest.raises(InvalidRequest) as caught:
        parse(pb.InferRequest, many.replace(b"MARK", b"\xff\xff\xff\xff"))
    assert len(caught.value.violations) == 16


@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_but_invalid_request(data: bytes) -> None:
    with suppress(InvalidRequest):
        parse(pb.StreamInferRequest, data)


@given(st.integers(0, len(GOOD) - 1), st.integers(0, 255))
def test_no_mutation_of_a_request_raises_anything_but_invalid_request(at: int, byte: int) -> None:
    mutated = bytearray(GOOD)
    mutated[at] = byte
    with suppress(InvalidRequest):
        parse(pb.InferRequest, bytes(mutated))
