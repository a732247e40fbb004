"""Selections of attention: their encoding, and the field that an invalid one names.

A selection states which attention weights a request returns, and in which form. A value that is not allowed raises
InvalidRequest, and one of another type TypeError. Nothing is sent.
"""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
from attnserve_client import AttentionSelection, InvalidRequest, LabelSelection
from attnserve_client._labels import selection_of as labels_selection_of
from attnserve_client._selection import HeadReduction, LayerReduction, SpecialTokens, Unit, WeightDtype, selection_of
from hypothesis import given
from hypothesis import strategies as st

INTEGERS = st.lists(st.integers(-(2**31), 2**31 - 1), max_size=4).map(tuple)
SELECTIONS = st.builds(
    AttentionSelection,
    sites=st.lists(st.text(max_size=5), max_size=3),
    layers=INTEGERS,
    heads=INTEGERS,
    head_reduction=st.none() | st.sampled_from(get_args(HeadReduction)),
    layer_reduction=st.none() | st.sampled_from(get_args(LayerReduction)),
    queries=INTEGERS,
    unit=st.none() | st.sampled_from(get_args(Unit)),
    special_tokens=st.none() | st.sampled_from(get_args(SpecialTokens)),
    top_k=st.integers(0, 2**32 - 1),
    min_weight=st.floats(0, 1, width=32),
    dtype=st.none() | st.sampled_from(get_args(WeightDtype)),
)


@given(selection=SELECTIONS)
def test_selection_round_trips_through_the_wire(selection: AttentionSelection) -> None:
    assert AttentionSelection.from_wire(selection.to_wire()) == selection


@pytest.mark.parametrize("word", ["each", "mean", "max"])
def test_heads_may_be_a_reduction_over_all_heads(word: Any) -> None:
    assert AttentionSelection(heads=word) == AttentionSelection(head_reduction=word)
    assert AttentionSelection(heads=word, head_reduction=word).heads == ()


def test_listed_heads_may_be_joined() -> None:
    message = AttentionSelection(heads=[0, -1], head_reduction="mean", sites="encoder").to_wire()
    assert list(message.heads) == [0, -1]
    assert list(message.sites) == ["encoder"]


@pytest.mark.parametrize(
    ("selection", "field"),
    [
        (lambda: AttentionSelection(heads="mean", head_reduction="max"), "attention.head_reduction"),
        (lambda: AttentionSelection(heads="median"), "attention.heads"),  # type: ignore[arg-type]
        (lambda: AttentionSelection(unit="letter").to_wire(), "attention.unit"),  # type: ignore[arg-type]
        (lambda: AttentionSelection(dtype="int8").to_wire(), "attention.dtype"),  # type: ignore[arg-type]
        (lambda: AttentionSelection(layer_reduction="sum").to_wire(), "attention.layer_reduction"),  # type: ignore[arg-type]
        (lambda: AttentionSelection(special_tokens="hide").to_wire(), "attention.special_tokens"),  # type: ignore[arg-type]
        (lambda: AttentionSelection(layers=[0, 2**31]).to_wire(), "attention.layers[1]"),
        (lambda: AttentionSelection(top_k=-1).to_wire(), "attention.top_k"),
    ],
    ids=["two heads", "heads", "unit", "dtype", "layers", "special", "layer number", "top_k"],
)
def test_invalid_selection_lists_its_field(selection: Any, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        selection()
    assert caught.value.violations[0].field == field


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (AttentionSelection(layers=[0, 1.5]), r"attention\.layers\[1\] is 1\.5; it must be an integer"),  # type: ignore[list-item]
        (AttentionSelection(top_k="3"), r"attention\.top_k is '3'; it must be an integer"),  # type: ignore[arg-type]
    ],
    ids=["layer", "top_k"],
)
def test_index_of_another_type_is_a_type_error_with_its_field(selection: AttentionSelection, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        selection.to_wire()


def test_unknown_choice_of_a_newer_server_is_none() -> None:
    message = AttentionSelection(layers=[1], unit="word").to_wire()
    message.unit = 99  # type: ignore[assignment]
    assert AttentionSelection.from_wire(message) == AttentionSelection(layers=[1])


@pytest.mark.parametrize("field", ["layers", "heads", "queries"])
def test_one_number_is_a_list_of_one(field: str) -> None:
    for one in (-1, np.int64(-1)):
        message = AttentionSelection(**{field: one}).to_wire()
        assert list(getattr(message, field)) == [-1]
    with pytest.raises(TypeError, match=rf"^attention.{field} is 1.5; it must be a list, or one of its members$"):
        AttentionSelection(**{field: 1.5})  # type: ignore[arg-type] # that is the test


def test_one_name_is_a_list_of_one() -> None:
    assert AttentionSelection(sites="encoder.0", features="entropy").sites == ("encoder.0",)


def test_a_dict_of_fields_is_a_selection() -> None:
    given = {"layers": -1, "heads": "mean", "top_k": 3}
    assert selection_of(given) == selection_of(AttentionSelection(layers=[-1], heads="mean", top_k=3))
    assert labels_selection_of({"top_k": 3}) == labels_selection_of(LabelSelection(top_k=3))
    with pytest.raises(InvalidRequest, match="selection has no such field: use sites, layers") as caught:
        selection_of({"layer": -1})
    assert [each.field for each in caught.value.violations] == ["attention.layer"]
    with pytest.raises(InvalidRequest, match="selection has no such field: use top_k"):
        labels_selection_of({"top": 3})


def test_attention_is_a_selection_or_a_bool() -> None:
    assert selection_of(None) is None
    assert selection_of(False) is None
    assert selection_of(True) is not None
    with pytest.raises(TypeError, match="AttentionSelection, a dict of its fields, a bool or None"):
        selection_of("all")  # type: ignore[arg-type]
