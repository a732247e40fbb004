"""Fusion: a fused graph is kept only if it gives the same answers and is faster; the report states the reason.

Fusion rewrites the separate nodes of attention to one operator. `measured` replaces the measured times, so that the
outcome does not depend on the machine.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from attnserve_server.conversion.base.steps import Steps
from attnserve_server.conversion.choose import comparing
from attnserve_server.conversion.choose import fusion as room
from attnserve_server.conversion.choose.comparing import Timing
from attnserve_server.conversion.convert import PrepareRequest, prepare_bundle
from attnserve_server.conversion.graphs.reading import checked
from attnserve_server.conversion.probing.runtime import GraphRunner
from attnserve_server.conversion.rewrite.fuse.candidates import ATTENTION, MULTI_HEAD, Fused, candidates
from attnserve_server.engine.providers import OPENVINO
from attnserve_server.model.manifest import Manifest
from attnserve_server.model.report import FusionReport, UnfusedSite
from commands import call, conversion_app
from onnx_files import saved
from openvino_here import needs_openvino, why_absent
from plain_graphs import Plain
from rich.console import Console
from typer.testing import CliRunner

pytestmark = pytest.mark.slow

CASE = Plain(masks=("lowest",))


def measured(monkeypatch: pytest.MonkeyPatch, timing: Timing) -> None:
    """Replace the measured times, because those of graphs of this size are noise."""
    monkeypatch.setattr(comparing, "timing_of", lambda source_s, fused_s: timing)


def prepared(folder: Path, *, model: onnx.ModelProto | None = None, fuse: bool = True) -> Manifest:
    file = saved(model or CASE.model(), folder / "ranker.onnx")
    request = PrepareRequest(file=file, name="ranker", repository=folder / "models", fuse=fuse)
    return prepare_bundle(request).manifest


def test_faster_fused_graph_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured(monkeypatch, Timing(0.9, pays=True))
    manifest = prepared(tmp_path)
    report = manifest.check.fusion
    assert report is not None
    assert (report.kept, report.operator, report.sites, report.fused_over_source_time) == (True, ATTENTION, 1, 0.9)
    assert report.output_max_abs_error is not None
    assert report.output_max_abs_error < 1e-5
    (site,) = manifest.sites
    assert (site.name, site.operator, site.available) == ("encoder.layer.0.attention", "ai.onnx.Attention-23", True)
    # Provenance describes the file, not the fused graph.
    assert manifest.provenance.opset == CASE.opset
    assert manifest.check.tapped_over_source_time is not None
    feeds = CASE.feeds(3, 7, 7)
    bundle = GraphRunner(tmp_path / "models" / "ranker" / "1" / "model.onnx")
    assert site.weights_output is not None
    weights = bundle.run(feeds, [site.weights_output])[site.weights_output]
    # float32 sums in another order.
    assert np.abs(weights - CASE.reference(feeds)).max() < 1e-5


def test_slower_fused_graph_is_not_kept_and_the_report_states_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured(monkeypatch, Timing(1.2, pays=False))
    manifest = prepared(tmp_path)
    report = manifest.check.fusion
    assert report is not None
    assert not report.kept
    assert "1.200 of the source's time" in report.reason
    assert not manifest.sites[0].operator.startswith("ai.onnx.Attention")
    assert manifest.sites[0].name == "encoder.layer.0.attention"


def test_fused_graph_with_other_answers_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured(monkeypatch, Timing(0.1, pays=True))

    def wrong(proto: onnx.ModelProto) -> Iterator[Fused]:
        for fused in candidates(proto):
            for node in fused.proto.graph.node:
                for attribute in node.attribute:
                    attribute.f *= 1.5 if attribute.name == "scale" else 1
            yield fused

    monkeypatch.setattr(room, "candidates", wrong)
    report = prepared(tmp_path).check.fusion
    assert report is not None
    assert not report.kept
    assert report.reason.startswith("its outputs differ by")
    assert report.fused_over_source_time is None


def test_fused_graph_that_does_not_run_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(proto: onnx.ModelProto) -> Iterator[Fused]:
        fused = next(candidates(proto))
        for node in fused.proto.graph.node:
            if node.op_type == "Attention":
                node.input[1] = "wq"
        yield fused

    monkeypatch.setattr(room, "candidates", broken)
    report = prepared(tmp_path).check.fusion
    assert report is not None
    assert not report.kept
    assert report.reason


def test_second_operator_is_tried_if_the_first_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timings = iter((Timing(1.1, pays=False), Timing(0.8, pays=True)))
    monkeypatch.setattr(comparing, "timing_of", lambda source_s, fused_s: next(timings))
    manifest = prepared(tmp_path)
    assert manifest.check.fusion is not None
    assert manifest.check.fusion.operator == MULTI_HEAD
    assert manifest.sites[0].operator.startswith(MULTI_HEAD)
    assert manifest.sites[0].available


def test_no_fusion_is_tried_without_fuse(tmp_path: Path) -> None:
    assert prepared(tmp_path, fuse=False).check.fusion is None


def test_graph_without_plain_sites_reports_why_each_is_not_fused(tmp_path: Path) -> None:
    model = CASE.model()
    assert list(candidates(checked(onnx.version_converter.convert_version(model, 18), "plain")))
    softmax = next(node for node in model.graph.node if node.op_type == "Softmax")
    model.graph.output.append(
        onnx.helper.make_tensor_value_info(softmax.output[0], 1, ["batch", 4, "target", "target"])
    )
    report = prepared(tmp_path, model=model).check.fusion
    assert report is not None
    assert (report.sites, report.operator, report.kept) == (0, "", False)
    assert report.unfused == (
        UnfusedSite(site="encoder.layer.0.attention", reason="its weights are an output of the graph"),
    )
    assert str(report) == "encoder.layer.0.attention not fused: its weights are an output of the graph"


def test_sites_with_the_same_reason_are_summed_up() -> None:
    unfused = tuple(UnfusedSite(site=f"layer.{at}", reason="its scores have rank 3, not 4") for at in range(3))
    other = UnfusedSite(site="layer.3", reason="its scores are scaled after a mask")
    report = FusionReport(operator=ATTENTION, sites=8, kept=True, fused_over_source_time=0.9, unfused=(*unfused, other))
    assert str(report) == (
        "8 attention sites rewritten to ai.onnx.Attention: 0.900 of the source's time; "
        "layer.0 and 2 more not fused: its scores have rank 3, not 4; "
        "layer.3 not fused: its scores are scaled after a mask"
    )


def test_inspect_and_prepare_print_why_a_site_is_not_fused(tmp_path: Path) -> None:
    model = CASE.model()
    softmax = next(node for node in model.graph.node if node.op_type == "Softmax")
    model.graph.output.append(
        onnx.helper.make_tensor_value_info(softmax.output[0], 1, ["batch", 4, "target", "target"])
    )
    app = conversion_app()
    line = ["prepare", str(saved(model, tmp_path / "ranker.onnx")), "--name", "ranker"]
    done = CliRunner().invoke(app, [*line, "--repository", str(tmp_path / "models")])
    reason = "encoder.layer.0.attention not fused: its weights are an output of the graph"
    assert done.exit_code == 0, done.output
    assert reason in done.output
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "models" / "ranker" / "1")])
    assert reason in " ".join(shown.output.split())


@pytest.mark.parametrize(
    ("timing", "line"),
    [
        (Timing(0.9, pays=True), "1 attention site rewritten to ai.onnx.Attention: 0.900 of the source's time"),
        (Timing(1.2, pays=False), "1 attention site rewritten to ai.onnx.Attention, but not kept: it takes 1.200"),
    ],
    ids=["kept", "not kept"],
)
def test_prepare_and_inspect_report_the_fusion(
    timing: Timing, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured(monkeypatch, timing)
    app = conversion_app()
    file = saved(CASE.model(), tmp_path / "ranker.onnx")
    arguments = ["prepare", str(file), "--name", "ranker", "--repository", str(tmp_path / "models")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert line in done.output
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "models" / "ranker" / "1")])
    assert line in " ".join(shown.output.split())


@needs_openvino
@pytest.mark.parametrize("pays", [True, False])
def test_fusion_is_chosen_on_the_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, pays: bool) -> None:
    measured(monkeypatch, Timing(0.9 if pays else 1.1, pays=pays))
    opened: list[str] = []
    load = room.GraphRunner

    def recording(path: Path, left_out: object = None, provider: str = "CPUExecutionProvider") -> GraphRunner:
        opened.append(f"{path.name} {provider}")
        return load(path, left_out, provider)  # type: ignore[arg-type]

    monkeypatch.setattr(room, "GraphRunner", recording)
    file = saved(CASE.model(), tmp_path / "ranker.onnx")
    request = PrepareRequest(file=file, name="ranker", repository=tmp_path / "models", target=OPENVINO)
    printed = io.StringIO()
    manifest = prepare_bundle(request, Steps(Console(file=printed, width=200))).manifest
    assert {f"unfused.onnx {OPENVINO}", f"fused.onnx {OPENVINO}"} <= set(opened)
    assert manifest.provenance.target == OPENVINO
    assert manifest.check.fusion is not None
    assert manifest.check.fusion.kept is pays
    left = f"warning: {OPENVINO} leaves nodes to CPUExecutionProvider: 1 Attention"
    assert (left in printed.getvalue()) is pays


@pytest.mark.skipif(not why_absent(), reason="the plug-in serves here")
def test_target_that_is_absent_is_refused(tmp_path: Path) -> None:
    file = saved(CASE.model(), tmp_path / "ranker.onnx")
    line = ("prepare", file, "--name", "ranker", "--repository", tmp_path / "models", "--target", "openvino")
    done = call(conversion_app(), *line)
    assert done.exit_code == 2
    assert why_absent() in " ".join(done.stderr.split())
    assert not (tmp_path / "models").exists()
