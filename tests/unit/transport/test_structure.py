"""A message that would take far more memory than it has bytes is refused before it is built."""

from __future__ import annotations

import tracemalloc
from contextlib import suppress

import pytest
from attnserve.v1 import attention_pb2, tensor_pb2
from attnserve.v1 import inference_service_pb2 as pb
from attnserve_server.domain.errors import InvalidRequest
from attnserve_server.transport.splice import varint
from attnserve_server.transport.structure import (
    MAX_STRUCTURE_BYTES,
    Blobs,
    check_structure,
    data_of,
    peek,
)
from attnserve_server.transport.wire import parse, parse_in_place, parse_leniently
from google.protobuf import message
from hypothesis import given, settings
from hypothesis import strategies as st

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
    "fields that the contract has not": (b"\xf8\x07\x01" * MANY, "InferRequest"),
    "groups that the contract has not": (b"\xfb\x07\xfc\x07" * MANY, "InferRequest"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE)
def test_a_message_of_mere_structure_is_refused_by_the_field_that_swells(name: str) -> None:
    data, field = HOSTILE[name]
    with pytest.raises(InvalidRequest) as caught:
        parse(pb.InferRequest, data)
    (violation,) = caught.value.violations
    assert violation.field == field
    said = f"over {MAX_STRUCTURE_BYTES} of the message's {len(data)} bytes are no text or tensor data"
    assert violation.description == said
    assert parse_leniently(pb.InferRequest, data) is None


@pytest.mark.slow
def test_refusing_takes_next_to_no_memory() -> None:
    data = EMPTY_FIELDS
    tracemalloc.start()
    with pytest.raises(InvalidRequest):
        parse(pb.InferRequest, data)
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
        # The most sequences that a server can be set to take in one request, of three inputs each.
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
def test_text_and_tensor_data_are_as_long_as_they_like(request_: pb.InferRequest) -> None:
    data = request_.SerializeToString()
    assert len(data) > MAX_STRUCTURE_BYTES
    assert parse(pb.InferRequest, data) == request_


def test_a_message_within_the_bound_is_not_looked_at() -> None:
    check_structure(pb.InferRequest.DESCRIPTOR, b"\x1a\x00" * (MAX_STRUCTURE_BYTES // 2))


@pytest.mark.slow
@settings(max_examples=25)  # each walks half a megabyte
@given(st.binary(max_size=60), st.sampled_from([pb.InferRequest, pb.StreamInferRequest]))
def test_no_bytes_make_it_fail_otherwise(start: bytes, kind: type[message.Message]) -> None:
    data = start + b"\x0a" + bytes(MAX_STRUCTURE_BYTES)
    with suppress(InvalidRequest):
        check_structure(kind.DESCRIPTOR, data)


def test_a_field_is_found_without_building_its_message() -> None:
    swollen = pb.InferRequest(
        model="tiny", attention=attention_pb2.AttentionSelection(heads=[0] * MANY), request_id="mine"
    )
    data = pb.StreamInferRequest(request=swollen).SerializeToString()
    assert peek(data, 1, 8) == b"mine"
    assert peek(data, 1, 7) == b""
    assert peek(data[:-6], 1, 8) == b""
    assert peek(EMPTY_FIELDS + b"\x42\x04mine", 8) == b""


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


def put_back(request: pb.InferRequest, blobs: Blobs) -> pb.InferRequest:
    """The request with its tensors' data where protobuf would have it."""
    for sequence in request.sequences:
        for tensor in sequence.tensors.tensors if sequence.HasField("tensors") else sequence.text.tensors:
            tensor.data = bytes(data_of(tensor, blobs))
    return request


@given(SEQUENCES, st.booleans())
@settings(max_examples=200)
def test_tensor_data_in_place_is_what_protobuf_would_build(sequences: list[pb.Sequence], on_stream: bool) -> None:
    sequences = [*sequences, pb.Sequence(tensors=pb.TensorInput(tensors=[FILLER]))]
    request = pb.InferRequest(model="tiny", request_id="one", sequences=sequences)
    built: pb.InferRequest
    if on_stream:
        message, blobs = parse_in_place(
            pb.StreamInferRequest, pb.StreamInferRequest(request=request, timeout_ms=5).SerializeToString()
        )
        assert message.timeout_ms == 5
        built = message.request
    else:
        built, blobs = parse_in_place(pb.InferRequest, request.SerializeToString())
    assert len(built.SerializeToString()) < 2**17
    assert put_back(built, blobs) == request


def test_of_data_sent_twice_the_last_counts_and_messages_sent_in_parts_are_joined() -> None:
    data = FILLER.SerializeToString() + tensor_pb2.Tensor(data=b"last").SerializeToString()
    tensors = b"\x0a" + varint(len(data)) + data
    part = b"\x12" + varint(len(tensors)) + tensors  # Sequence.tensors, twice: protobuf joins the two
    sequence = b"\x1a" + varint(2 * len(part)) + part + part
    wanted = pb.InferRequest.FromString(sequence)
    assert [len(one.tensors.tensors) for one in wanted.sequences] == [2]
    built, blobs = parse_in_place(pb.InferRequest, sequence)
    assert len(blobs) == 4
    assert put_back(built, blobs) == wanted


def test_short_messages_and_those_of_too_many_tensors_are_built_whole() -> None:
    few = pb.InferRequest(sequences=[pb.Sequence(tensors=pb.TensorInput(tensors=[tensor_pb2.Tensor(data=b"1234")]))])
    assert parse_in_place(pb.InferRequest, few.SerializeToString()) == (few, ())
    many = pb.InferRequest(
        sequences=[pb.Sequence(tensors=pb.TensorInput(tensors=[tensor_pb2.Tensor(data=b"1234567890" * 7)] * 2**13))]
    )
    assert parse_in_place(pb.InferRequest, many.SerializeToString()) == (many, ())


@pytest.mark.parametrize("cut", [1, 5, 1000, 2**17])
def test_malformed_messages_stay_malformed(cut: int) -> None:
    whole = pb.InferRequest(
        model="tiny", sequences=[pb.Sequence(tensors=pb.TensorInput(tensors=[FILLER, FILLER]))]
    ).SerializeToString()
    with pytest.raises(InvalidRequest, match="are no attnserve"):
        parse_in_place(pb.InferRequest, whole[:-cut])
