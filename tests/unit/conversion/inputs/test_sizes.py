"""Fixed sizes and bounds of axes, by name.

`with_sizes` fixes axes of a graph, and `bounds_of` limits the length of the others. Both raise BuildRefused for an
unknown axis; `bounds_of` also does for one that follows from others, and `with_sizes` where a size is not whole.
"""

from __future__ import annotations

import pytest
from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.inputs.signature import signature_of
from attnserve_server.conversion.inputs.sizes import FRAMES, TOKENS, bounds_of, with_sizes
from batch_graphs import graph
from open_axes_graphs import cross_decoder, image_encoder, with_memory


def test_a_fixed_axis_has_its_size_in_every_input_and_behind_the_nodes() -> None:
    model = image_encoder()
    fixed = with_sizes(model, signature_of(model.graph), {"num_channels": 3, "height": 8, "width": 12}, "vit.onnx")
    assert [axis.dim_value for axis in fixed.graph.input[0].type.tensor_type.shape.dim] == [0, 3, 8, 12]
    cut = next(value for value in fixed.graph.value_info if value.name == "cut")
    assert [axis.dim_value for axis in cut.type.tensor_type.shape.dim][1:] == [8, 2, 3]
    assert signature_of(fixed.graph).symbols == ()


def test_fixing_a_part_keeps_the_relation_of_the_rest() -> None:
    model = with_memory()
    fixed = with_sizes(model, signature_of(model.graph), {"memory_length": 3}, "memory.onnx")
    signature = signature_of(fixed.graph)
    assert [spec.shape[0] for spec in signature.inputs] == [3, "length", "3 + length"]
    assert signature.lengths({"length": 5})["3 + length"] == 8


def test_an_exact_quotient_of_a_fixed_axis_must_be_whole() -> None:
    model = graph('g (float[b, h, 4] x, float[b, "h/3", 4] z) => (float[b, n, 4] y) { y = Concat<axis=1>(x, z) }')
    signature = signature_of(graph("g (float[b, h, 4] x) => (float[b, h, 4] y) { y = Relu(x) }").graph)
    with pytest.raises(BuildRefused, match=r"the axis 'h/3' has no size: 8 / 3 is not a whole number"):
        with_sizes(model, signature, {"h": 8}, "x.onnx")


def test_an_unknown_axis_is_refused_with_those_that_exist() -> None:
    model = image_encoder()
    with pytest.raises(BuildRefused, match=r"no axis 'depth' to fix; .* are: num_channels, height, width"):
        with_sizes(model, signature_of(model.graph), {"depth": 3}, "vit.onnx")


def test_axes_of_tokens_and_of_floats_have_separate_bounds() -> None:
    signature = signature_of(cross_decoder().graph)
    tokens, frames = "decoder_sequence_length", "encoder_sequence_length / 2"
    assert {symbol: bound.length for symbol, bound in bounds_of(signature, None, {}).items()} == {
        tokens: TOKENS,
        frames: FRAMES,
    }
    limited = bounds_of(signature, 64, {frames: 1500})
    assert (limited[tokens].length, limited[tokens].reason) == (64, "--max-length")
    assert (limited[frames].length, limited[frames].reason) == (1500, "--max-length AXIS=N")


def test_one_length_bounds_every_axis_of_a_graph_without_tokens() -> None:
    bounds = bounds_of(signature_of(with_memory().graph), 64, {})
    assert {bound.length for bound in bounds.values()} == {64}


@pytest.mark.parametrize(
    ("symbol", "why"),
    [
        ("memory_length + length", "it follows from others: memory_length"),
        ("frames", "there is no such axis"),
    ],
)
def test_a_bound_of_an_axis_that_is_not_free_is_refused(symbol: str, why: str) -> None:
    with pytest.raises(BuildRefused, match=why):
        bounds_of(signature_of(with_memory().graph), None, {symbol: 9})
