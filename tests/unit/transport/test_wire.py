"""Protobuf's wire format: bytes that are no message are refused, and tensor data is neither copied nor lost.

`receive` raises NotAMessage for such bytes, and InvalidRequest for broken UTF-8 or too much structure, with the field.
Results are compared with protobuf's own parser.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from contextlib import suppress

import numpy as np
import pytest
from attnserve.v1 import attention_pb2, tensor_pb2
from attnserve.v1 import inference_service_pb2 as pb
from attnserve_server.domain.errors import InvalidRequest
from attnserve_server.transport import wire
from attnserve_server.transport.wire import (
    MAX_STRUCTURE_BYTES,
    NotAMessage,
    Received,
    Splice,
    find_field,
    receive,
    varint,
)
from google.protobuf import message
from grpc_health.v1 import health_pb2
from hypothesis import given, settings
from hypothesis import strategies as st

GOOD = pb.InferRequest(
    model="tiny",
    priority=pb.PRIORITY_HIGH,
    sequences=[pb.Sequence(text=pb.TextInput(text="MARK"))],
    attention=attention_pb2.AttentionSelection(sites=["layer0", "SITE"]),
).SerializeToString()


def test_a_message_is_parsed_with_its_size() -> None:
    received = receive(pb.InferRequest, GOOD)
    assert received.message == pb.InferRequest.FromString(GOOD)
    assert received.size == len(GOOD)


@pytest.mark.parametrize(
    ("old", "new", "field", "description"),
    [
        (b"MARK", b"MA\xffK", "sequences[0].text.text", "not UTF-8: byte 2 is 0xff"),
        (b"MARK", b"\xed\xa0\x80K", "sequences[0].text.text", "not UTF-8: byte 0 is 0xed"),
        (b"SITE", b"SIT\xc3", "attention.sites[1]", "not UTF-8: byte 3 is 0xc3"),
        (b"tiny", b"t\x80ny", "model", "not UTF-8: byte 1 is 0x80"),
    ],
)
def test_broken_utf8_is_reported_with_its_field_and_byte(old: bytes, new: bytes, field: str, description: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        receive(pb.InferRequest, GOOD.replace(old, new))
    assert [(found.field, found.description) for found in caught.value.violations] == [(field, description)]


@pytest.mark.parametrize("kind", [pb.InferRequest, pb.StreamInferRequest, health_pb2.HealthCheckRequest])
def test_malformed_bytes_are_reported_as_no_message(kind: type[message.Message]) -> None:
    with pytest.raises(NotAMessage, match=f"the bytes are no {kind.DESCRIPTOR.full_name} message"):
        receive(kind, b"\xff\xff\xff")


def test_at_most_sixteen_broken_fields_are_reported() -> None:
    many = pb.InferRequest(sequences=[pb.Sequence(text=pb.TextInput(text="MARK"))] * 40).SerializeToString()
    with pytest.raises(InvalidRequest) as caught:
        receive(pb.InferRequest, many.replace(b"MARK", b"\xff\xff\xff\xff"))
    assert len(caught.value.violations) == 16


def test_the_search_for_broken_utf8_is_bounded() -> None:
    many = pb.InferRequest(outputs=pb.OutputSelection(names=[""] * 20_000)).SerializeToString()
    with pytest.raises(InvalidRequest) as caught:
        receive(
            pb.InferRequest,
            pb.InferRequest(outputs=pb.OutputSelection(names=["", "MARK"]))
            .SerializeToString()
            .replace(b"MARK", b"M\xffRK"),
        )
    assert caught.value.violations[0].field == "outputs.names[1]"
    with pytest.raises(InvalidRequest, match="a string after the first 10000 fields is not UTF-8") as caught:
        receive(pb.InferRequest, many + b"\x0a\x01\xff")
    assert not isinstance(caught.value, NotAMessage)


def test_each_field_counts_once_in_the_search_for_broken_utf8() -> None:
    texts = [pb.Sequence(text=pb.TextInput(text="a"))] * 3332  # three fields each
    request = pb.InferRequest(sequences=[*texts, pb.Sequence(text=pb.TextInput(text="MARK"))])
    with pytest.raises(InvalidRequest) as caught:
        receive(pb.InferRequest, request.SerializeToString().replace(b"MARK", b"MA\xffK"))
    assert caught.value.violations[0].field == "sequences[3332].text.text"


@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_but_invalid_request(data: bytes) -> None:
    with suppress(InvalidRequest):
        receive(pb.StreamInferRequest, data)


@given(st.integers(0, len(GOOD) - 1), st.integers(0, 255))
def test_no_mutation_of_a_request_raises_anything_but_invalid_request(at: int, byte: int) -> None:
    mutated = bytearray(GOOD)
    mutated[at] = byte
    with suppress(InvalidRequest):
        receive(pb.InferRequest, bytes(mutated))


TEXT = pb.Sequence(text=pb.TextInput(text="a"))
MANY = MAX_STRUCTURE_BYTES
TENSOR = tensor_pb2.Tensor(name="input_ids", shape=[1] * MANY)
EMPTY_FIELDS = b"\x1a\x00" * MANY  # sequences without content: two bytes each

HOSTILE: dict[str, tuple[bytes, str]] = {
    "sequences": (EMPTY_FIELDS, "sequences"),
    "tensors": (
        pb.InferRequest(
            sequences=[TEXT, pb.Sequence(tensors=pb.TensorInput(tensors=[tensor_pb2.Tensor()] * MANY))]
        ).SerializeToString(),
        "sequences.tensors.tensors",
    ),
    "axes of a shape": (
        pb.InferRequest(sequences=[pb.Sequence(tensors=pb.TensorInput(tensors=[TENSOR]))]).SerializeToString(),
        "sequences.tensors.tensors.shape",
    ),
    "empty names": (
        pb.InferRequest(outputs=pb.OutputSelection(names=[""] * MANY)).SerializeToString(),
        "outputs.names",
    ),
    "indices": (
        pb.InferRequest(attention=attention_pb2.AttentionSelection(queries=[0] * MANY * 2)).SerializeToString(),
        "attention.queries",
    ),
    "unknown fields": (b"\xf8\x07\x01" * MANY, "InferRequest"),
    "unknown groups": (b"\xfb\x07\xfc\x07" * MANY, "InferRequest"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE)
def test_too_much_structure_is_refused_and_its_field_named(name: str) -> None:
    data, field = HOSTILE[name]
    with pytest.raises(InvalidRequest) as caught:
        receive(pb.InferRequest, data)
    (violation,) = caught.value.violations
    assert violation.field == field
    expected = f"over {MAX_STRUCTURE_BYTES} of the message's {len(data)} bytes are no text or tensor data"
    assert violation.description == expected
    assert not isinstance(caught.value, NotAMessage)


@pytest.mark.parametrize(
    "field", [b"\x1a\x00", b"\x78\x00", b"\x0a\x01a"], ids=["empty sequence", "unknown", "one letter"]
)
def test_scan_of_short_fields_ends_early(field: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs in Python: each field takes a microsecond."""
    read = 0

    def counted(data: bytes, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
        nonlocal read
        for found in fields(data, at, end):
            read += 1
            yield found

    fields = wire.fields
    monkeypatch.setattr(wire, "fields", counted)
    with pytest.raises(InvalidRequest, match="are no text or tensor data"):
        receive(pb.InferRequest, field * MAX_STRUCTURE_BYTES)
    assert MAX_STRUCTURE_BYTES // 16 < read <= MAX_STRUCTURE_BYTES // 6 + 1


@pytest.mark.slow
def test_a_refusal_takes_little_memory() -> None:
    data = EMPTY_FIELDS
    tracemalloc.start()
    with pytest.raises(InvalidRequest):
        receive(pb.InferRequest, data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000


@pytest.mark.parametrize(
    "request_",
    [
        pb.InferRequest(sequences=[pb.Sequence(text=pb.TextInput(text="x" * 3 * MANY, text_pair="y" * MANY))]),
        pb.InferRequest(
            sequences=[
                pb.Sequence(tensors=pb.TensorInput(tensors=[tensor_pb2.Tensor(name="pixels", data=bytes(3 * MANY))]))
            ]
        ),
        # The greatest configurable number of sequences in one request, of three inputs each.
        pb.InferRequest(
            sequences=[
                pb.Sequence(
                    tensors=pb.TensorInput(
                        tensors=[
                            tensor_pb2.Tensor(name=name, dtype=5, shape=[512], data=bytes(512))
                            for name in ("input_ids", "attention_mask", "token_type_ids")
                        ]
                    )
                )
            ]
            * 4096,
            attention=attention_pb2.AttentionSelection(queries=range(-4096, 0)),
        ),
    ],
    ids=["text", "tensor data", "4096 sequences"],
)
def test_text_and_tensor_data_do_not_count_as_structure(request_: pb.InferRequest) -> None:
    data = request_.SerializeToString()
    assert len(data) > MAX_STRUCTURE_BYTES
    assert whole(receive(pb.InferRequest, data)) == request_


def test_a_message_within_the_bound_is_not_scanned() -> None:
    received = receive(pb.InferRequest, b"\x1a\x00" * (MAX_STRUCTURE_BYTES // 2))
    assert len(received.message.sequences) == MAX_STRUCTURE_BYTES // 2


@pytest.mark.slow
@settings(max_examples=25)  # each scans half a megabyte
@given(st.binary(max_size=60), st.sampled_from([pb.InferRequest, pb.StreamInferRequest]))
def test_no_long_bytes_raise_anything_but_invalid_request(start: bytes, kind: type[message.Message]) -> None:
    data = start + b"\x0a" + bytes(MAX_STRUCTURE_BYTES)
    with suppress(InvalidRequest):
        receive(kind, data)


def test_a_field_is_found_without_parsing_its_message() -> None:
    swollen = pb.InferRequest(
        model="tiny", attention=attention_pb2.AttentionSelection(heads=[0] * MANY), request_id="mine"
    )
    data = pb.StreamInferRequest(request=swollen).SerializeToString()
    assert find_field(data, 1, 8) == b"mine"
    assert find_field(data, 1, 7) == b""
    assert find_field(data[:-6], 1, 8) == b""
    assert find_field(EMPTY_FIELDS + b"\x42\x04mine", 8) == b""


TENSORS = st.lists(
    st.builds(
        tensor_pb2.Tensor,
        name=st.sampled_from(["input_ids", "x", ""]),
        dtype=st.sampled_from([tensor_pb2.DATA_TYPE_FLOAT32, tensor_pb2.DATA_TYPE_INT64]),
        shape=st.lists(st.integers(0, 300), max_size=3),
        data=st.binary(max_size=40),
    ),
    max_size=4,
)
SEQUENCES = st.lists(
    st.one_of(
        st.builds(pb.Sequence, tensors=st.builds(pb.TensorInput, tensors=TENSORS)),
        st.builds(pb.Sequence, text=st.builds(pb.TextInput, text=st.text(max_size=20), tensors=TENSORS)),
    ),
    max_size=4,
)
FILLER = tensor_pb2.Tensor(name="filler", data=bytes(range(256)) * (MAX_STRUCTURE_BYTES // 256))


def whole(received: Received[pb.InferRequest]) -> pb.InferRequest:
    """The request with its tensors' data where protobuf would have it."""
    for sequence in received.message.sequences:
        for tensor in sequence.tensors.tensors if sequence.HasField("tensors") else sequence.text.tensors:
            tensor.data = bytes(received.data_of(tensor))
    return received.message


@given(SEQUENCES, st.booleans())
@settings(max_examples=200)
def test_data_of_a_received_tensor_equals_what_protobuf_parses(sequences: list[pb.Sequence], on_stream: bool) -> None:
    sequences = [*sequences, pb.Sequence(tensors=pb.TensorInput(tensors=[FILLER]))]
    request = pb.InferRequest(model="tiny", request_id="one", sequences=sequences)
    if on_stream:
        data = pb.StreamInferRequest(request=request, timeout_ms=5).SerializeToString()
        outer = receive(pb.StreamInferRequest, data)
        assert outer.message.timeout_ms == 5
        received = outer.part(outer.message.request)
    else:
        data = request.SerializeToString()
        received = receive(pb.InferRequest, data)
    assert received.size == len(data)
    assert len(received.message.SerializeToString()) < 2**17
    assert whole(received) == request


def test_repeated_data_and_split_messages_merge_as_in_protobuf() -> None:
    data = FILLER.SerializeToString() + tensor_pb2.Tensor(data=b"last").SerializeToString()
    tensors = b"\x0a" + varint(len(data)) + data
    part = b"\x12" + varint(len(tensors)) + tensors  # Sequence.tensors, twice: protobuf joins the two
    sequence = b"\x1a" + varint(2 * len(part)) + part + part
    wanted = pb.InferRequest.FromString(sequence)
    assert [len(one.tensors.tensors) for one in wanted.sequences] == [2]
    received = receive(pb.InferRequest, sequence)
    assert len(received.message.SerializeToString()) < 2**10
    assert whole(received) == wanted


@pytest.mark.parametrize("count", [1, 2**14], ids=["short", "many tensors"])
def test_short_messages_and_those_of_many_tensors_hold_their_data(count: int) -> None:
    tensors = [tensor_pb2.Tensor(data=b"1234567890" * 7)] * count
    request = pb.InferRequest(sequences=[pb.Sequence(tensors=pb.TensorInput(tensors=tensors))])
    assert receive(pb.InferRequest, request.SerializeToString()).message == request


@pytest.mark.parametrize("cut", [1, 5, 1000, 2**17])
def test_malformed_messages_stay_malformed(cut: int) -> None:
    data = pb.InferRequest(
        model="tiny", sequences=[pb.Sequence(tensors=pb.TensorInput(tensors=[FILLER, FILLER]))]
    ).SerializeToString()
    with pytest.raises(NotAMessage, match="are no attnserve"):
        receive(pb.InferRequest, data[:-cut])


def test_a_splice_equals_what_protobuf_serializes() -> None:
    array = np.arange(300, dtype="<f4")
    tensor = tensor_pb2.Tensor(name="x", dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=[300], data=array.tobytes())
    inner = Splice(tensor_pb2.Tensor(name="x", dtype=tensor.dtype, shape=[300]).SerializeToString()).add(4, array)
    outer = Splice().add(1, inner).add(2, b"bytes")
    assert tensor_pb2.Tensor.FromString(inner.joined()) == tensor
    assert len(outer.joined()) == outer.size
    assert find_field(outer.joined(), 2) == b"bytes"
    assert find_field(outer.joined(), 1, 4) == array.tobytes()
