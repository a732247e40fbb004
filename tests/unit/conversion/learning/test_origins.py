"""Axes of one length are told apart by what their positions come from, and patches by the image they are cut from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from attnserve_server.conversion.prepare import PrepareRequest, prepare_bundle
from attnserve_server.model.manifest import Manifest
from foreign_graphs import Foreign
from onnx import helper, numpy_helper
from onnx_files import saved
from two_sided_graphs import encoder_decoder, words_over_patches


def prepared(model: onnx.ModelProto, folder: Path) -> Manifest:
    file = saved(model, folder / "two.onnx")
    return prepare_bundle(PrepareRequest(file=file, name="two", repository=folder / "models")).manifest


def kinds(manifest: Manifest) -> list[tuple[str, str, str]]:
    return [(site.kind, site.query_axis, site.key_axis) for site in manifest.sites]


def test_encoder_decoder_has_two_axes_each_with_its_own_ids(tmp_path: Path) -> None:
    manifest = prepared(encoder_decoder(50, 30), tmp_path)
    assert kinds(manifest) == [("self", "source_seq", "source_seq"), ("cross", "seq", "source_seq")]
    assert [manifest.vocabulary_of(manifest.input(name)) for name in ("input_ids", "decoder_input_ids")] == [50, 30]
    assert {axis.symbol: axis.paddable for axis in manifest.axes} == {"source_seq": True, "seq": True}


@pytest.mark.parametrize("leading", [0, 1, 3])
def test_patches_of_an_image_have_their_grid_and_what_leads_them(leading: int, tmp_path: Path) -> None:
    manifest = prepared(words_over_patches(50, leading=leading), tmp_path)
    patches = f"fixed_{6 + leading}"
    assert kinds(manifest) == [("self", patches, patches), ("self", "seq", "seq"), ("cross", "seq", patches)]
    assert (manifest.axis(patches).grid, manifest.axis(patches).leading) == ((2, 3), leading)


@pytest.mark.parametrize("layers", [1, 2])
def test_words_and_patches_of_one_number_are_two_axes(layers: int, tmp_path: Path) -> None:
    manifest = prepared(words_over_patches(50, 6, layers=layers), tmp_path)
    own, crossing = ("self", "fixed_6_", "fixed_6_"), ("cross", "fixed_6_", "fixed_6")
    assert kinds(manifest) == [("self", "fixed_6", "fixed_6"), *[own, crossing] * layers]
    assert manifest.axis("fixed_6").grid == (2, 3)
    assert manifest.axis("fixed_6_").grid is None
    assert manifest.fixed_lengths == {"fixed_6": 6, "fixed_6_": 6}


def test_two_inputs_that_share_a_symbol_are_two_sequences(tmp_path: Path) -> None:
    assert kinds(prepared(Foreign(cross=True, source="frames").model(), tmp_path)) == [("cross", "frames", "frames")]


def flattened(channels_last: bool) -> onnx.ModelProto:
    """Patches cut by reshaping alone, as some exporters write it: 2 x 3 of 4 x 4 pixels, with 3 channels."""
    shape = [8, 12, 3] if channels_last else [3, 8, 12]
    first, order = (
        ([0, 2, 4, 3, 4, 3], [0, 1, 3, 2, 4, 5]) if channels_last else ([0, 3, 2, 4, 3, 4], [0, 2, 4, 1, 3, 5])
    )
    node = helper.make_node
    nodes = [
        node("Reshape", ["pixels", "cut"], ["cells"]),
        node("Transpose", ["cells"], ["ordered"], perm=order),
        node("Reshape", ["ordered", "flat"], ["patches"]),
        node("Attention", ["patches"] * 3, ["y"], q_num_heads=4, kv_num_heads=4),
    ]
    constants = {"cut": np.array(first), "flat": np.array([0, 6, 48])}
    inputs = [helper.make_tensor_value_info("pixels", onnx.TensorProto.FLOAT, ["n", *shape])]
    outputs = [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 6, 48])]
    tensors = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "patches", inputs, outputs, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


@pytest.mark.parametrize("channels_last", [False, True])
def test_patches_that_no_convolution_cuts_are_told_by_the_size_that_fits(channels_last: bool, tmp_path: Path) -> None:
    assert prepared(flattened(channels_last), tmp_path).axis("fixed_6").grid == (2, 3)


def test_features_of_fixed_length_have_no_grid(tmp_path: Path) -> None:
    manifest = prepared(Foreign(target="text", source=9, cross=True).model(), tmp_path)
    assert kinds(manifest) == [("cross", "text", "fixed_9")]
    assert manifest.axis("fixed_9").grid is None
