"""The footprint: the bytes of a sequence's tensors in a run, by the axes along which they grow.

`(0,)` is for each position of the first axis, `(0, 0)` for each pair of positions, and `()` for the sequence. The
fixtures `manifest` and `sequence_of` are those of conftest.py. Nothing runs.
"""

from __future__ import annotations

import pytest
from attnserve_server.engine.cost import Footprint
from attnserve_server.model.manifest import AxisSpec, DerivedLength, Manifest, OutputSpec


def test_inputs_and_outputs_count_for_each_position(manifest: Manifest, sequence_of) -> None:
    # two int64 inputs along seq, float32 (seq, 8) and (8,)
    assert Footprint(manifest).of(sequence_of([1])) == {(0,): 8 + 8 + 8 * 4, (): 8 * 4}


def test_maps_count_for_each_pair_of_positions_with_scratch_for_one_site(manifest: Manifest, sequence_of) -> None:
    footprint = Footprint(manifest)
    plain = footprint.of(sequence_of([1]))
    heads = 2
    assert footprint.of(sequence_of([1], [0])) == {**plain, (0, 0): heads * 4 * (1 + 2)}
    assert footprint.of(sequence_of([1], [0, 1])) == {**plain, (0, 0): heads * 4 * (2 + 2)}
    assert footprint.of(sequence_of([5], [0])) is footprint.of(sequence_of([6], [0])), "worked out once"


def test_number_of_remembered_selections_is_bounded(manifest: Manifest, sequence_of) -> None:
    footprint = Footprint(manifest)
    footprint._by_layers.update({(0, 0, at): {} for at in range(2000)})
    footprint.of(sequence_of([1], [1]))
    assert (1,) not in footprint._by_layers


def test_axis_of_no_input_counts_at_its_maximum_length(manifest: Manifest, sequence_of) -> None:
    derived = manifest.model_copy(
        update={
            "axes": (*manifest.axes, AxisSpec(symbol="patch", max_length=9, paddable=False)),
            "outputs": (OutputSpec(name="patches", dtype="float32", shape=("patch", "seq")),),
        }
    )
    assert Footprint(derived).of(sequence_of([1])) == {(0,): 8 + 8 + 9 * 4}


@pytest.mark.parametrize("offset", [0, 3, -3])
def test_derived_axis_counts_for_a_share_of_its_source(manifest: Manifest, sequence_of, offset: int) -> None:
    form = DerivedLength(source="seq", stride=4, offset=offset)
    derived = manifest.model_copy(
        update={
            "axes": (*manifest.axes, AxisSpec(symbol="pooled", max_length=9, paddable=True, derived=form)),
            "outputs": (OutputSpec(name="pairs", dtype="float32", shape=("pooled", "pooled", 48)),),
        }
    )
    terms = Footprint(derived).of(sequence_of([1]))
    for length in range(4, 33):
        counted = sum(size * length ** len(axes) for axes, size in terms.items())
        exact = (8 + 8) * length + 4 * 48 * form.of(length) ** 2
        smooth = (8 + 8) * length + 4 * 48 * ((length + max(offset, 0)) / 4) ** 2
        assert exact <= counted == smooth
