"""What is learnt about a graph's sites together: layouts, windows, and sites that are withdrawn with a reason.

A site is a place in a graph where attention is computed. It is withdrawn, so that it gives no weights, if its axes are
not understood, or if weights @ value is not its own output. `learnt_of` runs a graph in a folder and returns its sites.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from attnserve_server.conversion.base.sites import Factor, FoundSite, Layout, Learnt, Probabilities, Scores, Windows
from attnserve_server.conversion.finders import find_sites
from attnserve_server.conversion.inputs.signature import signature_of
from attnserve_server.conversion.learning.sites import grid_of_windows, learn, tappable_of, verified, with_key_axes
from attnserve_server.conversion.probing.axes import ProbedAxes
from attnserve_server.conversion.probing.feeds import Sampler
from attnserve_server.conversion.rewrite.taps import add_taps, expose
from attnserve_server.model.bands import BlockBand, GridBand
from attnserve_server.model.manifest import SiteSpec
from batch_graphs import graph
from opened import runner_of

TOLERANCE = 1e-4
FOLDED = """
    a = Attention<q_num_heads=2, kv_num_heads=2>(x, x, x)
    q4 = Reshape(a, apart) qh = Transpose<perm=[0, 2, 1, 3]>(q4) q = Reshape(qh, folded)
    kt = Transpose<perm=[0, 2, 1]>(q)
    s = MatMul(q, kt)
    p = Softmax<axis=-1>(s)
    z = MatMul(p, q)
"""
"""An operator, then attention in single nodes with the weights (B * H, T, T) of 2 heads."""


def learnt_of(model: onnx.ModelProto, folder: Path) -> tuple[ir.Model, dict[str, FoundSite], dict[str, Learnt]]:
    copy = ir.from_proto(model)
    found = find_sites(copy.graph)
    expose(copy, found.values())
    sites, learnt = learn(model, copy, found, Sampler(signature_of(model.graph)), folder)
    return copy, sites, learnt


def folded() -> onnx.ModelProto:
    constants = {"apart": np.array([0, 6, 2, 4]), "folded": np.array([-1, 6, 4])}
    body = f"g (float[b, 6, 8] x) => (float z) {{ {FOLDED} }}"
    return onnx.shape_inference.infer_shapes(graph(body, opset=23, **constants))


def test_only_sites_with_their_own_weights_have_something_to_learn(tmp_path: Path) -> None:
    _, sites, learnt = learnt_of(folded(), tmp_path)
    assert [type(site.attention) for site in sites.values()] == [Scores, Probabilities]
    axes = ((Factor("batch"), Factor("head", 2)), (Factor("query"),), (Factor("key"),))
    # As long as the length is fixed, windows are possible; the channels of the heads exclude them.
    assert learnt == {"attention_1": Learnt(Layout(axes, kv_heads=2, head_dim=4, ambiguous="all"))}


def test_a_site_that_is_not_understood_is_withdrawn_with_a_reason(tmp_path: Path) -> None:
    body = """g (float[b, t, 4] x) => (float z) {
        y = Reshape(x, all)
        kt = Transpose<perm=[0, 2, 1]>(y)
        s = MatMul(x, kt)
        p = Softmax<axis=-1>(s)
        z = MatMul(p, y)
    }"""
    model = onnx.shape_inference.infer_shapes(graph(body, all=np.array([1, -1, 4])))
    _, sites, learnt = learnt_of(model, tmp_path)
    assert sites["attention_0"].unavailable_reason == "its keys follow the batch"
    assert (tappable_of(sites), learnt) == ({}, {})


def test_a_graph_that_does_not_run_withdraws_its_sites(tmp_path: Path) -> None:
    body = """g (float[b, t, 4] x, float[b, s, 4] y) => (float z) {
        k = Add(x, y)
        kt = Transpose<perm=[0, 2, 1]>(k)
        s = MatMul(x, kt)
        p = Softmax<axis=-1>(s)
        z = MatMul(p, k)
    }"""
    _, sites, _ = learnt_of(onnx.shape_inference.infer_shapes(graph(body)), tmp_path)
    assert sites["attention_0"].unavailable_reason.startswith("its layout is not known: the model does not run:")


def test_a_site_whose_weights_do_not_give_its_output_is_withdrawn(tmp_path: Path) -> None:
    copy, sites, learnt = learnt_of(folded(), tmp_path)
    wrong = replace(
        learnt["attention_1"].layout, axes=((Factor("head", 2), Factor("batch")), (Factor("query"),), (Factor("key"),))
    )
    reasons = []
    for each in (learnt, {"attention_1": Learnt(wrong)}):
        tapped = copy.clone()
        add_taps(tapped.graph, find_sites(tapped.graph), each)
        checker = runner_of(ir.to_proto(tapped), tmp_path)
        # The check uses the true layout; the taps use what was learnt.
        result = verified(checker, Sampler(signature_of(folded().graph)), sites, learnt, TOLERANCE)
        reasons.append([site.unavailable_reason for site in result.values()])
    assert reasons[0] == ["", ""]
    assert reasons[1][0] == ""
    assert reasons[1][1].startswith("its weights @ value differ from its own output by")


def test_a_windowed_site_has_the_axis_of_its_keys() -> None:
    axes = ProbedAxes({}, {"one": ("seq", 4), "two": ("seq", "seq")}, (), frozenset(), {})
    layout = Layout(((Factor("batch"),), (Factor("window"),), (Factor("query"),), (Factor("key"),)), 1, 4)
    windows = Windows(BlockBand(block=2, before=1, after=0), "x", "seq", causal=True)
    given = with_key_axes(
        axes, {"one": Learnt(layout, windows), "two": Learnt(layout), "lost": Learnt(layout, windows)}
    )
    assert given.sites == {"one": ("seq", "seq"), "two": ("seq", "seq")}
    assert given.causal_sites == {"one", "lost"} & set(given.sites)


def spec(band: GridBand, axis: str = "fixed_6") -> SiteSpec:
    return SiteSpec(
        name="site", layer=0, kind="self", form="windowed", operator="Softmax", heads=1, kv_heads=1, head_dim=4,
        query_axis=axis, key_axis=axis, items_input="items", weights_output="weights", band=band,
    )  # fmt: skip


def test_the_windows_over_an_axis_give_its_grid() -> None:
    two, three = (GridBand(rows=rows, columns=6 // rows, window=1) for rows in (2, 3))
    assert grid_of_windows([spec(two), spec(two), spec(three, "fixed_9")], "fixed_6") == (2, 3)
    assert grid_of_windows([spec(two), spec(three)], "fixed_6") is None
    assert grid_of_windows([], "fixed_6") is None
