"""Sequences for probes: their lengths, what is drawn for each kind of input, padding and cropping.

A probe is a run of a graph on drawn inputs; nothing is run here. More dynamic axes than there are lengths raise
BuildRefused.
"""

from __future__ import annotations

import numpy as np
import pytest
from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.inputs.signature import Signature
from attnserve_server.conversion.probing.feeds import Sampler, croppers, probe_lengths
from attnserve_server.model.manifest import DerivedLength, IndexRange, InputRole, InputSpec, OutputSpec


def sampler(*specs: InputSpec, **options: int) -> Sampler:
    symbols = dict.fromkeys(axis for spec in specs for axis in spec.shape if isinstance(axis, str))
    return Sampler(Signature(specs, tuple(symbols)), **options)


IDS = InputSpec(name="input_ids", dtype="int64", shape=("seq",), role=InputRole.TOKEN_IDS, padding=3)
FRAMES = InputSpec(name="frames", dtype="float32", shape=("time", 2), padding=-1)


def test_probe_lengths_are_distinct_primes_for_each_symbol() -> None:
    first, second = probe_lengths(["seq", "time", "image"])
    assert (first, second) == ({"seq": 5, "time": 7, "image": 11}, {"seq": 7, "time": 11, "image": 13})
    assert probe_lengths([]) == ({}, {})


def test_more_symbols_than_primes_are_refused() -> None:
    with pytest.raises(BuildRefused, match="the inputs have 10 dynamic axes; at most 9 are supported: fix the sizes"):
        probe_lengths([f"axis_{number}" for number in range(10)])


def test_a_sequence_depends_on_its_number_its_lengths_and_the_seed_alone() -> None:
    drawn = sampler(FRAMES).sequence({"time": 4}, 1)["frames"]
    assert drawn.shape == (4, 2)
    np.testing.assert_array_equal(drawn, sampler(FRAMES).sequence({"time": 4}, 1)["frames"])
    assert (drawn != sampler(FRAMES).sequence({"time": 4}, 2)["frames"]).all()
    assert (drawn != sampler(FRAMES, seed=1).sequence({"time": 4}, 1)["frames"]).all()


def test_token_ids_never_hold_the_padding_id() -> None:
    ids = sampler(IDS, vocabulary_size=5).sequence({"seq": 200})["input_ids"]
    assert set(ids.tolist()) == {0, 1, 2, 4}


def test_ids_of_an_unknown_vocabulary_are_0_and_1() -> None:
    assert set(sampler(IDS).sequence({"seq": 50})["input_ids"].tolist()) == {0, 1}


def test_an_input_with_a_fill_value_holds_it_and_positions_are_counted() -> None:
    types = InputSpec(name="token_type_ids", dtype="int64", shape=("seq",), fill=1)
    positions = InputSpec(name="position_ids", dtype="int64", shape=("seq",))
    sequence = sampler(types, positions).sequence({"seq": 4})
    assert {name: array.tolist() for name, array in sequence.items()} == {
        "token_type_ids": [1, 1, 1, 1],
        "position_ids": [0, 1, 2, 3],
    }


def test_an_added_mask_never_hides_the_first_key() -> None:
    mask = InputSpec(name="bias", dtype="float32", shape=("seq", "seq"), padding=-np.inf, additive_mask=True)
    drawn = sampler(mask).sequence({"seq": 40})["bias"]
    assert np.isfinite(drawn[:, 0]).all()
    assert 0 < np.isneginf(drawn).mean() < 0.3  # an eighth of the keys are hidden


def test_whole_numbers_of_unknown_meaning_keep_the_first_position_and_hide_the_last() -> None:
    drawn = sampler(InputSpec(name="flags", dtype="bool", shape=("seq",))).sequence({"seq": 30})["flags"]
    assert drawn.dtype == np.bool_
    assert (bool(drawn[0]), bool(drawn[-1])) == (True, False)


def test_indices_stay_within_their_ranges() -> None:
    boxes = InputSpec(
        name="boxes",
        dtype="int64",
        shape=("seq", 2),
        index_ranges=(IndexRange(least=0, greatest=9, column=0), IndexRange(least=5, greatest=6, column=1)),
    )
    drawn = sampler(boxes).sequence({"seq": 300})["boxes"]
    assert (drawn[:, 0].min(), drawn[:, 0].max()) == (0, 9)
    assert (drawn[:, 1].min(), drawn[:, 1].max()) == (5, 6)


def test_a_batch_is_padded_at_the_end_of_each_dynamic_axis() -> None:
    made = sampler(IDS, FRAMES, vocabulary_size=9)
    lengths = {"seq": 2, "time": 1}, {"seq": 1, "time": 3}
    sequences = [made.sequence(each, row) for row, each in enumerate(lengths)]
    batch = made.batch(sequences, {"seq": 2, "time": 3})
    assert batch["input_ids"].shape == (2, 2)
    assert batch["input_ids"][1].tolist() == [int(sequences[1]["input_ids"][0]), 3]
    np.testing.assert_array_equal(batch["frames"][0, 1:], -1)
    np.testing.assert_array_equal(batch["frames"][1], sequences[1]["frames"])


def test_rows_are_the_sequences_of_these_numbers() -> None:
    made = sampler(FRAMES)
    rows = made.rows({"time": 3}, 2, first=4)["frames"]
    np.testing.assert_array_equal(rows, [made.sequence({"time": 3}, number)["frames"] for number in (4, 5)])


def test_a_mixed_batch_rotates_the_lengths_from_axis_to_axis() -> None:
    batch, each = sampler(IDS, FRAMES).mixed((2, 3, 5))
    assert each == [{"seq": 2, "time": 3}, {"seq": 3, "time": 5}, {"seq": 5, "time": 2}]
    assert (batch["input_ids"].shape, batch["frames"].shape) == ((3, 5), (3, 5, 2))


def test_croppers_cut_outputs_and_weights_to_a_sequences_lengths() -> None:
    outputs = [OutputSpec(name="states", dtype="float32", shape=("seq", 2))]
    crops = croppers(
        outputs,
        {"site": ("seq", "half"), "patches": ("fixed_9", "seq")},
        {"seq": 4},
        {"half": DerivedLength(source="seq", stride=2, offset=0)},
    )
    assert set(crops) == {"states", "attention.site", "attention.patches"}
    assert crops["states"](np.zeros((6, 2))).shape == (4, 2)
    assert crops["attention.site"](np.zeros((3, 6, 3))).shape == (3, 4, 2)
    assert crops["attention.patches"](np.zeros((3, 9, 6))).shape == (3, 9, 4)
