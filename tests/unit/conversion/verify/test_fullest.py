"""The sequences on which limits are tried: as many positions count as in any request.

`drawn` returns the sequences of four positions for the inputs given. Nothing is run.
"""

from __future__ import annotations

import numpy as np
import pytest
from attnserve_server.conversion.inputs.signature import Signature
from attnserve_server.conversion.probing.feeds import Sampler
from attnserve_server.conversion.verify.limits import fullest
from attnserve_server.model.manifest import InputRole, InputSpec

IDS = InputSpec(name="input_ids", dtype="int64", shape=("seq",), role=InputRole.TOKEN_IDS, vocabulary_size=100)
MASK = InputSpec(name="attention_mask", dtype="int64", shape=("seq",), role=InputRole.ATTENTION_MASK, fill=1)
FLAGS = InputSpec(name="flags", dtype="int64", shape=("seq",))
FRAMES = InputSpec(name="frames", dtype="float32", shape=("seq", 2))


def drawn(*specs: InputSpec, padding_known: bool = False) -> list[dict[str, list[float]]]:
    sequences = fullest(Sampler(Signature(specs, ("seq",))), {"seq": 4}, padding_known=padding_known)
    return [{name: array.tolist() for name, array in sequence.items()} for sequence in sequences]


def test_ids_repeat_one_id_in_each_sequence_and_another_in_the_next() -> None:
    first, second = (sequence["input_ids"] for sequence in drawn(IDS))
    assert {len(set(first)), len(set(second))} == {1}
    # At most one of the two can be the padding id of the model, which is unknown.
    assert first[0] != second[0]


@pytest.mark.parametrize("padding", [0, 33, 49, 50, 99])
def test_a_known_padding_id_needs_one_sequence_without_it(padding: int) -> None:
    (sequence,) = drawn(IDS.model_copy(update={"padding": padding}), padding_known=True)
    assert len(set(sequence["input_ids"])) == 1
    assert sequence["input_ids"][0] != padding


def test_masks_are_full() -> None:
    assert [sequence["attention_mask"] for sequence in drawn(IDS, MASK)] == [[1] * 4] * 2


def test_whole_numbers_of_unknown_meaning_are_all_one_and_all_zero() -> None:
    assert [sequence["flags"] for sequence in drawn(FLAGS)] == [[1] * 4, [0] * 4]
    assert len(drawn(IDS, FLAGS)) == 4


def test_floats_are_drawn_at_random() -> None:
    (sequence,) = drawn(FRAMES)
    assert len(np.unique(sequence["frames"])) == 8
