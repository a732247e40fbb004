"""Which axis of the inputs each dimension follows: the same length, a fixed one, or a form (T + offset) // stride.

`probed` runs a graph at several lengths and returns the axes of its outputs and sites. A dimension that follows none of
these is None. A graph that runs at no such lengths raises BuildRefused with the lengths tried. A site is a place in a
graph that computes attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.convert import PrepareRequest, prepare_bundle
from attnserve_server.conversion.inputs.signature import signature_of
from attnserve_server.conversion.probing.axes import ProbedAxes, fit, named, probe_axes
from attnserve_server.conversion.probing.feeds import Sampler
from attnserve_server.conversion.rewrite.taps import expose, tapped
from attnserve_server.model.manifest import DerivedLength
from batch_graphs import graph
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from opened import runner_of

DONE: list[dict[str, int]] = [{"seq": 5, "frames": 7}, {"seq": 7, "frames": 11}, {"seq": 37, "frames": 31}]


def fitted(form: DerivedLength, *, longest: int = 10_000) -> DerivedLength | None:
    """The form that is fitted to a dimension of this form, in a model that takes lengths up to a greatest one."""

    def run(lengths: Mapping[str, int]) -> dict[tuple[str, int], int]:
        if max(lengths.values()) > longest:
            raise BuildRefused("too long")
        return {("weights", 3): form.of(lengths[form.source])}

    done = [lengths for lengths in DONE if max(lengths.values()) <= longest]
    sizes = [form.of(lengths[form.source]) for lengths in done]
    return fit({("weights", 3): sizes}, done, run).get(("weights", 3))


@given(
    source=st.sampled_from(["seq", "frames"]),
    stride=st.integers(1, 11),
    kernel=st.integers(1, 9),
    padding=st.integers(0, 4),
)
def test_the_form_of_any_convolution_is_fitted(source: str, stride: int, kernel: int, padding: int) -> None:
    form = DerivedLength(source=source, stride=stride, offset=2 * padding - kernel + stride)
    if (form.stride, form.offset) == (1, 0):
        return  # that is the axis itself
    found = fitted(form)
    assert found is not None
    assert found.source == source
    assert all(found.of(length) == form.of(length) for length in range(2, 45))


@pytest.mark.parametrize("offset", [-2, -1, 1, 3])
def test_tokens_added_or_removed_are_fitted(offset: int) -> None:
    form = DerivedLength(source="seq", stride=1, offset=offset)
    assert fitted(form) == form


def test_a_form_is_fitted_on_short_sequences_where_the_model_takes_no_longer_ones() -> None:
    form = DerivedLength(source="seq", stride=2, offset=1)
    assert fitted(form, longest=16) == form


def test_a_dimension_that_follows_two_axes_has_no_form() -> None:
    def run(lengths: Mapping[str, int]) -> dict[tuple[str, int], int]:
        return {("joined", 1): lengths["seq"] + lengths["frames"]}

    assert fit({("joined", 1): [12, 18, 68]}, DONE, run) == {}


def test_each_form_gets_a_symbol_that_is_not_taken() -> None:
    forms = [
        DerivedLength(source="seq", stride=2, offset=1),
        DerivedLength(source="seq", stride=2, offset=0),
        DerivedLength(source="seq", stride=1, offset=-1),
        DerivedLength(source="seq", stride=1, offset=2),
        DerivedLength(source="seq", stride=2, offset=1),
    ]
    assert list(named(forms, ["seq", "seq_plus_2"]).values()) == ["seq_by_2", "seq_by_2_", "seq_minus_1", "seq_plus_2_"]


def probed(model: onnx.ModelProto, folder: Path) -> ProbedAxes:
    """The axes of the outputs of a graph and of the sites that need no run to be tapped."""
    copy, sites = tapped(onnx.shape_inference.infer_shapes(model))
    expose(copy, sites.values())
    sampler = Sampler(signature_of(model.graph))
    outputs = [value.name for value in model.graph.output]
    return probe_axes(runner_of(ir.to_proto(copy), folder), sampler, outputs, sites)


def test_each_dimension_is_a_symbol_a_number_a_form_or_unknown(tmp_path: Path) -> None:
    body = """g (float[b, t, 4] x, float[b, s, 4] y) => (float z, float f, float d, float u, float m) {
        z = Identity(y)
        f = MatMul(x, weights)
        d = Slice(x, one, last, one)
        u = Concat<axis=1>(x, y)
        m = ReduceMean<axes=[0]>(x)
    }"""
    constants = {"weights": np.ones((4, 7), np.float32), "one": np.array([1]), "last": np.array([99])}
    axes = probed(graph(body, **constants), tmp_path)
    assert axes.outputs == {"z": ("s", 4), "f": ("t", 7), "d": ("t_minus_1", 4), "u": (None, 4)}
    assert axes.unbatched_outputs == ("m",)
    assert axes.derived == {"t_minus_1": DerivedLength(source="t", stride=1, offset=-1)}


def test_a_site_has_the_axes_of_its_queries_and_keys(tmp_path: Path) -> None:
    body = """g (float[b, t, 4] x, float[b, s, 4] y) => (float z) {
        z = Attention<q_num_heads=2, kv_num_heads=2>(x, y, y)
    }"""
    axes = probed(graph(body, opset=23), tmp_path)
    assert axes.sites == {"attention_0": ("t", "s")}
    assert not axes.unbatched_sites


def test_a_site_whose_operator_has_no_batch_in_front_is_listed(tmp_path: Path) -> None:
    body = """g (float[b, t, 4] x) => (float z) {
        xs = Transpose<perm=[1, 0, 2]>(x)
        attended = Attention<q_num_heads=2, kv_num_heads=2>(xs, xs, xs)
        z = Transpose<perm=[1, 0, 2]>(attended)
    }"""
    assert probed(graph(body, opset=23), tmp_path).unbatched_sites == {"attention_0"}


def test_a_graph_whose_axes_must_be_equal_is_refused_with_the_lengths_tried(tmp_path: Path) -> None:
    body = "g (float[b, t, 4] x, float[b, s, 4] y) => (float z) { z = Add(x, y) }"
    with pytest.raises(BuildRefused, match=r"tried on t=5, s=7; axes that must be equal need the same symbol"):
        probed(graph(body), tmp_path)


def front_end() -> onnx.ModelProto:
    """Audio frames (B, T, 4), halved by a convolution of width 3, stride 2 and padding 1, that attend to each other."""
    rng = np.random.default_rng(0)
    node = helper.make_node
    nodes = [
        node("Transpose", ["frames"], ["channels"], perm=[0, 2, 1]),
        node("Conv", ["channels", "kernel"], ["halved"], strides=[2], pads=[1, 1], kernel_shape=[3]),
        node("Transpose", ["halved"], ["hidden"], perm=[0, 2, 1]),
        node("Attention", ["hidden", "hidden", "hidden"], ["attended"], q_num_heads=2, kv_num_heads=2),
    ]
    info = helper.make_tensor_value_info
    kernel = numpy_helper.from_array((rng.normal(size=(8, 4, 3)) * 0.2).astype(np.float32), "kernel")
    inputs = [info("frames", onnx.TensorProto.FLOAT, ["batch", "time", 4])]
    outputs = [info("attended", onnx.TensorProto.FLOAT, ["batch", "half", 8])]
    graph = helper.make_graph(nodes, "front_end", inputs, outputs, [kernel])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def test_an_audio_front_end_halves_the_frames_of_sites_and_outputs(tmp_path: Path) -> None:
    onnx.save(front_end(), tmp_path / "audio.onnx")
    request = PrepareRequest(file=tmp_path / "audio.onnx", name="audio", repository=tmp_path / "models", max_length=99)
    manifest = prepare_bundle(request).manifest
    (site,) = manifest.sites
    assert (site.kind, site.query_axis, site.key_axis, site.available) == ("self", "time_by_2", "time_by_2", True)
    assert manifest.outputs[0].shape == ("time_by_2", 8)
    halved = manifest.axis("time_by_2")
    assert halved.derived == DerivedLength(source="time", stride=2, offset=1)
    assert halved.max_length == 50
    # No mask marks padded frames, so that only sequences of one length share a batch.
    assert (manifest.axis("time").paddable, halved.paddable) == (False, False)
