"""The reader of usual ModelInferRequests accepts one only if the general readers do, and reads it as they do.

Requests are drawn near to valid ones: names, datatypes, shapes, values, contents, parameters, outputs, and paddings.
"""

from __future__ import annotations

import numpy as np
import pytest
from attnserve.oip import open_inference_pb2 as oip
from attnserve_server.domain.errors import AttnserveError
from attnserve_server.model.manifest import AxisSpec, InputRole, InputSpec
from attnserve_server.transport.intake import Intake
from attnserve_server.transport.oip.layout import DATATYPES, Layout
from attnserve_server.transport.oip.messages import wanted_of
from attnserve_server.transport.oip.request import Read, read
from attnserve_server.transport.oip.usual import usual_of
from attnserve_server.transport.prepared import Reader
from attnserve_server.transport.quick import QuickReader
from attnserve_server.transport.validation import ValidRequest, validate
from attnserve_server.transport.wire import Received, receive
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
        ),
        "axes": (*TINY.axes, AxisSpec(symbol="patch", max_length=3, paddable=False)),
    }
)
INVERTED = TINY.model_copy(
    update={
        "inputs": tuple(
            one.model_copy(update={"inverted": True}) if one.role is InputRole.ATTENTION_MASK else one
            for one in TINY.inputs
        )
    }
)


def reader_of(manifest) -> Reader:
    intake = Intake.of(manifest, None, max_batch_size=4, max_text_bytes=100, max_response_bytes=4_000)
    return Reader(intake, QuickReader.of(intake))


READERS = {"tiny": reader_of(TINY), "mixed": reader_of(MIXED), "an inverted mask": reader_of(INVERTED)}


@st.composite
def requests(draw: st.DrawFn, reader: Reader) -> oip.ModelInferRequest:
    """A request, mostly valid, and mostly of the usual form."""

    def rarely(one_in: int = 20) -> bool:
        return draw(st.integers(0, one_in)) == one_in

    request = oip.ModelInferRequest(model_name="tiny", id="a" if rarely() else "")
    manifest = reader.intake.manifest
    rows, lengths = draw(st.sampled_from([1, 1, 2, 3, 4, 5])), {"seq": draw(st.integers(1, 6)), "patch": 2}
    for spec in manifest.inputs:
        if spec.optional and draw(st.booleans()):
            continue
        shape = [rows, *(lengths[one] if isinstance(one, str) else one for one in spec.shape)]
        if rarely():
            shape = draw(st.lists(st.integers(-1, 4), max_size=3))
        count = abs(int(np.prod(shape))) if not rarely() else draw(st.integers(0, 9))
        dtype = spec.dtype if not rarely() else draw(st.sampled_from(sorted(DATATYPES)))
        whole = "bool" not in dtype and "float" not in dtype
        usual = st.just(int(not spec.inverted)) if spec.role is InputRole.ATTENTION_MASK else st.integers(0, 1)
        rare = st.sampled_from([0, 1, 2, len(VOCABULARY)] if whole else [np.nan, np.inf])
        values = draw(st.lists(usual | rare if rarely(4) else usual, min_size=count, max_size=count))
        name = spec.name if not rarely() else draw(st.sampled_from(["", "other", "types"]))
        sent = request.inputs.add(name=name, datatype=DATATYPES[dtype] if not rarely() else "BYTES", shape=shape)
        data = np.array(values, dtype)
        if rarely():
            sent.contents.int64_contents.extend(int(one) for one in np.nan_to_num(data, posinf=1.0).ravel())
        if not rarely():
            request.raw_input_contents.append(data.tobytes())
        if rarely():
            sent.parameters["binary_data_size"].int64_param = 1
    if rarely():
        request.parameters["priority"].int64_param = draw(st.integers(0, 3))
    known = [*(one.name for one in manifest.outputs), "lengths", "attention:0", "none"]
    for name in draw(st.lists(st.sampled_from(known), max_size=3)) if rarely(3) else ():
        request.outputs.add(name=name)
    return request


def generally(received: Received[oip.ModelInferRequest], reader: Reader) -> tuple[Read, ValidRequest]:
    """The request as the general readers read it. Raises AttnserveError for one that is invalid."""
    found = read(wanted_of(received), Layout.of(reader), reader.intake, "tiny", "")
    return found, validate(found.received, reader.intake)


@pytest.mark.parametrize("model", READERS)
@given(data=st.data())
def test_what_is_accepted_is_read_as_the_general_readers_read_it(model: str, data: st.DataObject) -> None:
    reader = READERS[model]
    received = receive(oip.ModelInferRequest, data.draw(requests(reader)).SerializeToString())
    usual = usual_of(received)
    found = None if usual is None else usual.read(reader, Layout.of(reader))
    event("accepted" if found is not None else "left to the general readers")
    if usual is None or found is None:
        return
    general, valid = generally(received, reader)
    wanted = wanted_of(received)
    assert (usual.rows, usual.attention, usual.parameters) == (wanted.rows, wanted.attention, wanted.parameters)
    assert same(found[1], valid)
    for field in ("names", "virtual", "padded_to", "top_k"):
        assert getattr(found[0], field) == getattr(general, field), field


@pytest.mark.parametrize("model", READERS)
@given(data=st.data())
def test_what_is_left_of_the_usual_form_is_invalid_or_padded(model: str, data: st.DataObject) -> None:
    reader = READERS[model]
    received = receive(oip.ModelInferRequest, data.draw(requests(reader)).SerializeToString())
    usual = usual_of(received)
    if usual is None or usual.read(reader, Layout.of(reader)) is not None:
        return
    wanted_of(received)  # raises nothing for the usual form
    own = all(one.name in Layout.of(reader).outputs for one in received.message.outputs)
    try:
        general, valid = generally(received, reader)
    except AttnserveError:
        return
    cut = any(one.lengths[axis] < general.padded_to[axis] for one in valid.sequences for axis in general.padded_to)
    hides = any(
        not one.tensors[name].all() if not known.spec.inverted else one.tensors[name].any()
        for one in valid.sequences
        for name, known in Layout.of(reader).inputs.items()
        if known.mask
    )
    assert not own or cut or hides


@pytest.mark.parametrize("rows", [1, 3])
def test_a_usual_request_is_accepted(rows: int) -> None:
    reader = READERS["tiny"]
    request = oip.ModelInferRequest(model_name="tiny")
    for name, value in (("input_ids", 4), ("attention_mask", 1)):
        request.inputs.add(name=name, datatype="INT64", shape=[rows, 5])
        request.raw_input_contents.append(np.full((rows, 5), value).tobytes())
    usual = usual_of(receive(oip.ModelInferRequest, request.SerializeToString()))
    assert usual is not None
    found = usual.read(reader, Layout.of(reader))
    assert found is not None
    assert [one.tensors["input_ids"].tolist() for one in found[1].sequences] == [[4] * 5] * rows
