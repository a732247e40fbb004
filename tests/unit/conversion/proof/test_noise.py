"""Noise: rounding among batch shapes, never a dependency on the batch.

`noise_of` runs a graph on copies of one sequence, and returns the difference from the sequence alone for each output; a
larger difference than rounding explains is left out. `target_of` opens a graph for that.
"""

from __future__ import annotations

from pathlib import Path

import batch_graphs as graphs
import numpy as np
import onnx
import onnx.numpy_helper
import onnx.parser
import pytest
from attacked import attacked, broken, target_of
from attnserve_server.conversion.inputs.signature import signature_of
from attnserve_server.conversion.probing.feeds import Sampler
from attnserve_server.conversion.proof.noise import is_rounding, noise_of, shaken, with_other_last_bits
from attnserve_server.conversion.verify.stability import other_last_bits
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


def amplified(bits: float) -> onnx.ModelProto:
    """A constant quantizer behind a sine of large numbers: a last bit of the gain moves its argument by `bits`."""
    return onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["": 17]> amplified (float[b, t, 4] x) => (float[b, t, 4] y)
        <float[4] gain = {{{", ".join([str(bits * 2**23)] * 4)}}}, float s = {{0.01}}, int8 z = {{0}}> {{
            large = Mul(x, gain) u = Sin(large) q = QuantizeLinear(u, s, z) y = DequantizeLinear(q, s, z)
        }}"""
    )


@pytest.mark.parametrize(("bits", "least", "most"), [(0.01, 0.02, 0.1), (1.0, 0.0, 0.0)])
def test_answers_that_last_bits_move_by_steps_have_that_noise_up_to_a_bound(
    bits: float, least: float, most: float, tmp_path: Path
) -> None:
    proto = onnx.shape_inference.infer_shapes(amplified(bits))
    target = target_of(proto, tmp_path)
    # One sequence in any batch gives the same numbers here, so that copies show no noise.
    assert noise_of(target, "int8") == {}
    with other_last_bits(proto) as moved:
        assert moved is not None
        assert least <= noise_of(target, "int8", moved).get("y", 0.0) <= most


def test_graph_without_constant_quantizers_is_not_moved() -> None:
    with other_last_bits(graphs.dynamically_quantized()) as moved:
        assert moved is None


def test_last_bits_of_single_numbers_and_integers_stay() -> None:
    proto = amplified(1.0)
    changed = with_other_last_bits(proto)
    before, after = (
        {t.name: onnx.numpy_helper.to_array(t) for t in each.graph.initializer} for each in (proto, changed)
    )
    assert (before["s"], before["z"]) == (after["s"], after["z"])
    assert not np.array_equal(before["gain"], after["gain"])
    np.testing.assert_allclose(before["gain"], after["gain"], rtol=1.5e-7)
