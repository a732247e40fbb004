"""Cross-attention has units on both axes: two texts, or a text and image patches, sent as text or as tensors.

Units are the rows and columns of a map: tokens, words or patches. `encoder_decoder` and `over_patches` make the
manifests, and `checked` validates one sequence. It raises InvalidRequest with the field of each violation, and
AttentionUnavailable where an axis has no words.
"""

from __future__ import annotations

import re

import numpy as np
import pytest
from attnserve.v1 import attention_pb2, tensor_pb2
from attnserve.v1 import inference_service_pb2 as pb
from attnserve_server.domain.errors import AttentionUnavailable, InvalidRequest
from attnserve_server.domain.values import AxisUnits
from attnserve_server.model.manifest import AxisSpec, InputRole, InputSpec, Manifest, OutputSpec, TextSpec
from attnserve_server.model.tokenizer import TextTokenizer
from attnserve_server.transport.intake import Intake
from attnserve_server.transport.validation import ValidRequest, validate
from attnserve_server.transport.wire import Received
from made_by_hand import proved
from tiny_bundle import VOCABULARY, tiny_manifest, tiny_tokenizer

IDS, MASK, TYPES = InputRole.TOKEN_IDS, InputRole.ATTENTION_MASK, InputRole.TOKEN_TYPE_IDS
CLS, SEP = 2, 3
WORD_UNIT, DROP = attention_pb2.ATTENTION_UNIT_WORD, attention_pb2.SPECIAL_TOKENS_DROP


def flat(name: str, axis: str, role: InputRole, **fields: object) -> InputSpec:
    return InputSpec(name=name, dtype="int64", shape=(axis,), role=role, **fields)


def axis(symbol: str, length: int = 12, **fields: object) -> AxisSpec:
    return AxisSpec(**{"symbol": symbol, "max_length": length, "paddable": True} | fields)


def crossing(query_axis: str, key_axis: str, **fields: object) -> Manifest:
    """A manifest whose only site attends from one axis to another."""
    tiny = tiny_manifest()
    site = tiny.sites[0].model_copy(update={"kind": "cross", "query_axis": query_axis, "key_axis": key_axis})
    output = OutputSpec(name="hidden", dtype="float32", shape=(query_axis, 4))
    given = [each.symbol for each in fields["axes"] if each.derived is None and not each.fixed]
    own = {"outputs": (output,), "vocabulary_size": len(VOCABULARY), "certificate": proved(*given)}
    return Manifest(**{**dict(tiny), "sites": (site,), **own, **fields})


def encoder_decoder(start: int | None = SEP, target_vocabulary: int = 0) -> Manifest:
    return crossing(
        "target",
        "source",
        axes=(axis("source"), axis("target", 6)),
        inputs=(
            flat("input_ids", "source", IDS),
            flat("attention_mask", "source", MASK, fill=1),
            flat("decoder_input_ids", "target", IDS, vocabulary_size=target_vocabulary),
            flat("decoder_attention_mask", "target", MASK, fill=1),
            flat("decoder_token_type_ids", "target", TYPES, fill=0),
        ),
        text=TextSpec(axis="source", max_tokens=12, pair_axis="target", pair_max_tokens=6, pair_start=start),
    )


def over_patches(**fields: object) -> Manifest:
    return crossing(
        "seq",
        "patches",
        axes=(axis("seq"), axis("patches", 7, paddable=False, fixed=True, **({"grid": (2, 3), "leading": 1} | fields))),
        inputs=(
            flat("input_ids", "seq", IDS),
            InputSpec(name="pixel_values", dtype="float32", shape=(3, 4, 6)),
        ),
        text=TextSpec(axis="seq", max_tokens=12),
    )


def checked(manifest: Manifest, sequence: pb.Sequence, **selection: object) -> ValidRequest:
    """Return the valid request of one sequence, with all maps selected unless `selection` limits them."""
    limits = {"max_batch_size": 8, "max_text_bytes": 100, "max_response_bytes": 10_000}
    intake = Intake.of(manifest, TextTokenizer(tiny_tokenizer(), manifest.text.axis), **limits)
    attention = attention_pb2.AttentionSelection(**selection)
    request = pb.InferRequest(model="tiny", sequences=[sequence], attention=attention)
    return validate(Received(request, request.ByteSize()), intake)


def of_text(text: str, pair: str = "") -> pb.Sequence:
    return pb.Sequence(text=pb.TextInput(text=text, text_pair=pair))


def of_tensors(**arrays: np.ndarray) -> pb.Sequence:
    kinds = {"i": tensor_pb2.DATA_TYPE_INT64, "f": tensor_pb2.DATA_TYPE_FLOAT32}
    return pb.Sequence(
        tensors=pb.TensorInput(
            tensors=[
                tensor_pb2.Tensor(name=name, dtype=kinds[each.dtype.kind], shape=each.shape, data=each.tobytes())
                for name, each in arrays.items()
            ]
        )
    )


def ids(*words: str) -> np.ndarray:
    return np.array([VOCABULARY.index(word) for word in words])


def test_a_second_text_fills_its_own_axis() -> None:
    (sequence,) = checked(encoder_decoder(), of_text("the cat sat", "a dog")).sequences
    assert sequence.lengths == {"source": 5, "target": 5}
    assert sequence.tensors["input_ids"].tolist() == [CLS, *ids("the", "cat", "sat"), SEP]
    # The start token, and the text with the tokens that its own tokenizer adds.
    assert sequence.tensors["decoder_input_ids"].tolist() == [SEP, CLS, *ids("a", "dog"), SEP]
    assert sequence.tensors["attention_mask"].tolist() == [1] * 5
    assert sequence.tensors["decoder_attention_mask"].tolist() == [1] * 5
    assert sequence.tensors["decoder_token_type_ids"].tolist() == [0] * 5


def test_units_of_each_text_have_offsets_into_it() -> None:
    (sequence,) = checked(encoder_decoder(), of_text("the cat sat", "a dog")).sequences
    source, target = sequence.units["source"], sequence.units["target"]
    assert (source.axis, source.texts) == ("source", ("[CLS]", "the", "cat", "sat", "[SEP]"))
    assert source.segments == (0,) * 5
    assert (target.axis, target.length) == ("target", 5)
    assert target.texts == ("[SEP]", "[CLS]", "a", "dog", "[SEP]")
    assert target.special == (True, True, False, False, True)
    assert target.segments == (0, 0, 1, 1, 0)
    assert list(zip(target.starts, target.ends, strict=True)) == [(0, 0), (0, 0), (0, 1), (2, 5), (0, 0)]
    assert (target.words, target.word_spans) == (("a", "dog"), ((1, 0, 1), (1, 2, 5)))


def test_words_and_special_tokens_are_known_on_both_sides() -> None:
    (sequence,) = checked(encoder_decoder(), of_text("the cat", "a"), unit=WORD_UNIT, special_tokens=DROP).sequences
    assert sequence.units["target"].word_ids == (-1, -1, 0, -1)


def test_without_a_second_text_the_decoder_gets_only_its_start_token() -> None:
    (sequence,) = checked(encoder_decoder(), of_text("the cat")).sequences
    assert sequence.tensors["decoder_input_ids"].tolist() == [SEP]
    assert sequence.units["target"] == AxisUnits(
        axis="target",
        length=1,
        texts=("[SEP]",),
        starts=(0,),
        ends=(0,),
        special=(True,),
        segments=(0,),
        word_ids=(-1,),
    )


@pytest.mark.parametrize(
    ("start", "pair", "field", "words"),
    [
        (None, "", "text.text_pair", "empty: the model needs a second text, along axis 'target'"),
        (SEP, "a a a a", "text.text_pair", "7 tokens exceed 6"),
        (None, "x" * 101, "text.text_pair", "101 bytes exceed 100"),
        (None, "dog", "text.text_pair", "element 1 is 13; values of input 'decoder_input_ids' must be from 0 to 4"),
    ],
)
def test_violations_of_the_second_text_name_it(start: int | None, pair: str, field: str, words: str) -> None:
    vocabulary = 5 if pair == "dog" else 0
    with pytest.raises(InvalidRequest) as refusal:
        checked(encoder_decoder(start, vocabulary), of_text("the cat", pair))
    assert [violation.field for violation in refusal.value.violations] == [f"sequences[0].{field}"]
    assert re.search(words, refusal.value.violations[0].description)


def test_ids_sent_as_tensors_have_tokens_and_words_on_both_axes() -> None:
    sent = of_tensors(input_ids=ids("[CLS]", "the", "cat", "[SEP]"), decoder_input_ids=ids("[SEP]", "a", "dog"))
    (sequence,) = checked(encoder_decoder(), sent, unit=WORD_UNIT).sequences
    assert sequence.units["source"].texts == ("[CLS]", "the", "cat", "[SEP]")
    target = sequence.units["target"]
    assert (target.axis, target.texts, target.words) == ("target", ("[SEP]", "a", "dog"), ("a", "dog"))


def test_patches_are_named_by_row_and_column_and_leading_positions_are_special() -> None:
    sent = of_tensors(input_ids=ids("[CLS]", "the"), pixel_values=np.zeros((3, 4, 6), np.float32))
    (sequence,) = checked(over_patches(), sent, unit=WORD_UNIT, special_tokens=DROP).sequences
    patches = sequence.units["patches"]
    assert patches.texts == ("[0]", "r1 c1", "r1 c2", "r1 c3", "r2 c1", "r2 c2", "r2 c3")
    assert patches.special == (True, *[False] * 6)
    assert (patches.grid, patches.leading) == ((2, 3), 1)
    assert sequence.units["seq"].texts == ("[CLS]", "the")


def test_positions_without_text_stay_units_among_words() -> None:
    sent = of_tensors(input_ids=ids("[CLS]", "the"), pixel_values=np.zeros((3, 4, 6), np.float32))
    (sequence,) = checked(over_patches(grid=None, leading=0), sent, unit=WORD_UNIT).sequences
    assert sequence.units["patches"] == AxisUnits(axis="patches", length=7, special=(False,) * 7, word_ids=(-1,) * 7)


def image(**fields: object) -> tensor_pb2.Tensor:
    data = np.zeros((3, 4, 6), np.float32)
    given = {"name": "pixel_values", "dtype": tensor_pb2.DATA_TYPE_FLOAT32, "shape": data.shape, "data": data.tobytes()}
    return tensor_pb2.Tensor(**{**given, **fields})


def test_text_may_come_with_tensors_that_it_cannot_fill() -> None:
    sent = pb.Sequence(text=pb.TextInput(text="the cat", tensors=[image()]))
    (sequence,) = checked(over_patches(), sent).sequences
    assert sequence.tensors["pixel_values"].shape == (3, 4, 6)
    assert sequence.units["seq"].texts == ("[CLS]", "the", "cat", "[SEP]")
    assert sequence.units["patches"].grid == (2, 3)


@pytest.mark.parametrize(
    ("tensors", "field", "words"),
    [
        ([], "text", "input 'pixel_values' cannot be made from text"),
        ([image(name="pixels")], "text.tensors[0].name", "no input 'pixels'"),
        ([image(shape=(3, 6, 4))], "text.tensors[0].shape[1]", "length 6, but the model takes 4"),
        ([image(), image()], "text.tensors[1].name", "given twice"),
        (
            [
                image(),
                image(
                    name="input_ids",
                    dtype=tensor_pb2.DATA_TYPE_INT64,
                    shape=[4],
                    data=ids("a", "a", "a", "a").tobytes(),
                ),
            ],
            "text.text",
            "input 'input_ids' is made from the text, and came as a tensor too",
        ),
    ],
)
def test_violations_of_tensors_beside_text_are_reported(
    tensors: list[tensor_pb2.Tensor], field: str, words: str
) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        checked(over_patches(), pb.Sequence(text=pb.TextInput(text="the cat", tensors=tensors)))
    assert any(
        violation.field == f"sequences[0].{field}" and words in violation.description
        for violation in refusal.value.violations
    )


def test_an_invalid_tensor_is_not_reported_as_missing_too() -> None:
    sent = pb.Sequence(text=pb.TextInput(text="the cat", tensors=[image(shape=(3, 6, 4))]))
    with pytest.raises(InvalidRequest) as refusal:
        checked(over_patches(), sent)
    assert {violation.field.partition(".shape")[0] for violation in refusal.value.violations} == {
        "sequences[0].text.tensors[0]"
    }


def test_feature_frames_have_positions_and_other_ids_have_no_words() -> None:
    inputs = (
        flat("input_ids", "seq", IDS),
        InputSpec(name="frames", dtype="float32", shape=("frames", 8)),
        InputSpec(name="codes", dtype="int64", shape=("codes",)),
    )
    axes = (axis("seq"), axis("frames"), axis("codes"))
    manifest = crossing("seq", "frames", axes=axes, inputs=inputs, text=TextSpec(axis="seq", max_tokens=12))
    sent = of_tensors(input_ids=ids("the"), frames=np.zeros((3, 8), np.float32), codes=np.zeros(2, np.int64))
    (sequence,) = checked(manifest, sent, unit=WORD_UNIT).sequences
    assert sequence.units["frames"].word_ids == (-1, -1, -1)
    manifest = crossing("seq", "codes", axes=axes, inputs=inputs, text=TextSpec(axis="seq", max_tokens=12))
    with pytest.raises(AttentionUnavailable, match="words along axis 'codes'"):
        checked(manifest, sent, unit=WORD_UNIT)


@pytest.mark.parametrize("padded", [0, 7])
def test_mask_whose_true_hides_positions_is_false_for_tokens_and_true_for_padding(padded: int) -> None:
    mask = InputSpec(name="padding_mask", dtype="bool", shape=("source",), role=MASK, padding=1, fill=0, inverted=True)
    manifest = encoder_decoder()
    inputs = tuple(mask if spec.name == "attention_mask" else spec for spec in manifest.inputs)
    raw = tiny_tokenizer()
    if padded:
        raw.enable_padding(length=padded)
    limits = {"max_batch_size": 8, "max_text_bytes": 100, "max_response_bytes": 10_000}
    intake = Intake.of(
        manifest.model_copy(update={"inputs": inputs}), TextTokenizer(raw, "source", ["source"]), **limits
    )
    request = pb.InferRequest(model="tiny", sequences=[of_text("the cat sat", "a dog")])
    (sequence,) = validate(Received(request, request.ByteSize()), intake).sequences
    assert sequence.tensors["padding_mask"].dtype == np.bool_
    assert sequence.tensors["padding_mask"].tolist() == [False] * 5 + [True] * max(padded - 5, 0)
