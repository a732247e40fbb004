"""Trials of other exporters and of the runtime's rewritings: which are kept, and what the report states.

Needs torch, and fails to import without it. `measured` replaces the measured times, one ratio for each timed trial.
"""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.choose import comparing
from attnserve_server.conversion.choose import trials as room
from attnserve_server.conversion.choose.comparing import Timing
from attnserve_server.conversion.convert import ExportRequest, PrepareRequest, export_bundle, prepare_bundle
from attnserve_server.conversion.probing.runtime import GraphRunner
from attnserve_server.conversion.sources.zoo import model as zoo
from attnserve_server.engine.session import LEFT_OUT
from attnserve_server.model.manifest import Manifest
from attnserve_server.model.report import TrialReport
from attnserve_server.model.repository import Repository
from onnx_files import saved
from plain_graphs import Plain

REWRITINGS = list(room._REWRITINGS)


def measured(monkeypatch: pytest.MonkeyPatch, *ratios: float) -> None:
    """Replace the measured times, because those of graphs of this size are noise."""
    timings = iter(Timing(ratio, pays=ratio < 1) for ratio in ratios)
    monkeypatch.setattr(comparing, "timing_of", lambda source_s, other_s: next(timings))


def prepared(folder: Path, *, try_more: bool = True) -> Manifest:
    file = saved(Plain(masks=("lowest",)).model(), folder / "ranker.onnx")
    request = PrepareRequest(
        file=file, name="ranker", repository=folder / "models", fuse=False, try_more=try_more, max_length=64
    )
    return prepare_bundle(request).manifest


def test_fastest_rewriting_is_kept_and_each_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured(monkeypatch, 0.95, 0.9, 1.0)
    manifest = prepared(tmp_path)
    first, second, ahead = manifest.check.trials
    assert [trial.what for trial in (first, second)] == REWRITINGS
    assert (first.kept, first.time, first.reason) == (False, 0.95, "it is faster, though not the fastest")
    assert (second.kept, second.time, second.reason) == (True, 0.9, "")
    assert manifest.left_out == (*LEFT_OUT, "MatMulAddFusion")
    assert ahead.load_time is not None
    assert ahead.output_max_abs_error is not None


def test_no_rewriting_is_kept_if_none_is_faster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured(monkeypatch, 1.1, 1.0, 0.5)
    manifest = prepared(tmp_path)
    assert manifest.left_out is None
    assert [trial.kept for trial in manifest.check.trials] == [False, False, False]
    # A graph that is optimized for a CPU is not kept however fast it is: a bundle is for every provider.
    assert manifest.check.trials[2].reason == "it takes 0.5 of the time, but runs on CPUs only"
    assert "1.100 of the time" in manifest.check.trials[0].reason


def test_rewriting_with_other_answers_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparing, "difference", lambda *_, tap=False: 0.5 if tap else 0.0)
    manifest = prepared(tmp_path)
    assert manifest.left_out is None
    assert all("its weights differ by 0.5, more than" in trial.reason for trial in manifest.check.trials)
    assert {trial.time for trial in manifest.check.trials} == {None}


def test_no_trial_runs_without_try_more(tmp_path: Path) -> None:
    assert prepared(tmp_path, try_more=False).check.trials == ()


def test_manifest_records_the_optimizers_that_a_kept_rewriting_disables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured(monkeypatch, 0.9, 1.0, 1.0)
    assert prepared(tmp_path).left_out == ()
    assert Repository(tmp_path / "models").bundle("ranker").manifest.left_out == ()


def exported(folder: Path) -> Manifest:
    return export_bundle(
        ExportRequest(source="zoo:self", name="tiny", repository=folder, fuse=False, try_more=True)
    ).manifest


def test_bundle_has_the_graph_of_the_faster_exporter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured(monkeypatch, 0.9, 1.0, 1.0, 1.0)
    manifest = exported(tmp_path)
    assert manifest.check.trials[0].kept
    assert manifest.provenance.exporter == "torch.onnx.export, torchscript"
    assert manifest.provenance.opset == 17
    assert manifest.sites[0].available


def test_slower_and_failed_exporters_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured(monkeypatch, 1.1, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
    first = exported(tmp_path / "first")
    assert first.provenance.exporter == "torch.onnx.export, dynamo"
    assert first.check.trials[0].reason.startswith("it takes 1.100 of the time")
    to_graph = zoo.ZooModel.to_graph

    def dynamo_only(self: zoo.ZooModel, exporter: str, opset: int) -> onnx.ModelProto:
        if exporter == "torchscript":
            raise BuildRefused("it cannot")
        return to_graph(self, exporter, opset)

    monkeypatch.setattr(zoo.ZooModel, "to_graph", dynamo_only)
    second = exported(tmp_path / "second")
    assert second.check.trials[0] == TrialReport(what="torchscript at opset 17, beside dynamo", reason="it cannot")


def test_graph_that_does_not_load_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(path: Path, left_out: object = None) -> GraphRunner:
        if left_out is not None:
            raise BuildRefused("the runtime cannot load the model")
        return GraphRunner(path)

    monkeypatch.setattr(room, "GraphRunner", refusing)
    measured(monkeypatch, 1.0)
    reasons = [trial.reason for trial in prepared(tmp_path).check.trials]
    assert reasons[:2] == ["the runtime cannot load the model"] * 2


@pytest.mark.parametrize(
    ("report", "line"),
    [
        (TrialReport(what="this", kept=True, time=0.9), "tried this: kept, at 0.900 of the time"),
        (TrialReport(what="this", reason="it cannot"), "tried this: not kept, it cannot"),
        (
            TrialReport(what="this", reason="it cannot", load_time=0.5),
            "tried this: not kept, it cannot, and 0.50 of the time to load",
        ),
    ],
)
def test_report_is_one_line(report: TrialReport, line: str) -> None:
    assert str(report) == line
