"""The greatest batch and lengths that a graph runs, and graphs whose batch is on another axis or fixed.

Needs torch, and fails to import without it. `prepared` converts a graph and returns the bundle and the warnings. Limits
are lowered with a warning; a graph whose batch or lengths cannot be served raises BuildRefused.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.base.steps import Steps
from attnserve_server.conversion.convert import ExportRequest, PrepareRequest, export_bundle, prepare_bundle
from attnserve_server.conversion.sources.zoo import model as zoo
from attnserve_server.domain.clock import ThreadCpuClock
from attnserve_server.engine import warmup
from attnserve_server.engine.session import RuntimeSession
from attnserve_server.model.repository import Bundle
from limited_graphs import (
    cut_short,
    few_positions_in_all,
    few_rows,
    in_windows_of,
    length_first,
    one_row,
    positions_from,
    shared_positions,
)
from onnx import helper, numpy_helper
from onnx_files import saved


def prepared(model: onnx.ModelProto, folder: Path, **changes: Any) -> tuple[Bundle, list[str]]:
    """The bundle, and the warnings."""
    warnings: list[str] = []
    steps = Steps.silent()
    steps.warn = warnings.append  # type: ignore[method-assign]
    file = saved(model, folder / "ranker.onnx")
    request = PrepareRequest(file=file, name="ranker", repository=folder / "models", **changes)
    return prepare_bundle(request, steps), warnings


def warmed_up(bundle: Bundle) -> None:
    """Run what the server runs when it loads a bundle. Raises RunFailed where it cannot be served."""
    session = RuntimeSession.load(bundle.model_path, provider="CPUExecutionProvider", intra_op_threads=1)
    warmup.touch(session, bundle.manifest)
    warmup.measure(session, bundle.manifest, ThreadCpuClock(), repeats=1)
    longest = max(axis.max_length for axis in bundle.manifest.axes)
    warmup.run(session, bundle.manifest, [warmup.synthetic(bundle.manifest, longest)])


@pytest.mark.parametrize("rows", [3, 4, 9])
def test_largest_batch_is_found_by_running(rows: int, tmp_path: Path) -> None:
    bundle, warnings = prepared(few_rows(rows), tmp_path)
    assert bundle.manifest.max_batch_size == rows
    assert f"the graph takes at most {rows} rows in a batch, not 32" in warnings
    warmed_up(bundle)


def test_largest_batch_stays_as_requested_where_the_graph_takes_it(tmp_path: Path) -> None:
    bundle, warnings = prepared(few_rows(32), tmp_path)
    assert bundle.manifest.max_batch_size == 32
    assert not [words for words in warnings if "at most" in words]


def test_rows_are_limited_where_they_and_the_lengths_limit_each_other(tmp_path: Path) -> None:
    bundle, warnings = prepared(few_positions_in_all(600), tmp_path, max_length=128)
    assert bundle.manifest.max_batch_size == 4  # of 128 positions each
    assert "the graph takes at most 4 rows in a batch of its greatest lengths, not 32" in warnings
    warmed_up(bundle)


def test_graph_that_takes_one_row_alone_is_served_one_at_a_time(tmp_path: Path) -> None:
    bundle, warnings = prepared(one_row(), tmp_path)
    assert bundle.manifest.max_batch_size == 1
    assert bundle.manifest.sites[0].available
    assert [words for words in warnings if "three rows: every sequence runs alone" in words]
    warmed_up(bundle)


@pytest.mark.parametrize(
    ("counted", "padding", "longest"), [("mask", 1, 38), ("ids", 1, 38), ("ids", 0, 38), ("ids", 49, 38)]
)
def test_longest_length_is_that_of_a_request_without_padding(
    counted: str, padding: int, longest: int, tmp_path: Path
) -> None:
    # Positions start at 2, so that 38 of the table's 40 rows are left for tokens.
    bundle, warnings = prepared(positions_from(counted, padding=padding), tmp_path)
    assert bundle.manifest.axis("seq").max_length == longest
    assert f"the graph takes at most {longest} positions along 'seq', not 512" in warnings
    warmed_up(bundle)


def test_axes_that_share_a_table_are_limited_together(tmp_path: Path) -> None:
    bundle, _ = prepared(shared_positions(90), tmp_path)
    assert {axis.symbol: axis.max_length for axis in bundle.manifest.axes} == {"words": 45, "frames": 45}
    warmed_up(bundle)


def test_output_that_stops_following_the_lengths_is_refused_with_its_shapes(tmp_path: Path) -> None:
    with pytest.raises(
        BuildRefused, match=r"'out' has the shape \(1, 60, 8\); .* which is \(1, 128, 8\) in this batch"
    ):
        prepared(cut_short(60), tmp_path)


def exported(folder: Path) -> tuple[Bundle, list[str]]:
    warnings: list[str] = []
    steps = Steps.silent()
    steps.warn = warnings.append  # type: ignore[method-assign]
    return export_bundle(ExportRequest(source="zoo:self", name="tiny", repository=folder, fuse=False), steps), warnings


def with_limits(model: onnx.ModelProto, *, rows: int, positions: int) -> onnx.ModelProto:
    """The graph, which now fails on more rows or positions: each size is looked up in a separate table."""
    ids = model.graph.input[0].name
    nodes: list[onnx.NodeProto] = []
    for axis, most in ((0, rows), (1, positions)):
        model.graph.initializer.append(numpy_helper.from_array(np.zeros(most + 1, np.int64), f"table.{axis}"))
        nodes += [
            helper.make_node("Shape", [ids], [f"size.{axis}"], start=axis, end=axis + 1),
            helper.make_node("Gather", [f"table.{axis}", f"size.{axis}"], [f"zero.{axis}"]),
        ]
    nodes.append(helper.make_node("Add", ["zero.0", "zero.1"], ["zero"]))
    nodes.append(helper.make_node("Add", [ids, "zero"], ["limited_ids"]))
    for node in model.graph.node:
        node.input[:] = ["limited_ids" if name == ids else name for name in node.input]
    for node in reversed(nodes):
        model.graph.node.insert(0, node)
    return model


def test_export_lowers_what_a_wrong_configuration_declares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    to_graph: Callable[..., onnx.ModelProto] = zoo.ZooModel.to_graph

    def smaller(self: zoo.ZooModel, exporter: str, opset: int) -> onnx.ModelProto:
        return with_limits(to_graph(self, exporter, opset), rows=5, positions=20)

    monkeypatch.setattr(zoo.ZooModel, "to_graph", smaller)
    bundle, warnings = exported(tmp_path)
    longest = zoo.MAX_LENGTH
    assert (bundle.manifest.max_batch_size, bundle.manifest.axis("seq").max_length) == (5, 20)
    assert bundle.manifest.text is not None
    assert bundle.manifest.text.max_tokens == 20
    assert max(bundle.manifest.check.lengths) == 20
    assert f"the graph takes at most 20 positions along 'seq', not {longest}" in warnings
    assert "the graph takes at most 5 rows in a batch, not 32" in warnings
    warmed_up(bundle)


def test_batch_on_the_second_axis_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BuildRefused, match=r"the batch may be axis 1 of 'x': rows along axis 0 .* batch_first=True"):
        prepared(length_first(), tmp_path)


@pytest.mark.parametrize("shape", [["seq", "batch_size", 8], ["seq", "N", 8], ["time", None, 8], [None, 1, 8]])
def test_batch_on_the_second_axis_is_refused_under_any_name(shape: list[str | int | None], tmp_path: Path) -> None:
    with pytest.raises(BuildRefused, match="the batch may be axis 1 of 'x'"):
        prepared(length_first(shape), tmp_path)


def test_batch_on_the_second_axis_is_refused_beside_a_mask_that_has_it_first(tmp_path: Path) -> None:
    with pytest.raises(BuildRefused, match="the batch may be axis 1 of 'x': the model runs with these axes swapped"):
        prepared(length_first(mask=True), tmp_path)


def test_outputs_along_the_second_axis_alone_show_the_batch_there(tmp_path: Path) -> None:
    with pytest.raises(BuildRefused, match="the batch may be axis 1 of 'x'"):
        prepared(length_first(pooled=True), tmp_path)


def test_first_axis_that_the_file_names_as_the_batch_stays_the_batch_with_a_warning(tmp_path: Path) -> None:
    bundle, warnings = prepared(length_first(["batch", "seq", 8]), tmp_path)
    assert bundle.manifest.under("proved").max_batch_size == 1
    assert [words for words in warnings if words.startswith("the batch may be axis 1 of 'x'")]


def test_rows_that_mix_on_both_axes_do_not_show_a_swap(tmp_path: Path) -> None:
    bundle, warnings = prepared(few_positions_in_all(600), tmp_path, max_length=64)
    assert not [words for words in warnings if "axis 1" in words]
    assert bundle.manifest.max_batch_size > 1


def test_lengths_that_must_be_multiples_are_refused_with_the_number(tmp_path: Path) -> None:
    with pytest.raises(BuildRefused, match="only on lengths that are multiples of 4 along 'seq'"):
        prepared(in_windows_of(4), tmp_path)
