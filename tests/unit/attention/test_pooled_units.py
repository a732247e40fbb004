"""Units of derived axes: texts and spans of pooled positions.

The length of a derived axis follows from another axis, as (T + offset) // stride. `halved` makes one of stride 2. Where
the positions behind a window are not known, units have no texts.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from attnserve_server.attention.units import merge_words, pooled_units
from attnserve_server.domain.values import AxisUnits
from attnserve_server.model.manifest import DerivedLength

TOKENS = AxisUnits(
    axis="seq",
    length=7,
    texts=("[CLS]", "the", "cat", "[SEP]", "a", "mat", "[SEP]"),
    starts=(0, 0, 4, 0, 0, 2, 0),
    ends=(0, 3, 7, 0, 1, 5, 0),
    special=(True, False, False, True, False, False, True),
    segments=(0, 0, 0, 0, 1, 1, 1),
    word_ids=(-1, 0, 1, -1, 2, 3, -1),
    words=("the", "cat", "a", "mat"),
    word_spans=((0, 0, 3), (0, 4, 7), (1, 0, 1), (1, 2, 5)),
)


def halved(offset: int) -> DerivedLength:
    return DerivedLength(source="seq", stride=2, offset=offset)


@pytest.mark.parametrize(
    ("form", "kernel", "padding"),
    [
        (DerivedLength(source="seq", stride=stride, offset=2 * p - k + stride), k, p)
        for stride in (1, 2, 3, 5)
        for k in (1, 3, 4)
        for p in (0, 1, 2)
    ],
)
def test_form_counts_the_windows_of_a_convolution(form: DerivedLength, kernel: int, padding: int) -> None:
    for length in range(kernel, 40):
        windows = range(0, length + 2 * padding - kernel + 1, form.stride)
        assert form.of(length) == len(windows)


def test_sequence_shorter_than_a_window_has_length_zero() -> None:
    assert DerivedLength(source="seq", stride=4, offset=-3).of(2) == 0


def test_pooled_position_spans_its_members_from_the_first_to_the_last() -> None:
    units = pooled_units("seq_by_2", TOKENS, halved(1))
    assert units == AxisUnits(
        axis="seq_by_2",
        length=4,
        texts=("[CLS] the", "cat [SEP]", "a mat", "[SEP]"),
        starts=(0, 4, 0, 0),
        ends=(3, 7, 5, 0),
        special=(False, False, False, True),
        segments=(0, 0, 1, 1),
        word_ids=(-1, -1, -1, -1),
    )
    assert merge_words(units)[0] == replace(units, word_ids=()), "words are parted by pooling: each stays by itself"


def test_partial_last_window_has_no_position() -> None:
    units = pooled_units("seq_by_2", TOKENS, halved(0))
    assert units.texts == ("[CLS] the", "cat [SEP]", "a mat")


def test_position_over_two_texts_has_its_span_in_the_first() -> None:
    units = pooled_units("seq_by_7", TOKENS, DerivedLength(source="seq", stride=7))
    assert (units.texts, units.starts, units.ends, units.segments) == (
        ("[CLS] the cat [SEP] a mat [SEP]",),
        (0,),
        (7,),
        (0,),
    )


def test_windows_that_start_elsewhere_have_no_texts() -> None:
    for form in (DerivedLength(source="seq", stride=1, offset=1), halved(-1), halved(2)):
        assert pooled_units("other", TOKENS, form) == AxisUnits(axis="other", length=form.of(7))


def test_pooled_positions_without_texts_have_none() -> None:
    frames = AxisUnits(axis="frames", length=9)
    form = DerivedLength(source="frames", stride=2, offset=1)
    assert pooled_units("half", frames, form) == AxisUnits(axis="half", length=5)


def test_every_list_has_one_entry_per_position() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        length = int(rng.integers(1, 30))
        texts = tuple(str(at) for at in range(length))
        source = AxisUnits("seq", length, texts, tuple(range(length)), tuple(range(1, length + 1)))
        stride = int(rng.integers(1, 8))
        units = pooled_units("pooled", source, DerivedLength(source="seq", stride=stride, offset=stride - 1))
        assert " ".join(units.texts).split() == list(texts)
        assert (units.starts[0], units.ends[-1]) == (0, length)
        assert units.starts[1:] == units.ends[:-1]
