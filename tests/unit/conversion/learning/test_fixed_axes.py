"""Fixed axes of one length are distinguished by what their positions come from; patch grids come from the image.

A site is a place in a graph where attention is computed. Its queries and keys are one axis if they come from one value,
and two if they come from two. A grid states how many rows and columns of patches an image has; where none is found, an
axis has no grid.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from attnserve_server.conversion.base.sites import Untappable
from attnserve_server.conversion.convert import PrepareRequest, prepare_bundle
from attnserve_server.conversion.inputs.signature import signature_of
from attnserve_server.conversion.learning.fixed_axes import FixedAxes, PatchGrid, fixed_axes, grids_of, of_one_sequence
from attnserve_server.model.manifest import Manifest
from batch_graphs import graph
from foreign_graphs import Foreign
from onnx import helper, numpy_helper
from onnx_files import saved
from opened import sites_of
from two_sided_graphs import encoder_decoder, words_over_patches

WEIGHTS = {"w": np.ones((4, 4), np.float32)}


def origins(nodes: str, inputs: str = "float[b, 9, 4] x, float[b, 9, 4] y") -> FixedAxes:
    """The fixed axes of a graph with one site of 9 queries and 9 keys."""
    found = sites_of(graph(f"g ({inputs}) => (float z) {{ {nodes} }}", **WEIGHTS))
    assert list(found) == ["attention_0"]
    return fixed_axes({"attention_0": (9, 9)}, found, ["seq"])


ATTENTION = "kt = Transpose<perm=[0, 2, 1]>(k) s = MatMul(q, kt) p = Softmax<axis=-1>(s) z = MatMul(p, k)"


def test_queries_and_keys_of_one_value_are_one_axis() -> None:
    fixed = origins(f"h = Tanh(x) q = MatMul(h, w) k = MatMul(h, w) {ATTENTION}")
    assert set(fixed.symbols.values()) == {"fixed_9"}
    assert fixed.lengths == {"fixed_9": 9}
    assert fixed.origins["fixed_9"].inputs == {"x"}


def test_queries_and_keys_of_two_inputs_are_two_axes() -> None:
    fixed = origins(f"q = MatMul(x, w) k = MatMul(y, w) {ATTENTION}")
    assert fixed.symbols == {("attention_0", 0): "fixed_9", ("attention_0", 1): "fixed_9_"}
    assert fixed.lengths == {"fixed_9": 9, "fixed_9_": 9}


def test_a_product_of_two_activations_ends_the_walk() -> None:
    # The keys read x as well, but only through a product in which another sequence takes from it.
    fixed = origins(
        f"q = MatMul(x, w) xt = Transpose<perm=[0, 2, 1]>(x) m = MatMul(y, xt) k = MatMul(m, x) {ATTENTION}"
    )
    assert set(fixed.symbols.values()) == {"fixed_9", "fixed_9_"}


def test_a_residual_keeps_the_positions_of_both_terms() -> None:
    fixed = origins(f"q = MatMul(x, w) both = Add(x, y) k = MatMul(both, w) {ATTENTION}")
    assert set(fixed.symbols.values()) == {"fixed_9"}


def test_a_taken_symbol_is_not_used_again() -> None:
    found = sites_of(graph(f"g (float[b, 9, 4] x) => (float z) {{ q = Tanh(x) k = Neg(x) {ATTENTION} }}"))
    assert set(fixed_axes({"attention_0": (9, 9)}, found, ["fixed_9"]).symbols.values()) == {"fixed_9_"}
    assert fixed_axes({"attention_0": ("seq", None)}, found, []).symbols == {}


@pytest.mark.parametrize(("keys", "one"), [("x", True), ("y", False)])
def test_sides_of_one_sequence_share_a_value(keys: str, one: bool) -> None:
    nodes = f"q = MatMul(x, w) k = MatMul({keys}, w) {ATTENTION}"
    (site,) = sites_of(graph(f"g (float[b, t, 4] x, float[b, t, 4] y) => (float z) {{ {nodes} }}", **WEIGHTS)).values()
    assert of_one_sequence(site) is one


def test_a_site_of_unknown_origin_is_of_one_sequence() -> None:
    (site,) = sites_of(graph(f"g (float[b, 9, 4] x) => (float z) {{ q = Tanh(x) k = Neg(x) {ATTENTION} }}")).values()
    assert of_one_sequence(replace(site, attention=Untappable("its layout is not known")))


FLATTENED = "f = Reshape(c, flat) x = Transpose<perm=[0, 2, 1]>(f)"


def image_axes(nodes: str, patches: int, image: str = "3, 8, 12") -> dict[str, PatchGrid]:
    """The grids of a graph with one site over the patches of an image."""
    head = f"g (float[b, {image}] pixels) => (float z)"
    constants = {
        "kernel": np.ones((4, 3, 4, 4), np.float32),
        "wide": np.ones((4, 3, 8, 8), np.float32),
        "flat": np.array([0, 4, -1]),
        "cut": np.array([0, patches, -1]),
    }
    model = graph(f"{head} {{ {nodes} q = Tanh(x) k = Neg(x) {ATTENTION} }}", **constants)
    fixed = fixed_axes({"attention_0": (patches, patches)}, sites_of(model), [])
    return grids_of(signature_of(model.graph), fixed)


def test_the_convolution_that_cuts_an_image_gives_the_grid() -> None:
    nodes = f"c = Conv<strides=[4, 4], kernel_shape=[4, 4]>(pixels, kernel) {FLATTENED}"
    assert image_axes(nodes, 6) == {"fixed_6": PatchGrid(rows=2, columns=3)}
    assert image_axes(nodes, 7) == {"fixed_7": PatchGrid(rows=2, columns=3, leading=1)}
    assert image_axes(nodes, 6 + 9) == {}


def test_a_convolution_whose_windows_overlap_cuts_no_patches() -> None:
    nodes = f"c = Conv<strides=[4, 4], kernel_shape=[8, 8], pads=[2, 2, 2, 2]>(pixels, wide) {FLATTENED}"
    # Without a convolution's grid, the square patches that fit are taken: 2 x 3 of 4 x 4 pixels.
    assert image_axes(nodes, 6) == {"fixed_6": PatchGrid(rows=2, columns=3)}
    assert image_axes(nodes, 5) == {}


@pytest.mark.parametrize("image", ["3, 8, 12", "8, 12, 3"])
def test_square_patches_that_fit_the_axis_give_the_grid(image: str) -> None:
    assert image_axes("x = Reshape(pixels, cut)", 6, image) == {"fixed_6": PatchGrid(rows=2, columns=3)}


def test_an_input_with_five_channels_is_no_image() -> None:
    assert image_axes("x = Reshape(pixels, cut)", 6, "5, 8, 12") == {}


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
def test_patches_of_an_image_have_their_grid_and_leading_positions(leading: int, tmp_path: Path) -> None:
    manifest = prepared(words_over_patches(50, leading=leading), tmp_path)
    patches = f"fixed_{6 + leading}"
    assert kinds(manifest) == [("self", "seq", "seq"), ("self", patches, patches), ("cross", "seq", patches)]
    assert (manifest.axis(patches).grid, manifest.axis(patches).leading) == ((2, 3), leading)


@pytest.mark.parametrize("layers", [1, 2])
def test_words_and_patches_of_one_number_are_two_axes(layers: int, tmp_path: Path) -> None:
    manifest = prepared(words_over_patches(50, 6, layers=layers), tmp_path)
    own, image, crossing = (
        ("self", "fixed_6", "fixed_6"),
        ("self", "fixed_6_", "fixed_6_"),
        ("cross", "fixed_6", "fixed_6_"),
    )
    assert kinds(manifest) == [own, image, crossing, *[own, crossing] * (layers - 1)]
    assert manifest.axis("fixed_6").grid is None
    assert manifest.axis("fixed_6_").grid == (2, 3)
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
def test_patches_that_are_cut_by_reshaping_have_the_grid_that_fits(channels_last: bool, tmp_path: Path) -> None:
    assert prepared(flattened(channels_last), tmp_path).axis("fixed_6").grid == (2, 3)


def test_features_of_fixed_length_have_no_grid(tmp_path: Path) -> None:
    manifest = prepared(Foreign(target="text", source=9, cross=True).model(), tmp_path)
    assert kinds(manifest) == [("cross", "text", "fixed_9")]
    assert manifest.axis("fixed_9").grid is None
