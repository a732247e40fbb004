"""Axes whose length follows another's: fitted over a few runs, whatever rounds, pads or lengthens them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.prepare import PrepareRequest, prepare_bundle
from attnserve_server.conversion.probing.axes import fit, named
from attnserve_server.model.manifest import DerivedLength
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper, numpy_helper

SEEN: list[dict[str, int]] = [{"seq": 5, "frames": 7}, {"seq": 7, "frames": 11}, {"seq": 37, "frames": 31}]


def fitted(form: DerivedLength, *, longest: int = 10_000) -> DerivedLength | None:
    """What is learnt of an extent of this form, from a model that takes lengths up to a greatest one."""

    def run(lengths: Mapping[str, int]) -> dict[tuple[str, int], int]:
        if max(lengths.values()) > longest:
            raise BuildRefused("too long")
        return {("weights", 3): form.of(lengths[form.source])}

    seen = [lengths for lengths in SEEN if max(lengths.values()) <= longest]
    extents = [form.of(lengths[form.source]) for lengths in seen]
    return fit({("weights", 3): extents}, seen, run).get(("weights", 3))


@given(
    source=st.sampled_from(["seq", "frames"]),
    stride=st.integers(1, 11),
    kernel=st.integers(1, 9),
    padding=st.integers(0, 4),
)
def test_the_form_of_any_convolution_is_learnt(source: str, stride: int, kernel: int, padding: int) -> None:
    form = DerivedLength(source=source, stride=stride, offset=2 * padding - kernel + stride)
    if (form.stride, form.offset) == (1, 0):
        return  # that is the axis itself
    found = fitted(form)
    assert found is not None
    assert found.source == source
    assert all(found.of(length) == form.of(length) for length in range(2, 45))


@pytest.mark.parametrize("offset", [-2, -1, 1, 3])
def test_tokens_put_before_or_taken_away_are_learnt(offset: int) -> None:
    form = DerivedLength(source="seq", stride=1, offset=offset)
    assert fitted(form) == form


def test_a_model_that_takes_only_short_sequences_is_asked_for_no_more() -> None:
    form = DerivedLength(source="seq", stride=2, offset=1)
    assert fitted(form, longest=16) == form


def test_an_extent_that_follows_two_axes_has_no_form() -> None:
    def run(lengths: Mapping[str, int]) -> dict[tuple[str, int], int]:
        return {("joined", 1): lengths["seq"] + lengths["frames"]}

    assert fit({("joined", 1): [12, 18, 68]}, SEEN, run) == {}


def test_forms_get_symbols_that_nothing_else_has() -> None:
    forms = [
        DerivedLength(source="seq", stride=2, offset=1),
        DerivedLength(source="seq", stride=2, offset=0),
        DerivedLength(source="seq", stride=1, offset=-1),
        DerivedLength(source="seq", stride=1, offset=2),
        DerivedLength(source="seq", stride=2, offset=1),
    ]
    assert list(named(forms, ["seq", "seq_plus_2"]).values()) == ["seq_by_2", "seq_by_2_", "seq_minus_1", "seq_plus_2_"]


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
    # Nothing masks padded frames, so only sequences of one length share a batch.
    assert (manifest.axis("time").paddable, halved.paddable) == (False, False)
