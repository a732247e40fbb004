"""Validation reports each violation that the contract names with its field, limit and value.

`VIOLATIONS` has a request, the model's intake, and the expected field and description of InvalidRequest. Requests that
the model can never serve raise TextUnavailable or AttentionUnavailable, and too large answers ResponseTooLarge.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from attnserve.v1 import attention_pb2, labels_pb2, tensor_pb2
from attnserve.v1 import inference_service_pb2 as pb
from attnserve_server.domain.errors import (
    MAX_VIOLATIONS,
    AttentionUnavailable,
    InvalidRequest,
    ModelNotFound,
    ResponseTooLarge,
    TextUnavailable,
)
from attnserve_server.domain.values import Priority
from attnserve_server.model.certificate import MaskNeed
from attnserve_server.model.manifest import AxisSpec, DerivedLength, InputRole, InputSpec, OutputSpec
from attnserve_server.model.tokenizer import TextTokenizer
from attnserve_server.transport.intake import Intake
from attnserve_server.transport.validation import ValidRequest, check_model_reference, check_request_id, validate
from attnserve_server.transport.wire import Received
from hypothesis import given
from hypothesis import strategies as st
from made_by_hand import proved
from tiny_bundle import VOCABULARY, WIDTH, tiny_manifest, tiny_tokenizer

MAX_TEXT_BYTES = 100
TOKENIZER = TextTokenizer(tiny_tokenizer(), "seq")
MANIFEST = tiny_manifest()
# A model with other kinds of input: without a fill value, floats, bools, a scalar, and two axes.
MIXED = MANIFEST.model_copy(
    update={
        "name": "mixed",
        "axes": (
            AxisSpec(symbol="seq", max_length=32, paddable=True),
            AxisSpec(symbol="patch", max_length=6, paddable=True),
            AxisSpec(symbol="made", max_length=5, paddable=False),
        ),
        "inputs": (
            *MANIFEST.inputs,
            InputSpec(name="types", dtype="int32", shape=("seq",), role=InputRole.TOKEN_TYPE_IDS, fill=0),
            InputSpec(name="pixels", dtype="float32", shape=("patch", 3), fill=None),
            InputSpec(name="flags", dtype="bool", shape=(2,), fill=0),
            InputSpec(name="scale", dtype="float64", shape=(), fill=1),
            InputSpec(name="pair", dtype="int64", shape=("seq", "seq"), fill=1),
        ),
        "outputs": (
            OutputSpec(name="patches", dtype="float16", shape=("patch", 4)),
            OutputSpec(name="found", dtype="int64", shape=("made",)),
        ),
        "text": None,
    }
)


def intake_of(manifest=MANIFEST, tokenizer: TextTokenizer | None = TOKENIZER, **limits: int) -> Intake:
    bounds = {"max_batch_size": 8, "max_text_bytes": MAX_TEXT_BYTES, "max_response_bytes": 10_000} | limits
    return Intake.of(manifest, tokenizer, **bounds)


def validated(request: pb.InferRequest, intake: Intake) -> ValidRequest:
    return validate(Received(request, request.ByteSize()), intake)


TINY = intake_of()
OTHER = intake_of(MIXED, None)


def tensor(name: str, values: object, dtype: str = "int64", shape: tuple[int, ...] | None = None) -> tensor_pb2.Tensor:
    array = np.array(values, dtype)
    number = tensor_pb2.DataType.Value(f"DATA_TYPE_{dtype.upper()}")
    return tensor_pb2.Tensor(
        name=name, dtype=number, shape=array.shape if shape is None else shape, data=array.tobytes()
    )


def of_tensors(*tensors: tensor_pb2.Tensor) -> pb.Sequence:
    return pb.Sequence(tensors=pb.TensorInput(tensors=tensors))


def of_text(text: str, pair: str = "") -> pb.Sequence:
    return pb.Sequence(text=pb.TextInput(text=text, text_pair=pair))


def asking(*sequences: pb.Sequence, **fields: object) -> pb.InferRequest:
    return pb.InferRequest(model="tiny", sequences=sequences, **fields)


def attending(**fields: object) -> pb.InferRequest:
    return asking(of_text("the cat sat"), attention=attention_pb2.AttentionSelection(**fields))


IDS = tensor("input_ids", [2, 4, 3])
PIXELS = tensor("pixels", np.zeros((2, 3)), "float32")
FIRST = "sequences[0].tensors.tensors[0]"
SECOND = "sequences[0].tensors.tensors[1]"
TEXT = "sequences[0].text.text"

VIOLATIONS: dict[str, tuple[pb.InferRequest, Intake, str, str]] = {
    "no sequence": (asking(), TINY, "sequences", "0 sequences are less than 1"),
    "more sequences than a batch": (asking(*[of_text("a")] * 9), TINY, "sequences", "9 sequences exceed 8"),
    "labels of a model without a head": (
        asking(of_text("a"), labels=labels_pb2.LabelSelection()),
        TINY,
        "labels",
        "model 'tiny' has no head that gives labels: leave labels unset",
    ),
    "neither text nor tensors": (asking(pb.Sequence()), TINY, "sequences[0]", "neither text nor tensors is set"),
    "the fourth sequence": (
        asking(*[of_text("a")] * 3, of_text("")),
        TINY,
        "sequences[3].text.text",
        "empty: at least 1 character is needed",
    ),
    "empty text": (asking(of_text("")), TINY, TEXT, "empty: at least 1 character is needed"),
    "text over the byte limit": (asking(of_text("x" * 101)), TINY, TEXT, "101 bytes exceed 100"),
    "bytes and not characters are counted": (asking(of_text("é" * 51)), TINY, TEXT, "102 bytes exceed 100"),
    "second text over the byte limit": (
        asking(of_text("a", "x" * 101)),
        TINY,
        "sequences[0].text.text_pair",
        "101 bytes exceed 100",
    ),
    "too many tokens": (asking(of_text("a " * 31)), TINY, TEXT, "33 tokens exceed 32"),
    "unknown input": (
        asking(of_tensors(tensor("nope", [1]), IDS)),
        TINY,
        f"{FIRST}.name",
        "no input 'nope'; the model takes input_ids, attention_mask",
    ),
    "doubled input": (asking(of_tensors(IDS, IDS)), TINY, f"{SECOND}.name", "input 'input_ids' is given twice"),
    "missing input": (
        asking(of_tensors(tensor("attention_mask", [1]))),
        TINY,
        "sequences[0].tensors.tensors",
        "input 'input_ids' is missing",
    ),
    "no tensors at all": (
        asking(of_tensors()),
        TINY,
        "sequences[0].tensors.tensors",
        "input 'input_ids' is missing",
    ),
    "wrong dtype": (
        asking(of_tensors(tensor("input_ids", [1.0], "float32"))),
        TINY,
        f"{FIRST}.dtype",
        "float32, but input 'input_ids' is int64",
    ),
    "no dtype": (
        asking(of_tensors(tensor_pb2.Tensor(name="input_ids", shape=[1], data=b"\0" * 8))),
        TINY,
        f"{FIRST}.dtype",
        "0, but input 'input_ids' is int64",
    ),
    "a dtype that the contract does not name": (
        asking(of_tensors(tensor_pb2.Tensor(name="input_ids", dtype=99, shape=[1], data=b"\0" * 8))),
        TINY,
        f"{FIRST}.dtype",
        "99, but input 'input_ids' is int64",
    ),
    "rank over 8": (
        asking(of_tensors(tensor("input_ids", [1], shape=(1,) * 9))),
        TINY,
        f"{FIRST}.shape",
        "rank 9 exceeds 8",
    ),
    "another rank than the model's": (
        asking(of_tensors(tensor("input_ids", [[1, 2]]))),
        TINY,
        f"{FIRST}.shape",
        "rank 2, but input 'input_ids' has rank 1 without batch: [seq]",
    ),
    "zero dim": (
        asking(of_tensors(tensor("input_ids", [], shape=(0,)))),
        TINY,
        f"{FIRST}.shape[0]",
        "length 0 is less than 1",
    ),
    "negative dim": (
        asking(of_tensors(IDS, tensor("pixels", [], "float32", shape=(2, -3)))),
        OTHER,
        f"{SECOND}.shape[1]",
        "length -3 is less than 1",
    ),
    "product that overflows": (
        asking(of_tensors(tensor("input_ids", [1], shape=(2**62, 2**62)))),
        TINY,
        f"{FIRST}.shape",
        f"{2**124} elements exceed {2**63 - 1}",
    ),
    "product that wraps round to the right size": (
        asking(of_tensors(tensor("input_ids", [1], shape=(2**62, 4, 1)))),
        TINY,
        f"{FIRST}.shape",
        f"{2**64} elements exceed {2**63 - 1}",
    ),
    "sequence over the limit": (
        asking(of_tensors(tensor("input_ids", [1] * 33))),
        TINY,
        f"{FIRST}.shape[0]",
        "length 33 exceeds 32 of axis 'seq'",
    ),
    "a fixed axis of another length": (
        asking(of_tensors(IDS, tensor("pixels", np.zeros((2, 4)), "float32"))),
        OTHER,
        f"{SECOND}.shape[1]",
        "length 4, but the model takes 3",
    ),
    "one axis with two lengths": (
        asking(of_tensors(IDS, tensor("attention_mask", [1, 1]))),
        TINY,
        f"{SECOND}.shape[0]",
        "length 2 of axis 'seq' differs from 3 of an input before it",
    ),
    "less data than the shape needs": (
        asking(of_tensors(tensor("input_ids", [1, 2], shape=(3,)))),
        TINY,
        f"{FIRST}.data",
        "16 bytes; shape [3] of int64 needs 24",
    ),
    "id below 0": (
        asking(of_tensors(tensor("input_ids", [2, -1, 3]))),
        TINY,
        f"{FIRST}.data",
        f"element 1 is -1; values of input 'input_ids' must be from 0 to {len(VOCABULARY) - 1}",
    ),
    "id at the vocabulary's size": (
        asking(of_tensors(tensor("input_ids", [2, 3, len(VOCABULARY)]))),
        TINY,
        f"{FIRST}.data",
        f"element 2 is {len(VOCABULARY)}; values of input 'input_ids' must be from 0 to {len(VOCABULARY) - 1}",
    ),
    "id of 2^63 - 1": (
        asking(of_tensors(tensor("input_ids", [2**63 - 1]))),
        TINY,
        f"{FIRST}.data",
        f"element 0 is {2**63 - 1}; values of input 'input_ids' must be from 0 to {len(VOCABULARY) - 1}",
    ),
    "a mark of 2": (
        asking(of_tensors(IDS, tensor("attention_mask", [1, 2, 0]))),
        TINY,
        f"{SECOND}.data",
        "element 1 is 2; values of input 'attention_mask' must be from 0 to 1",
    ),
    "a type of 2": (
        asking(of_tensors(IDS, tensor("types", [0, 1, 2], "int32"), PIXELS)),
        OTHER,
        f"{SECOND}.data",
        "element 2 is 2; values of input 'types' must be from 0 to 1",
    ),
    "NaN": (
        asking(of_tensors(IDS, tensor("pixels", [[0, 0, math.nan]], "float32"))),
        OTHER,
        f"{SECOND}.data",
        "element 2 is nan; floats must be finite",
    ),
    "infinity": (
        asking(of_tensors(IDS, PIXELS, tensor("scale", -math.inf, "float64"))),
        OTHER,
        "sequences[0].tensors.tensors[2].data",
        "element 0 is -inf; floats must be finite",
    ),
    "a bool of 2": (
        asking(of_tensors(IDS, tensor_pb2.Tensor(name="flags", dtype=1, shape=[2], data=b"\1\2"), PIXELS)),
        OTHER,
        f"{SECOND}.data",
        "element 1 is byte 2; a bool is 0 or 1",
    ),
    "unknown output": (
        asking(of_text("a"), outputs=pb.OutputSelection(names=["embedding", "nope"])),
        TINY,
        "outputs.names[1]",
        "no output 'nope'; the model has hidden, embedding",
    ),
    "doubled output": (
        asking(of_text("a"), outputs=pb.OutputSelection(names=["hidden", "hidden"])),
        TINY,
        "outputs.names[1]",
        "output 'hidden' is selected twice",
    ),
    "nothing to answer": (
        asking(of_text("a"), outputs=pb.OutputSelection()),
        TINY,
        "outputs.names",
        "empty, and no attention or label is selected: the response would be empty",
    ),
    "unknown priority": (asking(of_text("a"), priority=9), TINY, "priority", "9 is not one of 0, 1, 2, 3"),
    "layer out of range": (
        attending(layers=[0, 2]),
        TINY,
        "attention.layers[1]",
        "layer 2 is out of range; the model has 2 sites: -2 to 1",
    ),
    "head out of range": (
        attending(heads=[-3]),
        TINY,
        "attention.heads[0]",
        "head -3 is out of range; site 'layer0' has 2 heads: -2 to 1",
    ),
    "unknown enum": (attending(unit=7), TINY, "attention.unit", "7 is not one of 0, 1, 2"),
    "a dtype that weights cannot have": (
        attending(dtype=tensor_pb2.DATA_TYPE_INT64),
        TINY,
        "attention.dtype",
        "5 is not one of 0, 2, 6, 7",
    ),
    "a selection without end": (attending(queries=[0] * 4097), TINY, "attention.queries", "4097 entries exceed 4096"),
}


@pytest.mark.parametrize("name", VIOLATIONS)
def test_a_violation_names_field_limit_and_value(name: str) -> None:
    request, intake, field, description = VIOLATIONS[name]
    with pytest.raises(InvalidRequest) as caught:
        validated(request, intake)
    assert (field, description) in [(found.field, found.description) for found in caught.value.violations]


def test_a_query_out_of_range_names_sequence_limit_and_value() -> None:
    request = asking(
        of_text("the cat sat"), of_text("a"), attention=attention_pb2.AttentionSelection(queries=[4], layers=[0])
    )
    with pytest.raises(InvalidRequest) as caught:
        validated(request, TINY)
    (violation,) = caught.value.violations
    assert violation.field == "attention.queries[0]"
    for part in ("4", "3", "1"):  # the value, the number of tokens of `a`, the sequence
        assert part in violation.description


def test_all_violations_of_a_request_are_reported_together() -> None:
    request = asking(of_text(""), pb.Sequence(), of_text("y" * 200), outputs=pb.OutputSelection(names=["nope"]))
    with pytest.raises(InvalidRequest) as caught:
        validated(request, TINY)
    assert [violation.field for violation in caught.value.violations] == [
        "outputs.names[0]",
        "sequences[0].text.text",
        "sequences[1]",
        "sequences[2].text.text",
    ]


@pytest.mark.parametrize(
    "request_of",
    [
        lambda: asking(of_tensors(*[tensor("nope", [1])] * 40)),
        lambda: asking(of_text("a"), outputs=pb.OutputSelection(names=["nope"] * 40)),
        lambda: asking(*[pb.Sequence()] * 40),
        lambda: asking(*[of_text("a")] * 40, attention=attention_pb2.AttentionSelection(queries=[30], layers=[0])),
    ],
    ids=["tensors", "outputs", "sequences", "queries"],
)
def test_at_most_sixteen_violations_are_reported(request_of: Callable[[], pb.InferRequest]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        validated(request_of(), intake_of(max_batch_size=40))
    assert len(caught.value.violations) == MAX_VIOLATIONS


def test_text_for_a_model_without_a_tokenizer_is_a_failed_precondition() -> None:
    with pytest.raises(TextUnavailable):
        validated(asking(of_text("a")), OTHER)


def test_attention_of_a_model_without_sites_is_a_failed_precondition() -> None:
    bare = intake_of(MANIFEST.model_copy(update={"sites": ()}))
    with pytest.raises(AttentionUnavailable):
        validated(attending(), bare)


def test_attention_along_an_axis_without_an_input_is_a_failed_precondition() -> None:
    site = MANIFEST.sites[0].model_copy(update={"key_axis": "elsewhere"})
    odd = intake_of(MANIFEST.model_copy(update={"sites": (site,)}))
    with pytest.raises(AttentionUnavailable, match="elsewhere"):
        validated(attending(), odd)


def test_an_input_that_text_cannot_fill_is_named() -> None:
    manifest = MIXED.model_copy(update={"text": MANIFEST.text})
    with pytest.raises(InvalidRequest) as caught:
        validated(asking(of_text("a")), intake_of(manifest))
    assert [(v.field, v.description) for v in caught.value.violations] == [
        ("sequences[0].text", "input 'pixels' cannot be made from text: send tensors")
    ]


def test_an_omitted_input_of_unknown_length_is_named() -> None:
    inputs = (*MANIFEST.inputs, InputSpec(name="pixels", dtype="float32", shape=("patch", 3), fill=0))
    manifest = MIXED.model_copy(update={"inputs": inputs})
    with pytest.raises(InvalidRequest) as caught:
        validated(asking(of_tensors(IDS)), intake_of(manifest, None))
    assert caught.value.violations[0].description == (
        "input 'pixels' is missing, and no other input determines the length of axis 'patch'"
    )


def test_ids_beyond_the_models_vocabulary_are_refused_before_the_batch() -> None:
    small = intake_of(MANIFEST.model_copy(update={"vocabulary_size": 5}))
    with pytest.raises(InvalidRequest) as caught:
        validated(asking(of_text("the cat sat")), small)
    assert caught.value.violations[0].field == "sequences[0].text.text"


def test_a_text_of_no_tokens_is_refused() -> None:
    bare = tiny_tokenizer()
    bare.post_processor = None
    with pytest.raises(InvalidRequest, match="0 tokens are less than 1"):
        validated(asking(of_text(" ")), intake_of(tokenizer=TextTokenizer(bare, "seq")))


def test_a_text_model_without_token_ids_takes_the_mask_of_its_tokenizer() -> None:
    only_mask = MANIFEST.model_copy(update={"inputs": MANIFEST.inputs[1:]})
    prepared = validated(asking(of_text("the cat")), intake_of(only_mask))
    assert set(prepared.sequences[0].tensors) == {"attention_mask"}


def test_a_text_gives_ids_a_mask_and_units() -> None:
    prepared = validated(attending(layers=[0]), TINY)
    (sequence,) = prepared.sequences
    assert sequence.tensors["input_ids"].tolist() == [2, 4, 5, 6, 3]
    assert sequence.tensors["attention_mask"].tolist() == [1, 1, 1, 1, 1]
    assert sequence.lengths == {"seq": 5}
    assert sequence.units["seq"].texts == ("[CLS]", "the", "cat", "sat", "[SEP]")
    assert prepared.priority is Priority.NORMAL


def test_special_token_text_in_a_text_is_plain_text() -> None:
    (sequence,) = validated(asking(of_text("[SEP]")), TINY).sequences
    assert 3 not in sequence.tensors["input_ids"][1:-1]


def test_token_ids_get_the_tokenizers_texts_as_units() -> None:
    request = asking(of_tensors(IDS), attention=attention_pb2.AttentionSelection(layers=[0]))
    (sequence,) = validated(request, TINY).sequences
    assert sequence.units["seq"].texts == ("[CLS]", "the", "[SEP]")


def test_tensors_of_a_model_without_a_tokenizer_have_units_without_text() -> None:
    request = asking(of_tensors(IDS), attention=attention_pb2.AttentionSelection(layers=[0]))
    (sequence,) = validated(request, intake_of(tokenizer=None)).sequences
    assert (sequence.units["seq"].length, sequence.units["seq"].texts) == (3, ())


def test_omitted_inputs_are_filled_with_the_manifests_values() -> None:
    (sequence,) = validated(asking(of_tensors(IDS, PIXELS)), OTHER).sequences
    assert sequence.tensors["attention_mask"].tolist() == [1, 1, 1]
    assert sequence.tensors["types"].dtype == np.int32
    assert sequence.tensors["flags"].tolist() == [False, False]
    assert sequence.tensors["scale"].shape == ()
    assert sequence.tensors["pair"].shape == (3, 3)


def needing(*masks: MaskNeed, paddable: bool = True) -> Intake:
    """The intake of the tiny model with these needs."""
    axes = tuple(axis.model_copy(update={"paddable": paddable}) for axis in MANIFEST.axes)
    return intake_of(MANIFEST.model_copy(update={"axes": axes, "certificate": proved("seq", masks=masks)}))


SOME = MaskNeed(input="attention_mask", need="some", allowed_value=1)
ALL_IDS = MaskNeed(input="input_ids", need="all")


@pytest.mark.parametrize(
    ("ids", "mask", "unpadded"),
    [
        ([5, 6, 7], None, False),
        ([5, 6, 7], [0, 1, 0], False),
        ([5, 6, 7], [0, 0, 0], True),
        ([5, 0, 7], None, True),
    ],
    ids=["mask left out", "mask with holes", "mask of zeros", "padding id in the text"],
)
def test_a_sequence_that_breaks_a_need_of_the_certificate_is_not_padded(
    ids: list[int], mask: list[int] | None, unpadded: bool
) -> None:
    tensors = [tensor("input_ids", ids), *([tensor("attention_mask", mask)] if mask else [])]
    (sequence,) = validated(asking(of_tensors(*tensors)), needing(SOME, ALL_IDS)).sequences
    assert sequence.unpadded is unpadded


def test_masks_are_not_checked_if_no_axis_is_padded() -> None:
    intake = needing(SOME, paddable=False)
    assert intake.masks == ()
    (sequence,) = validated(asking(of_tensors(IDS, tensor("attention_mask", [0, 0, 0]))), intake).sequences
    assert not sequence.unpadded


@pytest.mark.parametrize("message", [of_text("the cat"), of_tensors(IDS)], ids=["text", "tensors"])
def test_values_of_a_filled_in_mask_are_not_read(message: pb.Sequence, monkeypatch: pytest.MonkeyPatch) -> None:
    intake = needing(SOME)
    monkeypatch.setattr(MaskNeed, "met_by", lambda *arguments: pytest.fail("it was looked at"))
    (sequence,) = validated(asking(message), intake).sequences
    assert not sequence.unpadded
    assert sequence.tensors["attention_mask"].tolist() == [1] * sequence.lengths["seq"]


def test_a_fill_value_is_checked_against_the_needs_once() -> None:
    (sequence,) = validated(asking(of_tensors(IDS)), needing(SOME.model_copy(update={"allowed_value": 3}))).sequences
    assert sequence.unpadded


def test_tensors_are_read_only_views_of_the_received_bytes() -> None:
    request = asking(of_tensors(IDS, tensor("flags", [True, False], "bool"), PIXELS))
    (sequence,) = validated(request, OTHER).sequences
    assert not sequence.tensors["input_ids"].flags.owndata
    assert not sequence.tensors["input_ids"].flags.writeable
    assert sequence.tensors["flags"].tolist() == [True, False]


def test_the_predicted_bytes_are_those_of_outputs_and_attention() -> None:
    prepared = validated(attending(layers=[0]), TINY)
    assert prepared.predicted_bytes == 4 * (5 * WIDTH + WIDTH) + 4 * 2 * 5 * 5


def test_an_output_axis_that_no_input_has_counts_with_its_greatest_length() -> None:
    prepared = validated(asking(of_tensors(IDS, PIXELS)), OTHER)
    assert prepared.predicted_bytes == 2 * 2 * 4 + 8 * 5


@pytest.mark.parametrize("spare", [0, -1])
def test_an_answer_over_the_limit_is_refused_with_both_byte_counts(spare: int) -> None:
    needed = 4 * (5 * WIDTH + WIDTH) + 4 * 2 * 5 * 5
    intake = replace(TINY, max_response_bytes=needed + spare)
    if spare == 0:
        assert validated(attending(layers=[0]), intake).predicted_bytes == needed
        return
    with pytest.raises(ResponseTooLarge) as caught:
        validated(attending(layers=[0]), intake)
    assert caught.value.metadata() == {"predicted_bytes": str(needed), "allowed_bytes": str(needed - 1)}


@pytest.mark.parametrize("request_id", ["a", "x" * 128, "a b~!"])
def test_a_request_id_of_printable_ascii_is_accepted(request_id: str) -> None:
    check_request_id(request_id)


@pytest.mark.parametrize(
    ("request_id", "description"),
    [
        ("x" * 129, "129 characters exceed 128: '" + "x" * 64 + "...'"),
        ("a\nb", r"not printable ASCII: 'a\nb'"),
        ("\x1b[31m", r"not printable ASCII: '\x1b[31m'"),
        ("é", r"not printable ASCII: '\xe9'"),
    ],
)
def test_a_request_id_that_may_not_be_echoed_is_refused(request_id: str, description: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_request_id(request_id)
    (violation,) = caught.value.violations
    assert (violation.field, violation.description) == ("request_id", description)


@pytest.mark.parametrize(
    ("model", "version", "field"),
    [
        ("", "", "model"),
        ("../etc", "", "model"),
        ("a/b", "", "model"),
        ("a\0b", "", "model"),
        ("a\nb", "", "model"),
        ("x" * 129, "", "model"),
        ("tiny", "0", "version"),
        ("tiny", "-1", "version"),
        ("tiny", "1.0", "version"),
        ("tiny", "1" * 10, "version"),
    ],
)
def test_an_impossible_model_name_is_refused_before_any_lookup(model: str, version: str, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_model_reference(model, version)
    assert [violation.field for violation in caught.value.violations] == [field]
    assert len(caught.value.violations[0].description) < 200


def test_a_possible_model_name_passes() -> None:
    check_model_reference("all-MiniLM-L6-v2", "12")
    check_model_reference("tiny", "")


def test_model_not_found_is_not_an_invalid_request() -> None:
    assert not isinstance(ModelNotFound("a", ""), InvalidRequest)


@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=10))
def test_no_shape_makes_anything_but_a_violation(shape: list[int]) -> None:
    wrong = tensor_pb2.Tensor(name="input_ids", dtype=tensor_pb2.DATA_TYPE_INT64, shape=shape, data=b"x")
    with pytest.raises(InvalidRequest) as caught:
        validated(asking(of_tensors(wrong)), TINY)
    assert all(found.field.startswith(FIRST) for found in caught.value.violations)


HALVED = MANIFEST.model_copy(
    update={
        "axes": (
            *MANIFEST.axes,
            AxisSpec(
                symbol="half",
                max_length=16,
                paddable=True,
                derived=DerivedLength(source=MANIFEST.axes[0].symbol, stride=2, offset=0),
            ),
            AxisSpec(symbol="else", max_length=1, paddable=True, derived=DerivedLength(source="nothing", stride=2)),
        ),
        "sites": tuple(site.model_copy(update={"key_axis": "half"}) for site in MANIFEST.sites),
    }
)


def test_units_of_a_derived_axis_span_those_of_its_source() -> None:
    request = pb.InferRequest(
        model="tiny", sequences=[of_text("the cat sat")], attention=attention_pb2.AttentionSelection()
    )
    (sequence,) = validated(request, intake_of(HALVED)).sequences
    assert sequence.units["half"].texts == ("[CLS] the", "cat sat")
    assert sequence.lengths == {"seq": 5}, "derived positions do not count as tokens"
    whole = validated(request, TINY).predicted_bytes
    assert validated(request, intake_of(HALVED)).predicted_bytes == whole - 4 * sum(
        site.heads * 5 * (5 - 2) for site in MANIFEST.sites
    )


def test_a_sequence_shorter_than_a_window_is_refused() -> None:
    request = pb.InferRequest(
        model="tiny", sequences=[of_tensors(tensor("input_ids", [1]), tensor("attention_mask", [1]))]
    )
    with pytest.raises(InvalidRequest) as refused:
        validated(request, intake_of(HALVED))
    ((field, description),) = [(each.field, each.description) for each in refused.value.violations]
    assert (field, description) == ("sequences[0]", "length 1 of axis 'seq' is less than 2, which 'half' needs")
