"""Noise: rounding among batch shapes, never a dependency on the batch."""

from __future__ import annotations

from pathlib import Path

import batch_graphs as graphs
import numpy as np
import pytest
from attacked import attacked, broken, target_of
from attnserve_server.conversion.inputs.signature import signature_of
from attnserve_server.conversion.probing.feeds import Sampler
from attnserve_server.conversion.proof.noise import is_rounding, noise_of, shaken
from attnserve_server.model.equality import Equality


def test_a_dependency_on_the_number_of_rows_is_not_noise(tmp_path: Path) -> None:
    assert noise_of(target_of(graphs.scaled_by_rows(), tmp_path), "fp32") == {}


def test_small_differences_among_batch_shapes_are_noise(tmp_path: Path) -> None:
    """A scale of 1 + 0.00001 for each row represents rounding: 8 rows differ from one by 7 of these."""
    noise = noise_of(target_of(graphs.barely_scaled_by_rows(), tmp_path), "fp32")
    assert noise["y"] == pytest.approx(7e-5, rel=0.02)


def test_noise_is_bounded_by_a_few_floors(tmp_path: Path) -> None:
    proto = graphs.barely_scaled_by_rows(3e-4)
    assert noise_of(target_of(proto, tmp_path), "fp32") == {}
    assert broken(attacked(proto, tmp_path)) == {"batch"}


def test_dynamic_quantization_among_copies_has_no_noise(tmp_path: Path) -> None:
    noise = noise_of(target_of(graphs.dynamically_quantized(), tmp_path), "int8")
    assert noise.get("y", 0.0) < 1e-6


def test_a_graph_of_one_row_has_no_noise(tmp_path: Path) -> None:
    assert noise_of(target_of(graphs.pointwise(), tmp_path, most=1), "fp32") == {}


def test_shaking_changes_only_the_last_bits_of_floats() -> None:
    sampler = Sampler(signature_of(graphs.masked_mean().graph))
    sequence = sampler.sequence({"t": 5})
    changed = shaken(sampler, sequence, 0)
    assert changed is not None
    assert np.array_equal(changed["attention_mask"], sequence["attention_mask"])
    assert not np.array_equal(changed["x"], sequence["x"])
    np.testing.assert_allclose(changed["x"], sequence["x"], rtol=3e-7)


def test_sequences_of_ids_cannot_be_shaken() -> None:
    sampler = Sampler(signature_of(graphs.unmasked_text().graph))
    assert shaken(sampler, sampler.sequence({"t": 5}), 0) is None


def test_difference_is_rounding_only_where_last_bits_move_the_answer_as_much() -> None:
    reference = {"y": np.array([1.0, 2.0])}
    found, moved = {"y": np.array([1.0, 2.1])}, {"y": np.array([1.01, 2.0])}
    still = {"y": np.array([1.0, 2.00001])}
    assert is_rounding(found, reference, Equality("fp32"), shaken=[moved], usual={})
    assert not is_rounding(found, reference, Equality("fp32"), shaken=[still], usual={})
    assert not is_rounding(found, reference, Equality("fp32"), shaken=[], usual={"y": 2.0})
    assert not is_rounding({"y": np.array([1.0, np.nan])}, reference, Equality("fp32"), shaken=[moved], usual={})


def test_a_remainder_of_far_larger_values_is_rounding() -> None:
    reference, found = {"y": np.array([0.0, 1e-7])}, {"y": np.array([1e-7, 0.0])}
    assert is_rounding(found, reference, Equality("fp32"), shaken=[], usual={"y": 1.0})
    assert not is_rounding(found, reference, Equality("fp32"), shaken=[], usual={"y": 1e-3})
