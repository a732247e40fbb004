"""Messages survive the way to domain values and back, without copies, and unknown numbers are refused.

Messages are the contract's protobufs, and domain values the server's own classes. An unknown number of an enum raises
InvalidRequest with its field.
"""

from __future__ import annotations

import numpy as np
import pytest
from attnserve.v1 import attention_pb2, inference_service_pb2, model_pb2, tensor_pb2
from attnserve_server.attention import resolve
from attnserve_server.domain import values as domain
from attnserve_server.domain.errors import InvalidRequest
from attnserve_server.domain.values import (
    AttentionAnswer,
    AttentionMap,
    AxisUnits,
    EffectiveSelection,
    Links,
    Priority,
    RowFeatures,
    RunFacts,
    SequenceResult,
)
from attnserve_server.model.certificate import Batching, Clause, Verdict
from attnserve_server.model.manifest import AxisSpec, OutputSpec, TextSpec
from attnserve_server.transport import codec
from attnserve_server.transport import wire as wires
from attnserve_server.transport.description import describe
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from made_by_hand import SURVIVED, certificate
from tiny_bundle import tiny_manifest

DTYPES = sorted(wires.WIRE_DTYPES)
MANIFEST = tiny_manifest()


def result_message(result: SequenceResult, outputs: tuple[str, ...]) -> inference_service_pb2.SequenceResult:
    """Encode a result, and parse it as a client does."""
    return inference_service_pb2.SequenceResult.FromString(codec.result_of(result, outputs).joined())


@given(data=st.data(), dtype=st.sampled_from(DTYPES))
def test_an_array_survives_a_round_trip(data: st.DataObject, dtype: str) -> None:
    shape = data.draw(npst.array_shapes(min_dims=0, max_dims=4, max_side=4))
    array = data.draw(npst.arrays(np.dtype(dtype), shape))
    wire = tensor_pb2.Tensor.FromString(wires.tensor_of(array, "x").joined())
    back = wires.array_of(wire.data, wires.DTYPE_NAMES[wire.dtype], tuple(wire.shape))
    assert back.dtype == array.dtype
    assert back.tobytes() == array.tobytes()  # bytes, so that NaN and -0.0 count too
    assert back.shape == array.shape


def test_bytes_on_the_wire_are_little_endian_and_row_major() -> None:
    big = np.array([[1, 2], [3, 4]], ">i4").T
    message = tensor_pb2.Tensor.FromString(wires.tensor_of(big).joined())
    assert message.data == bytes([1, 0, 0, 0, 3, 0, 0, 0, 2, 0, 0, 0, 4, 0, 0, 0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_array_is_a_read_only_view_of_its_bytes(dtype: str) -> None:
    data = bytes(8 * 2)
    array = wires.array_of(data, dtype, (len(data) // np.dtype(dtype).itemsize,))
    assert not array.flags.writeable
    assert np.shares_memory(array, np.frombuffer(data, np.uint8))


def test_an_empty_selection_means_the_defaults() -> None:
    assert codec.selection_of(attention_pb2.AttentionSelection()) == domain.AttentionSelection()


def test_every_field_of_a_selection_is_decoded() -> None:
    message = attention_pb2.AttentionSelection(
        sites=["a"],
        layers=[-1],
        heads=[1],
        head_reduction=attention_pb2.HEAD_REDUCTION_MAX,
        layer_reduction=attention_pb2.LAYER_REDUCTION_MEAN,
        queries=[0, -1],
        unit=attention_pb2.ATTENTION_UNIT_WORD,
        special_tokens=attention_pb2.SPECIAL_TOKENS_DROP,
        top_k=3,
        min_weight=0.5,
        dtype=tensor_pb2.DATA_TYPE_UINT8,
        features=[attention_pb2.ATTENTION_FEATURE_MEAN_DISTANCE, attention_pb2.ATTENTION_FEATURE_ENTROPY],
        values=attention_pb2.ATTENTION_VALUE_SCORES,
    )
    assert codec.selection_of(message) == domain.AttentionSelection(
        sites=("a",),
        layers=(-1,),
        heads=(1,),
        head_reduction=domain.HeadReduction.MAX,
        layer_reduction=domain.LayerReduction.MEAN,
        queries=(0, -1),
        unit=domain.AttentionUnit.WORD,
        special_tokens=domain.SpecialTokens.DROP,
        top_k=3,
        min_weight=0.5,
        dtype=domain.WeightDtype.UINT8,
        features=(domain.AttentionFeature.MEAN_DISTANCE, domain.AttentionFeature.ENTROPY),
        values=domain.AttentionValue.SCORES,
    )


def test_every_unknown_number_in_a_selection_is_reported() -> None:
    odd = attention_pb2.AttentionSelection(
        head_reduction=9,
        layer_reduction=9,
        unit=9,
        special_tokens=9,
        dtype=tensor_pb2.DATA_TYPE_BOOL,
        features=[attention_pb2.ATTENTION_FEATURE_ENTROPY, 0, 9],
        values=9,
    )
    with pytest.raises(InvalidRequest) as caught:
        codec.selection_of(odd)
    assert [violation.field for violation in caught.value.violations] == [
        "attention.head_reduction",
        "attention.layer_reduction",
        "attention.unit",
        "attention.special_tokens",
        "attention.dtype",
        "attention.values",
        "attention.features[1]",
        "attention.features[2]",
    ]


@pytest.mark.parametrize(
    ("number", "priority"), [(0, Priority.NORMAL), (1, Priority.LOW), (2, Priority.NORMAL), (3, Priority.HIGH)]
)
def test_a_priority_is_decoded(number: int, priority: Priority) -> None:
    assert codec.priority_of(number) is priority


def echo_of(effective: EffectiveSelection) -> attention_pb2.AttentionSelection:
    names = tuple(MANIFEST.sites[layer].name for layer in effective.layers)
    return attention_pb2.AttentionSelection.FromString(codec.effective_bytes(effective, names))


@pytest.mark.parametrize(
    "message",
    [
        attention_pb2.AttentionSelection(),
        attention_pb2.AttentionSelection(layers=[-1], heads=[-1, 0], top_k=2, dtype=tensor_pb2.DATA_TYPE_FLOAT16),
        attention_pb2.AttentionSelection(
            sites=["layer0"], layers=[1], layer_reduction=attention_pb2.LAYER_REDUCTION_ROLLOUT, queries=[-1]
        ),
        attention_pb2.AttentionSelection(features=[3, 1], heads=[0]),
        attention_pb2.AttentionSelection(values=attention_pb2.ATTENTION_VALUE_WEIGHTS),
    ],
    ids=["everything", "a part", "rollout", "features", "weights"],
)
def test_an_echoed_selection_means_the_same(message: attention_pb2.AttentionSelection) -> None:
    effective = resolve(codec.selection_of(message), MANIFEST.sites, "tiny")
    echo = echo_of(effective)
    again = resolve(codec.selection_of(echo), MANIFEST.sites, "tiny")
    assert echo_of(again) == echo
    assert (again.layers, again.heads, again.queries) == (effective.layers, effective.heads, effective.queries)
    assert echo.head_reduction
    assert echo.layer_reduction
    assert echo.dtype


def test_a_result_holds_outputs_in_the_requested_order_maps_and_run() -> None:
    units = AxisUnits("seq", 2, ("a", "b"), (0, 2), (1, 3), (False, True), (0, 0))
    whole = np.arange(4, dtype=np.float16).reshape(1, 2, 2)
    links = Links(np.array([0, 1]), np.array([1], np.int32), np.array([0.5], np.float32), np.array([[0.5]], np.float32))
    maps = (
        AttentionMap(("x",), 0, "cross", "windowed", (1,), "seq", "seq", (), (1,), whole),
        AttentionMap(("x", "y"), -1, "causal", "linear", (0,), "seq", "seq", (0,), (), links),
        AttentionMap(
            ("x",), 0, "self", "dense", (0,), "seq", "seq", (), (), RowFeatures(np.ones((1, 2, 3), np.float32))
        ),
    )
    result = SequenceResult(
        {"one": np.zeros(2, np.float32), "two": np.ones(1, np.int64)},
        AttentionAnswer((units,), maps),
        RunFacts(3, 10, 12, 0.5, 1),
        0.25,
    )
    message = result_message(result, ("two", "one"))
    assert [tensor.name for tensor in message.outputs] == ["two", "one"]
    assert list(message.attention.axes[0].texts) == ["a", "b"]
    first, second, third = message.attention.maps
    assert (first.kind, first.form) == (attention_pb2.ATTENTION_KIND_CROSS, attention_pb2.ATTENTION_FORM_WINDOWED)
    assert (first.WhichOneof("content"), first.weights.data) == ("weights", whole.tobytes())
    assert (second.WhichOneof("content"), list(second.links.keys.shape)) == ("links", [1])
    assert second.layer == -1
    assert (third.WhichOneof("content"), list(third.features.shape)) == ("features", [1, 2, 3])
    assert (message.run.batch_size, message.run.queue_seconds, message.run.instance) == (3, 0.25, 1)


def test_a_sequence_without_attention_has_none() -> None:
    message = result_message(SequenceResult({}, None, RunFacts(1, 1, 1, 0.1, 0)), ())
    assert not message.HasField("attention")


def test_a_description_equals_its_manifest() -> None:
    manifest = MANIFEST.model_copy(
        update={"outputs": (*MANIFEST.outputs, OutputSpec(name="mark", dtype="bool", shape=()))}
    )
    message = model_pb2.Model()
    describe(message, manifest, "proved")
    assert [(spec.name, spec.optional) for spec in message.inputs] == [("input_ids", False), ("attention_mask", True)]
    assert message.inputs[0].shape[0].symbol == "seq"
    assert [dimension.WhichOneof("length") for dimension in message.outputs[0].shape] == ["symbol", "size"]
    assert message.outputs[2].dtype == tensor_pb2.DATA_TYPE_BOOL
    assert [site.name for site in message.sites] == ["layer0", "layer1"]
    assert message.vocabulary_size == manifest.vocabulary_size
    assert [spec.vocabulary_size for spec in message.inputs] == [manifest.vocabulary_size, 0]
    assert (message.text_axis, message.text_pair_axis) == ("seq", "seq")
    assert message.axes[0].grid_rows == 0
    assert message.batching_policy == model_pb2.BATCHING_POLICY_PROVED
    assert (message.batched, message.batch_status) == (True, model_pb2.BATCHING_STATUS_PROVED)
    assert message.axes[0].padding_status == model_pb2.BATCHING_STATUS_PROVED


@pytest.mark.parametrize(
    ("policy", "padded", "status"),
    [
        ("proved", False, model_pb2.BATCHING_STATUS_UNKNOWN),
        ("tested", True, model_pb2.BATCHING_STATUS_TESTED),
        ("off", False, model_pb2.BATCHING_STATUS_UNKNOWN),
    ],
)
def test_a_description_holds_batching_status_and_policy(policy: Batching, padded: bool, status: int) -> None:
    clause = Clause(axis="seq", verdict=Verdict.UNKNOWN, reason="not known", attack=SURVIVED)
    fixed = AxisSpec(symbol="patches", max_length=7, paddable=False, fixed=True)
    made = certificate(clauses=(clause,), batch=Verdict.REFUTED)
    manifest = MANIFEST.model_copy(update={"certificate": made, "axes": (*MANIFEST.axes, fixed)})
    message = model_pb2.Model()
    describe(message, manifest.under(policy), policy)
    assert (message.batched, message.batch_status) == (False, model_pb2.BATCHING_STATUS_REFUTED)
    assert message.batch_reason == "made by hand"
    assert [(axis.paddable, axis.padding_status) for axis in message.axes] == [(padded, status), (False, 0)]
    assert [axis.padding_reason for axis in message.axes] == ["not known", ""]


def test_a_description_holds_patch_grids_and_the_axis_of_the_second_text() -> None:
    patches = AxisSpec(symbol="patches", max_length=7, paddable=False, fixed=True, grid=(2, 3), leading=1)
    text = TextSpec(axis="seq", max_tokens=8, pair_axis="target", pair_max_tokens=8)
    message = model_pb2.Model()
    describe(message, MANIFEST.model_copy(update={"axes": (patches,), "text": text}), "proved")
    (axis,) = message.axes
    assert (axis.grid_rows, axis.grid_columns, axis.leading) == (2, 3, 1)
    assert (message.text_axis, message.text_pair_axis) == ("seq", "target")
    message = model_pb2.Model()
    describe(message, MANIFEST.model_copy(update={"text": None}), "proved")
    assert (message.text_axis, message.text_pair_axis) == ("", "")


def test_units_of_patches_hold_their_grid() -> None:
    units = AxisUnits(axis="patches", length=7, grid=(2, 3), leading=1)
    message = result_message(SequenceResult({}, AttentionAnswer((units,), ()), RunFacts(1, 1, 1, 0.1, 0)), ())
    (axis,) = message.attention.axes
    assert (axis.grid_rows, axis.grid_columns, axis.leading) == (2, 3, 1)


def test_a_large_answer_is_chunks_that_join_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "CHUNK_BYTES", 10)
    answer = codec.response_of([], "r", codec.receipt_of("tiny", "1", "sha256:0", "cpu", "fp32"), b"", 300)
    made, count = codec.streamed("r", answer)
    chunks = [inference_service_pb2.StreamInferResponse.FromString(message) for message in made]
    assert [(one.request_id, one.chunk.index, one.chunk.count) for one in chunks] == [
        ("r", index, count) for index in range(count)
    ]
    assert b"".join(one.chunk.data for one in chunks) == answer.joined()
    assert inference_service_pb2.InferResponse.FromString(answer.joined()).predicted_bytes == 300


def test_a_small_answer_and_a_status_are_one_message() -> None:
    answer = codec.response_of([], "r", b"", b"", 0)
    (message,), count = codec.streamed("r", answer)
    assert count == 1
    assert inference_service_pb2.StreamInferResponse.FromString(message).response.receipt.request_id == "r"
    assert inference_service_pb2.StreamInferResponse.FromString(message).response.predicted_bytes == 0
    (message,), count = codec.streamed("r", b"status")
    assert (inference_service_pb2.StreamInferResponse.FromString(message).status, count) == (b"status", 1)
