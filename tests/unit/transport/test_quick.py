"""The quick reader accepts a request only if `validate` does, and reads it as `validate` does.

Requests are drawn near to valid ones: names, dtypes, shapes, values, missing and repeated tensors, outputs, counts.
"""

from __future__ import annotations

import numpy as np
import pytest
from attnserve.v1 import attention_pb2, labels_pb2, tensor_pb2
from attnserve.v1 import inference_service_pb2 as pb
from attnserve_server.domain.errors import AttnserveError
from attnserve_server.model.manifest import AxisSpec, DerivedLength, InputRole, InputSpec, Manifest
from attnserve_server.transport.intake import Intake
from attnserve_server.transport.quick import QuickReader
from attnserve_server.transport.validation import validate
from attnserve_server.transport.wire import Received
from hypothesis import event, given
from hypothesis import strategies as st
from read_alike import same
from tiny_bundle import VOCABULARY, tiny_manifest

TINY = tiny_manifest()
MIXED = TINY.model_copy(
    update={
        "inputs": (
            *TINY.inputs,
            InputSpec(name="types", dtype="int32", shape=("seq",), role=InputRole.TOKEN_TYPE_IDS, fill=0),
            InputSpec(name="pixels", dtype="float32", shape=("patch", 2), fill=None),
            InputSpec(name="scale", dtype="float64", shape=(), fill=1),
        ),
        "axes": (*TINY.axes, AxisSpec(symbol="patch", max_length=3, paddable=False)),
    }
)
WIRE = {"int64": tensor_pb2.DATA_TYPE_INT64, "int32": tensor_pb2.DATA_TYPE_INT32}
WIRE |= {"float32": tensor_pb2.DATA_TYPE_FLOAT32, "float64": tensor_pb2.DATA_TYPE_FLOAT64}


def intake_of(manifest: Manifest) -> Intake:
    return Intake.of(manifest, None, max_batch_size=4, max_text_bytes=100, max_response_bytes=4_000)


def reader_of(intake: Intake) -> QuickReader:
    reader = QuickReader.of(intake)
    assert reader is not None
    return reader


INTAKES = [intake_of(TINY), intake_of(MIXED)]
READERS = [reader_of(intake) for intake in INTAKES]


@st.composite
def tensors(draw: st.DrawFn, spec: InputSpec, seq: int) -> tensor_pb2.Tensor:
    """One input's tensor, mostly valid."""
    lengths = {"seq": seq, "patch": draw(st.integers(0, 4))}
    shape = [lengths[extent] if isinstance(extent, str) else extent for extent in spec.shape]
    if draw(st.integers(0, 15)) == 0:
        shape = draw(st.lists(st.integers(-1, 4), max_size=3))
    count = abs(int(np.prod(shape))) if draw(st.integers(0, 15)) else draw(st.integers(0, 9))
    dtype = spec.dtype if draw(st.integers(0, 15)) else draw(st.sampled_from(sorted(WIRE)))
    usual = st.sampled_from([0, 1]) if dtype.startswith("int") else st.floats(-9, 9, width=32)
    rare = st.sampled_from(
        [-1, 2, len(VOCABULARY) - 1, len(VOCABULARY)] if dtype.startswith("int") else [np.nan, np.inf]
    )
    values = draw(st.lists(usual if draw(st.integers(0, 5)) else usual | rare, min_size=count, max_size=count))
    name = spec.name if draw(st.integers(0, 15)) else draw(st.sampled_from(["", "other", "types"]))
    return tensor_pb2.Tensor(name=name, dtype=WIRE[dtype], shape=shape, data=np.array(values, dtype).tobytes())


@st.composite
def requests(draw: st.DrawFn, manifest: Manifest) -> pb.InferRequest:
    """A request, mostly valid."""
    request = pb.InferRequest(model="tiny", priority=draw(st.sampled_from([0, 0, 1, 2, 3, 9])))
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 4, 5, 0]))):
        seq = draw(st.integers(1, 6))
        sent = [draw(tensors(spec, seq)) for spec in manifest.inputs if not spec.optional or draw(st.booleans())]
        if draw(st.integers(0, 15)) == 0 and sent:
            sent.append(sent[0])
        one = request.sequences.add()
        if draw(st.integers(0, 30)):
            one.tensors.tensors.extend(sent)
        if draw(st.integers(0, 30)) == 0:
            one.past_tokens.append("a")
    if draw(st.integers(0, 3)) == 0:
        names = [*(output.name for output in manifest.outputs), "none"]
        request.outputs.names.extend(draw(st.lists(st.sampled_from(names), max_size=3)))
    match draw(st.integers(0, 30)):
        case 0:
            request.prompt_name = "query"
        case 1:
            request.attention.CopyFrom(attention_pb2.AttentionSelection())
        case 2:
            request.labels.CopyFrom(labels_pb2.LabelSelection())
    return request


@pytest.mark.parametrize("at", range(2), ids=["tiny", "mixed"])
@given(data=st.data())
def test_what_the_quick_reader_accepts_is_read_as_validate_reads_it(at: int, data: st.DataObject) -> None:
    request = data.draw(requests(INTAKES[at].manifest))
    received = Received(request, request.ByteSize())
    quick = READERS[at].read(received)
    event("accepted" if quick is not None else "left to validate")
    if quick is not None:
        assert same(quick, validate(received, INTAKES[at]))


@pytest.mark.parametrize("at", range(2), ids=["tiny", "mixed"])
@given(data=st.data())
def test_the_quick_reader_leaves_no_usual_request_to_validate(at: int, data: st.DataObject) -> None:
    request = data.draw(requests(INTAKES[at].manifest))
    received = Received(request, request.ByteSize())
    if READERS[at].read(received) is not None:
        return
    unusual = any(request.HasField(name) for name in ("attention", "labels", "prompt_name"))
    scalar_left_out = at == 1 and any(
        all(tensor.name != "scale" for tensor in sequence.tensors.tensors) for sequence in request.sequences
    )
    if not unusual and not scalar_left_out:
        with pytest.raises(AttnserveError):
            validate(received, INTAKES[at])


@pytest.mark.parametrize(
    "change",
    [
        {"inputs": (*TINY.inputs, InputSpec(name="at", dtype="int64", shape=("seq",), role=InputRole.POSITION_IDS))},
        {"inputs": (*TINY.inputs, InputSpec(name="flag", dtype="bool", shape=("seq",), fill=0))},
        {
            "axes": (
                *TINY.axes,
                AxisSpec(
                    symbol="pooled",
                    max_length=16,
                    paddable=True,
                    derived=DerivedLength(source="seq", stride=2, offset=0),
                ),
            )
        },
    ],
    ids=["positions", "a bool", "a derived axis"],
)
def test_models_with_special_rules_have_no_quick_reader(change: dict) -> None:
    assert QuickReader.of(intake_of(TINY.model_copy(update=change))) is None
