"""Bands in closed form, fitted to tables of keys.

A table has the key of each column for each query of a windowed site; -1 is no key. A band states the same for every
length, such as two keys before each query. `fitted` returns None where no band gives the tables. A site is a place in a
graph that computes attention.
"""

from __future__ import annotations

import numpy as np
import pytest
from attnserve_server.attention.bands import band_keys
from attnserve_server.conversion.learning.bands import KeyTable, fitted
from attnserve_server.model.bands import BandSpec, BlockBand, GridBand, SlidingBand, TableBand


def tables(spec: BandSpec, *lengths: int, block: int = 1) -> list[KeyTable]:
    return [KeyTable(band_keys(spec, length, length).astype(np.int64), length, block) for length in lengths]


@pytest.mark.parametrize(
    "spec",
    [
        SlidingBand(before=3, after=3),
        SlidingBand(before=4, after=0),
        SlidingBand(before=2, after=2, dilation=3),
        SlidingBand(before=3, after=2, global_keys=2),
    ],
)
def test_a_sliding_band_is_fitted_to_its_table(spec: SlidingBand) -> None:
    assert fitted(tables(spec, 5, 7, 29), fixed=False) == spec


@pytest.mark.parametrize(
    "spec", [BlockBand(block=4, before=1, after=1), BlockBand(block=4, before=1, after=0, global_keys=1)]
)
def test_a_band_of_blocks_is_fitted_to_its_table(spec: BlockBand) -> None:
    assert fitted(tables(spec, 5, 7, 29, block=4), fixed=False) == spec


@pytest.mark.parametrize("shift", [0, 1])
def test_shifted_windows_over_a_grid_are_fitted_to_their_table(shift: int) -> None:
    spec = GridBand(rows=4, columns=6, window=2, shift=shift)
    assert fitted(tables(spec, 24, block=4), fixed=True) == spec


def test_keys_without_a_closed_form_keep_their_table_where_lengths_are_fixed() -> None:
    keys = np.array([[0, 5], [3, 1], [0, 5], [2, -1], [3, 1], [4, 0]])
    spec = fitted([KeyTable(keys, 6)], fixed=True)
    assert isinstance(spec, TableBand)
    np.testing.assert_array_equal(band_keys(spec, 6, 6), keys)
    assert fitted([KeyTable(keys, 6)], fixed=False) is None


def test_a_table_that_is_too_large_for_a_manifest_is_not_kept() -> None:
    random = np.random.default_rng(0)
    keys = np.stack([random.permutation(600)[:300] for _ in range(600)])
    assert fitted([KeyTable(keys, 600)], fixed=True) is None


def test_a_key_that_a_row_names_twice_belongs_to_its_first_column() -> None:
    spec = SlidingBand(before=1, after=1, global_keys=1)
    given = tables(spec, 7, 11)
    for each in given:
        each.keys[0, 2] = 0  # the graph gathers the global key for the local columns too, and masks it there
        each.keys[1, 1] = 0
    assert fitted(given, fixed=False) == spec


def test_one_band_must_give_the_tables_of_all_lengths() -> None:
    sliding, other = tables(SlidingBand(before=2, after=2), 7), tables(SlidingBand(before=1, after=3), 11)
    assert fitted([*sliding, *other], fixed=False) is None
