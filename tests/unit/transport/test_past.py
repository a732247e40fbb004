"""Validation of sequences with a past: each violation with its field, value, limit and remedy.

A past is the keys and values of earlier positions, sent as one tensor for each cache input. `one` returns the validated
sequence and `violations` the fields and descriptions of InvalidRequest. An answer over the limit raises
ResponseTooLarge.
"""

from __future__ import annotations

import numpy as np
import pytest
from attnserve.v1 import attention_pb2, model_pb2, tensor_pb2
from attnserve.v1 import inference_service_pb2 as pb
from attnserve_server.domain.errors import InvalidRequest, ResponseTooLarge
from attnserve_server.domain.values import PreparedSequence
from attnserve_server.model.tokenizer import TextTokenizer
from attnserve_server.transport.dataplane import describe
from attnserve_server.transport.intake import Intake
from attnserve_server.transport.validation import ValidRequest, validate
from attnserve_server.transport.wire import Received
from past_graphs import HEAD_DIM, HEADS, KV_HEADS, LAYERS, MAX_LENGTH, PASTS, PRESENTS, manifest
from tiny_bundle import VOCABULARY, tiny_manifest, tiny_tokenizer

MANIFEST = manifest(text=True)
ALL_MAPS = attention_pb2.AttentionSelection()


def intake_of(made=MANIFEST, max_response_bytes: int = 1_000_000) -> Intake:
    tokenizer = TextTokenizer(tiny_tokenizer(), "seq")
    return Intake.of(made, tokenizer, max_batch_size=8, max_text_bytes=100, max_response_bytes=max_response_bytes)


INTAKE = intake_of()


def tensor(name: str, array: np.ndarray) -> tensor_pb2.Tensor:
    number = tensor_pb2.DataType.Value(f"DATA_TYPE_{array.dtype.name.upper()}")
    return tensor_pb2.Tensor(name=name, dtype=number, shape=array.shape, data=array.tobytes())


def ids(*numbers: int) -> tensor_pb2.Tensor:
    return tensor("input_ids", np.array(numbers, np.int64))


def mask(*numbers: int) -> tensor_pb2.Tensor:
    return tensor("attention_mask", np.array(numbers, np.int64))


def past(length: int = 3, **lengths: int) -> list[tensor_pb2.Tensor]:
    """Every cache input of this length, or of another one by its name, with dots as underscores."""
    shapes = {name: (KV_HEADS, lengths.get(name.replace(".", "_"), length), HEAD_DIM) for name in PASTS}
    return [tensor(name, np.ones(shape, np.float32)) for name, shape in shapes.items()]


def tensors(*given: tensor_pb2.Tensor, past_tokens: tuple[str, ...] = ()) -> pb.Sequence:
    return pb.Sequence(tensors=pb.TensorInput(tensors=given), past_tokens=past_tokens)


def request(*sequences: pb.Sequence, **fields: object) -> pb.InferRequest:
    return pb.InferRequest(model="decoder", sequences=sequences, **fields)  # type: ignore[arg-type]


def validated(message: pb.InferRequest, intake: Intake = INTAKE) -> ValidRequest:
    return validate(Received(message, message.ByteSize()), intake)


def one(message: pb.InferRequest) -> PreparedSequence:
    (prepared,) = validated(message).sequences
    return prepared


def violations(message: pb.InferRequest, intake: Intake = INTAKE) -> list[tuple[str, str]]:
    with pytest.raises(InvalidRequest) as caught:
        validated(message, intake)
    return [(each.field, each.description) for each in caught.value.violations]


FIELD = "sequences[0].tensors.tensors"


def test_a_past_makes_a_sequence_of_the_continuing_graph() -> None:
    prepared = one(request(tensors(ids(4, 5), *past(3))))
    assert (prepared.past, prepared.lengths, prepared.tokens) == (3, {"seq": 2, "past": 3}, 5)
    assert set(prepared.tensors) == {"input_ids", "attention_mask", "position_ids", *PASTS}
    assert prepared.tensors["attention_mask"].tolist() == [1] * 5
    assert prepared.tensors["position_ids"].tolist() == [3, 4]
    assert prepared.outputs == ("logits",)


def test_positions_follow_the_mask_over_past_and_new_positions() -> None:
    prepared = one(request(tensors(ids(4, 5), mask(0, 1, 1, 1, 1), *past(3))))
    assert prepared.tensors["position_ids"].tolist() == [2, 3]
    sent = tensor("position_ids", np.array([7, 8], np.int64))
    assert one(request(tensors(sent, ids(4, 5), *past(3)))).tensors["position_ids"].tolist() == [7, 8]
    assert one(request(tensors(ids(4, 5), mask(0, 1)))).tensors["position_ids"].tolist() == [0, 0]


def test_a_request_may_mix_sequences_with_and_without_a_past() -> None:
    first, second = validated(request(tensors(ids(4, 5), *past(3)), tensors(ids(4)))).sequences
    assert (first.past, second.past, second.lengths) == (3, 0, {"seq": 1})


@pytest.mark.parametrize(
    ("sequence", "field", "described"),
    [
        (
            tensors(ids(4), *past(3)[1:]),
            FIELD,
            (
                "cache input 'past_key_values.0.key' is missing: 3 of 4 are sent; "
                "send all of them, or none for an empty past"
            ),
        ),
        (
            tensors(ids(4), *past(3, past_key_values_1_key=2)),
            f"{FIELD}[3].shape[1]",
            "length 2 of axis 'past' differs from 3 of an input before it",
        ),
        (
            tensors(ids(4), *past(3), mask(1, 1, 1)),
            f"{FIELD}[5].shape[0]",
            "length 3 for 3 past and 1 new positions; leave 'attention_mask' out to have it filled",
        ),
        (
            tensors(mask(1, 1, 1), ids(4), *past(3)),
            f"{FIELD}[0].shape[0]",
            "length 3 for 3 past and 1 new positions; leave 'attention_mask' out to have it filled",
        ),
        (
            tensors(ids(4, 5), *past(MAX_LENGTH - 1)),
            FIELD,
            f"{MAX_LENGTH - 1} past and 2 new positions exceed {MAX_LENGTH} of axis 'seq'",
        ),
        (
            tensors(ids(4), *past(3), past_tokens=("a", "b")),
            "sequences[0].past_tokens",
            "2 labels for 3 past positions: send one for each, or none",
        ),
        (
            tensors(ids(4), past_tokens=("a",)),
            "sequences[0].past_tokens",
            "1 labels for a sequence without a past: leave them out",
        ),
    ],
)
def test_a_past_that_does_not_fit_is_refused(sequence: pb.Sequence, field: str, described: str) -> None:
    assert violations(request(sequence)) == [(field, described)]


def test_an_empty_past_is_refused_with_a_remedy_for_each_cache_input() -> None:
    found = violations(request(tensors(ids(4), *past(0))))
    assert [field for field, _ in found] == [f"{FIELD}[{at}].shape" for at in range(1, 5)]
    assert found[0][1] == "shape [2, 0, 4] has no positions; leave all cache inputs out for an empty past"


def test_a_model_without_a_past_names_its_inputs_and_refuses_labels() -> None:
    plain = intake_of(tiny_manifest())
    found = violations(request(tensors(ids(4), *past(3)[:1], past_tokens=("a",))), plain)
    assert found == [
        ("sequences[0].past_tokens", "1 labels for a sequence without a past: leave them out"),
        (f"{FIELD}[1].name", "no input 'past_key_values.0.key'; the model takes input_ids, attention_mask"),
    ]


def test_key_units_are_the_past_and_the_new_positions() -> None:
    prepared = one(request(tensors(ids(4, 5), *past(2)), attention=ALL_MAPS))
    assert (prepared.units["seq"].texts, prepared.units["seq"].length) == (("the", "cat"), 2)
    keys = prepared.units["past+seq"]
    assert (keys.length, keys.texts) == (4, ("past[0]", "past[1]", "the", "cat"))
    assert keys.special == (False,) * 4
    labelled = one(request(tensors(ids(4, 5), *past(2), past_tokens=("on", "a")), attention=ALL_MAPS))
    assert labelled.units["past+seq"].texts == ("on", "a", "the", "cat")


def test_text_after_a_past_has_no_offsets_for_past_keys_and_leaves_each_a_unit() -> None:
    text = pb.Sequence(text=pb.TextInput(text="the cat", tensors=past(2)))
    words = attention_pb2.AttentionSelection(unit=attention_pb2.ATTENTION_UNIT_WORD)
    prepared = one(request(text, attention=words))
    keys = prepared.units["past+seq"]
    assert keys.texts == ("past[0]", "past[1]", "[CLS]", "the", "cat", "[SEP]")
    assert (keys.starts, keys.ends) == ((0, 0, 0, 0, 4, 0), (0, 0, 0, 3, 7, 0))
    assert keys.special == (False, False, True, False, False, True)
    assert keys.word_ids == (-1, -1, -1, 0, 1, -1)
    assert prepared.tensors["position_ids"].tolist() == [2, 3, 4, 5]


def test_without_a_tokenizer_new_keys_have_their_numbers_as_queries_have() -> None:
    bare = Intake.of(manifest(), None, max_batch_size=8, max_text_bytes=100, max_response_bytes=1_000_000)
    message = request(tensors(ids(4, 5), *past(2)), attention=ALL_MAPS)
    (prepared,) = validated(message, bare).sequences
    assert prepared.units["past+seq"].texts == ("past[0]", "past[1]", "0", "1")


def test_rollout_is_refused_where_keys_are_more_than_queries() -> None:
    rollout = attention_pb2.AttentionSelection(layer_reduction=attention_pb2.LAYER_REDUCTION_ROLLOUT)
    assert one(request(tensors(ids(4, 5)), attention=rollout)).past == 0
    found = violations(request(tensors(ids(4)), tensors(ids(4, 5), *past(3)), attention=rollout))
    assert found == [
        (
            "attention.layer_reduction",
            (
                "rollout needs equal queries and keys; "
                "sequences[1] has 3 past positions, which are keys and no queries: take each or mean"
            ),
        )
    ]


def test_an_output_of_the_prompt_graph_alone_is_refused_after_a_past() -> None:
    assert MANIFEST.past is not None
    fewer = MANIFEST.past.model_copy(
        update={
            "outputs": MANIFEST.past.outputs[:-1],
            "caches": tuple(cache.model_copy(update={"present": ""}) for cache in MANIFEST.past.caches),
        }
    )
    intake = intake_of(MANIFEST.model_copy(update={"past": fewer}))
    selected = pb.OutputSelection(names=["logits", PRESENTS[-1]])
    assert validated(request(tensors(ids(4)), outputs=selected), intake).outputs == ("logits", PRESENTS[-1])
    found = violations(request(tensors(ids(4), *past(3)), outputs=selected), intake)
    assert found == [
        (
            "outputs.names[1]",
            (
                "no output 'present.1.value' after a past, which sequences[0] has; there are logits, present.0.key, "
                "present.0.value, present.1.key"
            ),
        )
    ]


def test_presents_and_maps_over_the_past_count_to_the_size_of_the_answer() -> None:
    logits = 2 * len(VOCABULARY) * 4
    sent = tensors(ids(4, 5), *past(3))
    assert validated(request(sent)).predicted_bytes == logits
    presents = pb.OutputSelection(names=["logits", *PRESENTS])
    cache = 2 * LAYERS * KV_HEADS * 5 * HEAD_DIM * 4
    assert validated(request(sent, outputs=presents)).predicted_bytes == logits + cache
    maps = LAYERS * HEADS * 2 * 5 * 4
    assert validated(request(sent, attention=ALL_MAPS)).predicted_bytes == logits + maps
    with pytest.raises(ResponseTooLarge):
        validated(request(sent, outputs=presents), intake_of(max_response_bytes=logits + cache - 1))


def test_the_description_states_the_past() -> None:
    message = model_pb2.Model()
    describe(message, MANIFEST, "proved")
    assert (message.past.axis, message.past.new_axis, message.past.key_axis) == ("past", "seq", "past+seq")
    assert [(cache.input.name, cache.present) for cache in message.past.caches] == list(
        zip(PASTS, PRESENTS, strict=True)
    )
    assert [extent.symbol or extent.size for extent in message.past.caches[0].input.shape] == [KV_HEADS, "past", 4]
    assert [spec.name for spec in message.past.inputs] == ["input_ids", "attention_mask", "position_ids"]
    assert [spec.optional for spec in message.past.inputs] == [False, True, True]
    assert [spec.on_request for spec in message.past.outputs] == [False, True, True, True, True]
    assert message.past.batched
    describe(plain := model_pb2.Model(), tiny_manifest(), "proved")
    assert not plain.HasField("past")
