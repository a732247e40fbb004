"""A past in the client: what is sent, what a description states, and the refusals before a call.

A past is the keys and values of earlier positions, which a decoder with a cache takes beside new ones. `Continuation`
joins it to an input. One without arrays raises InvalidRequest, and labels that are one text raise TypeError.
`Past.after`, which makes the next past, raises KeyError where an array is missing.
"""

from __future__ import annotations

import numpy as np
import pytest
from attnserve.v1 import inference_service_pb2 as wire
from attnserve.v1 import model_pb2, tensor_pb2
from attnserve_client import Client, InvalidRequest
from attnserve_client._inputs import sequence_of, split, takes_ids
from attnserve_client._models import model_of
from attnserve_client.data_types import Continuation, Past
from attnserve_client.testing import FakeServer

KEYS = np.arange(6, dtype=np.float32).reshape(1, 3, 2)


def spec(name: str, *shape: str | int) -> model_pb2.TensorSpec:
    sizes = [
        model_pb2.Dimension(symbol=one) if isinstance(one, str) else model_pb2.Dimension(size=one) for one in shape
    ]
    return model_pb2.TensorSpec(name=name, dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=sizes)


def described() -> Past:
    message = model_pb2.Model(
        past=model_pb2.Past(
            axis="past",
            new_axis="seq",
            key_axis="past+seq",
            caches=[
                model_pb2.Cache(input=spec("past.key", 1, "past", 2), present="present.key"),
                model_pb2.Cache(input=spec("encoder.key", 1, "source", 2)),
            ],
            outputs=[spec("logits", "seq", 5)],
            batched=True,
        )
    )
    past = model_of(message).past
    assert past is not None
    return past


def test_a_description_states_the_past() -> None:
    past = described()
    assert (past.axis, past.new_axis, past.key_axis, past.batched, past.paddable) == (
        "past",
        "seq",
        "past+seq",
        True,
        False,
    )
    assert past.caches[0].input.shape == (1, "past", 2)
    assert past.presents == ("present.key",)
    assert model_of(model_pb2.Model()).past is None


def test_the_next_past_comes_from_outputs_and_unchanged_inputs() -> None:
    past = described()
    found = past.after({"present.key": KEYS}, {"past.key": KEYS[:, :1], "encoder.key": KEYS})
    assert found["past.key"] is KEYS
    assert found["encoder.key"] is KEYS
    with pytest.raises(KeyError, match=r"encoder\.key"):
        past.after({"present.key": KEYS})


@pytest.mark.parametrize("given", ["the cat", ("the cat", "a mat"), [4, 5], {"input_ids": np.array([4, 5])}])
def test_a_continuation_is_sent_with_its_input(given: object) -> None:
    one = Continuation(given, {"past.key": KEYS}, ["a", "b", "c"])  # type: ignore[arg-type]
    message = sequence_of(one, None)
    sent = message.text.tensors if message.WhichOneof("input") == "text" else message.tensors.tensors
    assert sent[-1] == wire.Sequence(tensors=wire.TensorInput(tensors=[sent[-1]])).tensors.tensors[0]
    assert (sent[-1].name, list(sent[-1].shape), sent[-1].data) == ("past.key", [1, 3, 2], KEYS.tobytes())
    assert list(message.past_tokens) == ["a", "b", "c"]
    del sent[-1], message.past_tokens[:]
    assert message == sequence_of(given, None)  # type: ignore[arg-type]


def test_a_continuation_is_one_sequence_and_may_hold_ids() -> None:
    one = Continuation([4], {"past.key": KEYS})
    assert split(one) == ([one], False)
    assert split([one, "a text"]) == ([one, "a text"], True)
    assert takes_ids([one])
    assert not takes_ids([Continuation("a text", {"past.key": KEYS})])


def test_a_continuation_without_arrays_or_with_a_text_for_labels_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="past: no arrays: pass one for each cache input"):
        sequence_of(Continuation("a text", {}), None)
    with pytest.raises(TypeError, match="past_tokens must be a list of texts, not the text 'abc'"):
        sequence_of(Continuation("a text", {"past.key": KEYS}, "abc"), None)


def test_the_fake_server_takes_no_past_and_refuses_one_as_a_server_does(shared_server: FakeServer) -> None:
    with Client(shared_server.target) as client:
        assert client.model("fake").past is None
        with pytest.raises(InvalidRequest) as labelled:
            client.infer("fake", Continuation("a text", {"past.key": KEYS}, ["a", "b", "c"]))
        with pytest.raises(InvalidRequest) as plain:
            client.infer("fake", Continuation("a text", {"past.key": KEYS}))
    (first, third), (second,) = labelled.value.violations, plain.value.violations
    assert third == second
    assert (first.field, first.description) == (
        "sequences[0].past_tokens",
        "3 labels for a sequence without a past: leave them out",
    )
    assert (second.field, second.description) == (
        "sequences[0].text.tensors[0].name",
        "no input 'past.key'; the model takes input_ids",
    )
