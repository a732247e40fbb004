"""The matrix behind docs/coverage.md: every architecture through every exporter, opset and precision.

`make coverage` runs it and writes the page, unless only some architectures were asked for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import onnx
import pytest
from architectures import TINY, tiny_source
from attnserve_server.build import export
from attnserve_server.build.assemble import assemble, axes_of
from attnserve_server.build.errors import BuildRefused
from attnserve_server.build.feeds import Sampler
from attnserve_server.build.graph import checked
from attnserve_server.build.precision import in_precision
from attnserve_server.build.progress import Steps
from attnserve_server.build.signature import signature_of
from attnserve_server.build.source_model import SourceModel, source_model
from coverage_page import Cell, rendered, settled

pytestmark = pytest.mark.coverage

PAGE = Path(__file__).parents[2] / "docs" / "coverage.md"
EXPORTERS = (("dynamo", 23), ("dynamo", 18), ("torchscript", 17), ("torchscript", 11))
PRECISIONS = ("fp32", "fp16")
# float32 sums in another order than torch's; float16 keeps 11 bits.
WEIGHT_TOLERANCE = {"fp32": 1e-5, "fp16": 1e-2}
OUTPUT_TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2}

UNTYPED = r"Type 'tensor\(int64\)' of input parameter .* of operator \((?:Min|Clip)\) .* is invalid"
"""In opset 11, Min and Clip know no whole numbers, and the older exporter writes them all the same."""
KNOWN: Mapping[tuple[str, str, int, str], str] = {
    (name, "torchscript", 11, precision): UNTYPED
    for name in ("MPNet", "DeBERTa", "Longformer", "T5")
    for precision in PRECISIONS
}
"""Cells that cannot be filled, and words of the reason that they must give."""


@pytest.fixture(scope="module")
def seen() -> dict[str, list[Cell]]:
    """Cells by architecture, filled in by the tests in their order."""
    return {}


@pytest.mark.parametrize("name", TINY)
def test_every_site_is_found_and_equals_eager_attention(name: str, seen: dict[str, list[Cell]], tmp_path: Path) -> None:
    source = source_model(str(tiny_source(tmp_path / "source", name)))
    cells = [cell for exporter, opset in EXPORTERS for cell in _cells(name, source, exporter, opset, tmp_path)]
    seen[name] = cells
    assert not [cell.row() for cell in cells if not _as_it_should_be(cell)]


def test_page_says_what_was_seen(seen: dict[str, list[Cell]]) -> None:
    if list(seen) != list(TINY):
        pytest.skip("only some architectures were run: the page stays as it is")
    cells = [cell for name in TINY for cell in seen[name]]
    assert all(cell.explained for cell in cells)
    said = settled(PAGE.read_text(encoding="utf-8")) if PAGE.exists() else []
    PAGE.write_text(rendered(cells), encoding="utf-8")
    now = settled(rendered(cells))
    assert now == said, f"{PAGE.name} said otherwise and has been written anew; look at it and commit it"


def _cells(name: str, source: SourceModel, exporter: str, opset: int, work: Path) -> list[Cell]:
    """One for each precision of one graph."""
    expected = TINY[name].sites
    try:
        graph = checked(source.to_graph(exporter, opset), name)
    except BuildRefused as fault:
        return [Cell(name, exporter, opset, each, 0, expected, missing=str(fault)) for each in PRECISIONS]
    cells = []
    for precision in PRECISIONS:
        place = work / f"{exporter}-{opset}-{precision}"
        place.mkdir()
        blank = Cell(name, exporter, opset, precision, 0, expected)
        cells.append(_cell(blank, source, graph, place))
    return cells


def _cell(blank: Cell, source: SourceModel, graph: onnx.ModelProto, work: Path) -> Cell:
    identity = (blank.architecture, blank.exporter, blank.opset, blank.precision)
    try:
        proto = checked(in_precision(graph, blank.precision), blank.architecture)  # type: ignore[arg-type]
        sampler = Sampler(signature_of(proto.graph, source.padding_id), vocabulary_sizes=source.vocabulary_sizes)
        assembled = assemble(proto, sampler, work, Steps.silent())
        lengths = {symbol: source.max_lengths[symbol] for symbol in sampler.signature.symbols}
        _axes, padding = axes_of(assembled, lengths, Steps.silent())
        report = export._check(assembled, source, padding)
    except BuildRefused as fault:
        return Cell(*identity, 0, blank.expected, missing=str(fault))
    return Cell(
        *identity,
        found=sum(site.available for site in assembled.sites),
        expected=blank.expected,
        weight_error=report.weight_max_abs_error,
        output_error=report.output_max_abs_error,
        time=report.tapped_over_source_time,
        missing="; ".join(dict.fromkeys(site.unavailable_reason for site in assembled.sites if not site.available)),
    )


def _as_it_should_be(cell: Cell) -> bool:
    known = KNOWN.get((cell.architecture, cell.exporter, cell.opset, cell.precision))
    if known is not None:
        return re.search(known, cell.missing) is not None
    return (
        cell.found == cell.expected
        and cell.weight_error is not None
        and cell.weight_error <= WEIGHT_TOLERANCE[cell.precision]
        and cell.output_error is not None
        and cell.output_error <= OUTPUT_TOLERANCE[cell.precision]
    )
