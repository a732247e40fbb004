"""Collation: sequences are padded into the arrays of one run, and the run's arrays are cut back into answers.

The fixtures `manifest` and `sequence_of` are those of conftest.py. Sequences that must not share a run raise
ValueError, as does a site without the weights or scores that are selected. A site is a place in a model that computes
attention.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from attnserve_server.domain.values import AttentionValue, PreparedSequence
from attnserve_server.engine.collation import collate, invalid_tensor, outputs_of, weights_of
from attnserve_server.engine.warmup import synthetic
from attnserve_server.model.bands import SlidingBand
from attnserve_server.model.manifest import LOWEST_SCORE, AxisSpec, DerivedLength, InputSpec, Manifest, OutputSpec
from hypothesis import given
from hypothesis import strategies as st
from made_by_hand import proved


def test_inputs_are_padded_with_their_own_padding_values(manifest: Manifest, sequence_of) -> None:
    batch = collate([sequence_of([5, 6, 7]), sequence_of([8])], manifest)
    np.testing.assert_array_equal(batch.feeds["input_ids"], [[5, 6, 7], [8, 1, 1]])
    np.testing.assert_array_equal(batch.feeds["attention_mask"], [[1, 1, 1], [1, 0, 0]])
    assert batch.feeds["input_ids"].dtype == np.int64
    assert (batch.size, batch.useful_tokens, batch.computed_tokens) == (2, 4, 6)


def test_items_of_a_tap_are_the_sequences_that_select_its_site(manifest: Manifest, sequence_of) -> None:
    batch = collate([sequence_of([1]), sequence_of([2], [1]), sequence_of([3]), sequence_of([4], [1])], manifest)
    np.testing.assert_array_equal(batch.feeds["attention_items.site1"], [1, 3])
    assert batch.feeds["attention_items.site1"].dtype == np.int64
    assert batch.feeds["attention_items.site0"].shape == (0,)
    assert batch.fetches == ("embedding", "attention.site1")


def test_fetches_are_the_union_of_the_requested_outputs(manifest: Manifest, sequence_of) -> None:
    wants = [sequence_of([1], outputs=("embedding",)), sequence_of([2], outputs=("last_hidden_state", "embedding"))]
    assert collate(wants, manifest).fetches == ("embedding", "last_hidden_state")


def test_sequence_without_requested_outputs_fetches_nothing(manifest: Manifest, sequence_of) -> None:
    assert collate([sequence_of([1], [0], outputs=())], manifest).fetches == ("attention.site0",)


def test_unequal_lengths_along_an_unpadded_axis_raise_value_error(manifest: Manifest, sequence_of) -> None:
    rigid = manifest.model_copy(update={"axes": (AxisSpec(symbol="seq", max_length=128, paddable=False),)})
    with pytest.raises(ValueError, match="is not padded: lengths 1 and 2"):
        collate([sequence_of([1]), sequence_of([1, 2])], rigid)
    assert collate([sequence_of([3, 4]), sequence_of([1, 2])], rigid).size == 2


def test_tensor_of_another_rank_than_its_input_raises_value_error(manifest: Manifest, sequence_of) -> None:
    good = sequence_of([1, 2])
    bad = PreparedSequence({**good.tensors, "input_ids": np.ones((2, 2), np.int64)}, good.lengths, good.outputs)
    with pytest.raises(ValueError, match="input_ids"):
        collate([bad], manifest)


def test_unpadded_sequence_is_refused_in_a_batch_with_a_longer_one(manifest: Manifest, sequence_of) -> None:
    whole = replace(sequence_of([1]), unpadded=True)
    with pytest.raises(ValueError, match="a sequence must not be padded: lengths 1 and 2"):
        collate([whole, sequence_of([1, 2])], manifest)
    assert collate([whole, sequence_of([2])], manifest).unpadded
    assert not collate([sequence_of([1]), sequence_of([1, 2])], manifest).unpadded


def two_axes(*, paddable: bool = True) -> Manifest:
    """Inputs (T, 2), (S,), (T, S) and outputs that mirror them."""
    from_conftest = {"x": ("T", 2), "y": ("S",), "z": ("T", "S")}
    base = _BASE.model_copy(
        update={
            "axes": tuple(AxisSpec(symbol=symbol, max_length=64, paddable=paddable) for symbol in "TS"),
            "inputs": tuple(
                InputSpec(name=name, dtype="float32", shape=shape, padding=-7) for name, shape in from_conftest.items()
            ),
            "outputs": tuple(OutputSpec(name=n, dtype="float32", shape=shape) for n, shape in from_conftest.items()),
            "sites": (),
            "certificate": proved("T", "S"),
        }
    )
    return Manifest.model_validate(base.model_dump())


@pytest.fixture(autouse=True)
def _base(manifest: Manifest) -> None:
    global _BASE  # noqa: PLW0603 - hypothesis runs many examples on one manifest
    _BASE = manifest


_BASE: Manifest


@given(
    sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=8),
    wanted=st.lists(st.sets(st.sampled_from("xyz")), min_size=8, max_size=8),
)
def test_unpadding_undoes_collation(sizes: list[tuple[int, int]], wanted: list[set[str]]) -> None:
    manifest = two_axes()
    random = np.random.default_rng(0)
    sequences = []
    for (t, s), names in zip(sizes, wanted, strict=False):
        shapes = {"x": (t, 2), "y": (s,), "z": (t, s)}
        tensors = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
        sequences.append(PreparedSequence(tensors, {"T": t, "S": s}, tuple(sorted(names))))
    batch = collate(sequences, manifest)
    for row, sequence in enumerate(sequences):
        outputs = outputs_of(batch, batch.feeds, row, sequence, manifest)
        assert set(outputs) == set(sequence.outputs)
        for name, output in outputs.items():
            np.testing.assert_array_equal(output, sequence.tensors[name])
            assert output.flags.c_contiguous
    assert batch.computed_tokens == len(sizes) * sum(max(column) for column in zip(*sizes, strict=True))
    assert batch.useful_tokens == sum(map(sum, sizes))


def test_sequences_without_axes_are_one_position_each(manifest: Manifest) -> None:
    rows = InputSpec(name="row", dtype="float32", shape=(3,))
    table = manifest.model_copy(update={"axes": (), "inputs": (rows,), "outputs": (), "sites": (), "text": None})
    sequence = PreparedSequence({"row": np.zeros(3, np.float32)}, {}, ())
    batch = collate([sequence] * 4, table)
    assert (batch.useful_tokens, batch.computed_tokens) == (4, 4)


def test_answers_share_no_memory_with_the_batch_or_each_other(manifest: Manifest, sequence_of) -> None:
    pair = [sequence_of([1, 2], outputs=("last_hidden_state",)), sequence_of([3, 4], outputs=("last_hidden_state",))]
    batch = collate(pair, manifest)
    fetched = {"last_hidden_state": np.zeros((2, 2, 8), np.float32)}
    first, second = (outputs_of(batch, fetched, row, pair[row], manifest)["last_hidden_state"] for row in (0, 1))
    assert first.base is None
    first[:] = 1
    assert not fetched["last_hidden_state"].any()
    assert not second.any()


def test_answer_of_a_sequence_alone_is_a_view_of_the_runs_array(manifest: Manifest, sequence_of) -> None:
    alone = sequence_of([1, 2], outputs=("last_hidden_state",))
    fetched = {"last_hidden_state": np.zeros((1, 2, 8), np.float32)}
    taken = outputs_of(collate([alone], manifest), fetched, 0, alone, manifest)["last_hidden_state"]
    assert np.shares_memory(taken, fetched["last_hidden_state"])


def test_weights_are_cropped_to_a_sequences_own_lengths(manifest: Manifest, sequence_of) -> None:
    mixed = [sequence_of([1, 2, 3]), sequence_of([4], [0, 1]), sequence_of([5, 6], [1])]
    batch = collate(mixed, manifest)
    fetched = {
        "attention.site0": np.full((1, 2, 3, 3), 10.0, np.float32),
        "attention.site1": np.stack([np.full((2, 3, 3), row, np.float32) for row in (21, 22)]),
    }
    assert weights_of(batch, fetched, 0, mixed[0], manifest) == {}
    first = weights_of(batch, fetched, 1, mixed[1], manifest)
    assert {layer: (w.shape, float(w.flat[0])) for layer, w in first.items()} == {
        0: ((2, 1, 1), 10.0),
        1: ((2, 1, 1), 21.0),
    }
    second = weights_of(batch, fetched, 2, mixed[2], manifest)
    assert {layer: (w.shape, float(w.flat[0])) for layer, w in second.items()} == {1: ((2, 2, 2), 22.0)}


@pytest.mark.parametrize(("whole_rows", "columns"), [(True, 2), (False, 3)], ids=["all keys", "a band"])
def test_weights_of_a_band_keep_its_columns(manifest: Manifest, sequence_of, whole_rows: bool, columns: int) -> None:
    band = SlidingBand(before=2, after=0)
    windowed = manifest.sites[0].model_copy(update={"form": "windowed", "band": band, "whole_rows": whole_rows})
    banded = manifest.model_copy(update={"sites": (windowed, manifest.sites[1])})
    mixed = [sequence_of([1, 2, 3, 4, 5], [0]), sequence_of([6, 7], [0])]
    fetched = {"attention.site0": np.ones((2, 2, 5, 5 if whole_rows else 3), np.float32)}
    weights = weights_of(collate(mixed, banded), fetched, 1, mixed[1], banded)
    assert weights[0].shape == (2, 2, columns)


def test_axis_of_unknown_length_is_not_cropped(manifest: Manifest, sequence_of) -> None:
    axes = (*manifest.axes, AxisSpec(symbol="patch", max_length=9, paddable=False))
    outputs = (OutputSpec(name="patches", dtype="float32", shape=("patch",)),)
    derived = manifest.model_copy(update={"axes": axes, "outputs": outputs})
    asks = sequence_of([1, 2], outputs=("patches",))
    batch = collate([asks], derived)
    assert outputs_of(batch, {"patches": np.ones((1, 5), np.float32)}, 0, asks, derived)["patches"].shape == (5,)


def test_site_without_a_tap_has_no_items_and_no_weights(manifest: Manifest, sequence_of) -> None:
    blind = manifest.sites[0].model_copy(
        update={"items_input": None, "weights_output": None, "unavailable_reason": "unknown form"}
    )
    partly = manifest.model_copy(update={"sites": (blind, manifest.sites[1])})
    asks = sequence_of([1], [0])
    batch = collate([asks], partly)
    assert "attention_items.site0" not in batch.feeds
    with pytest.raises(ValueError, match="no tap"):
        weights_of(batch, {}, 0, asks, partly)


def test_derived_axis_is_cropped_to_the_length_derived_from_the_sequence(manifest: Manifest, sequence_of) -> None:
    form = DerivedLength(source="seq", stride=2, offset=1)
    pooled = manifest.sites[0].model_copy(update={"key_axis": "pooled"})
    derived = manifest.model_copy(
        update={
            "axes": (*manifest.axes, AxisSpec(symbol="pooled", max_length=16, paddable=True, derived=form)),
            "outputs": (OutputSpec(name="halves", dtype="float32", shape=("pooled", 4)),),
            "sites": (pooled, manifest.sites[1]),
        }
    )
    mixed = [sequence_of([1] * length, [0], outputs=("halves",)) for length in (7, 3)]
    batch = collate(mixed, derived)
    assert (batch.useful_tokens, batch.computed_tokens) == (10, 14), "pooled positions do not count as tokens"
    fetched = {"attention.site0": np.ones((2, 2, 7, 4), np.float32), "halves": np.ones((2, 4, 4), np.float32)}
    for row, (one, keys) in enumerate(zip(mixed, (4, 2), strict=True)):
        assert weights_of(batch, fetched, row, one, derived)[0].shape == (2, one.lengths["seq"], keys)
        assert outputs_of(batch, fetched, row, one, derived)["halves"].shape == (keys, 4)


def test_warm_up_sequences_have_no_length_for_a_derived_axis(manifest: Manifest) -> None:
    form = DerivedLength(source="seq", stride=2, offset=1)
    pooled = AxisSpec(symbol="pooled", max_length=16, paddable=True, derived=form)
    derived = manifest.model_copy(update={"axes": (*manifest.axes, pooled)})
    assert synthetic(derived, 8).lengths == {"seq": 8}


def scored(manifest: Manifest) -> Manifest:
    """The manifest, whose first site gives scores too."""
    site = manifest.sites[0].model_copy(update={"scores_output": "attention_scores.site0"})
    return manifest.model_copy(update={"sites": (site, *manifest.sites[1:])})


def selecting_scores(sequence: PreparedSequence) -> PreparedSequence:
    assert sequence.attention is not None
    return replace(sequence, attention=replace(sequence.attention, values=AttentionValue.SCORES))


def test_weights_and_scores_of_one_site_share_its_tap(manifest: Manifest, sequence_of) -> None:
    both = [sequence_of([1], [0], outputs=()), selecting_scores(sequence_of([2, 3], [0], outputs=()))]
    batch = collate(both, scored(manifest))
    np.testing.assert_array_equal(batch.feeds["attention_items.site0"], [0, 1])
    assert batch.fetches == ("attention.site0", "attention_scores.site0")
    assert collate(both[:1], scored(manifest)).fetches == ("attention.site0",)
    raw = np.arange(16, dtype=np.float32).reshape(2, 2, 2, 2)
    raw[1, 0, 0, 1] = LOWEST_SCORE
    fetched = {"attention.site0": np.zeros_like(raw), "attention_scores.site0": raw}
    scores = weights_of(batch, fetched, 1, both[1], scored(manifest))[0]
    np.testing.assert_array_equal(scores, np.where(raw[1] < 0, -np.inf, raw[1]))
    assert raw[1, 0, 0, 1] < -1e38, "the run's arrays are not changed"


@pytest.mark.parametrize(
    ("value", "valid_score"), [(1.0, True), (-np.inf, True), (np.inf, False), (np.nan, False)], ids=str
)
def test_minus_infinity_is_valid_as_a_score_alone(manifest: Manifest, value: float, valid_score: bool) -> None:
    values = {0: np.array([[[0.5, value]]], np.float32)}
    assert (invalid_tensor({}, values, manifest, scores=True) is None) == valid_score
    assert (invalid_tensor({}, values, manifest) is None) == (value == 1.0)


def test_a_site_of_an_earlier_release_has_no_tap_for_scores(manifest: Manifest, sequence_of) -> None:
    sequence = selecting_scores(sequence_of([1], [0], outputs=()))
    with pytest.raises(ValueError, match="no tap for scores"):
        weights_of(collate([sequence], manifest), {}, 0, sequence, manifest)
