"""The matrix behind docs/reference/coverage.md: every architecture through every exporter, opset and precision.

Each is converted, and its attention weights and outputs are compared with the source model's. A site is a place in a
graph that computes attention; the zoo is this project's own small models, one for each pattern of attention.
`make coverage` runs it and writes the page, unless only some architectures are selected.

Needs torch and transformers. A cell fails its test if its sites are not those of the model, or an error exceeds the
tolerance; a cell in `KNOWN`, if it lacks that reason. The page's own test fails if a blank has no reason, or if a
column that is the same on every machine differs from the stored page. It is skipped where only some were run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import onnx
import pytest
from architectures import TINY, tiny_source
from attnserve_server.conversion.assemble import Assembled, assemble
from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.base.steps import Steps
from attnserve_server.conversion.base.tolerances import CHECK_LENGTHS
from attnserve_server.conversion.graphs.reading import checked
from attnserve_server.conversion.inputs.signature import signature_of
from attnserve_server.conversion.precision.choose import PRECISIONS, Precision, in_precision
from attnserve_server.conversion.probing.feeds import Sampler
from attnserve_server.conversion.proof import prove
from attnserve_server.conversion.sources.source import TorchModel, ZooOptions
from attnserve_server.conversion.sources.torch_source import load_model
from attnserve_server.conversion.sources.zoo.model import BUILDERS
from attnserve_server.conversion.verify.certify import certify
from attnserve_server.conversion.verify.compare import check_against_source
from attnserve_server.model.certificate import Verdict
from coverage_page import Cell, rendered, settled

pytestmark = pytest.mark.coverage

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "coverage.md"
ZOO = tuple(f"zoo:{name}" for name in BUILDERS)
EXPORTERS = (("dynamo", 23), ("dynamo", 18), ("torchscript", 17), ("torchscript", 11))
ZOO_EXPORTERS = (("dynamo", 23), ("torchscript", 17))
# float32: the order of sums differs from torch's. float16 keeps 11 bits. int8 is tested on a real model elsewhere: with
# random weights, its tolerance only detects broken graphs.
WEIGHT_TOLERANCE = {"fp32": 1e-5, "fp16": 1e-2, "int8": 1e-1}
OUTPUT_TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2, "int8": 3e-1}

UNTYPED = r"Type 'tensor\(int64\)' of input parameter .* of operator \((?:Min|Clip)\) .* is invalid"
"""In opset 11, Min and Clip do not accept integers, and the TorchScript exporter writes them all the same."""
KNOWN: Mapping[tuple[str, str, int, str], str] = {
    (name, "torchscript", 11, precision): UNTYPED
    for name in ("MPNet", "DeBERTa", "Longformer", "T5")
    for precision in PRECISIONS
}
"""Cells that fail, and a pattern of the reason that they must state."""
ATTACK_SECONDS = 3.0
"""Time limit of the attack on a cell whose masks are finite."""
CHOOSING = "not judged: rounding decides which of two close keys is among the first, and the other one has no weight"
NOT_JUDGED = {("zoo:top-k", "fp16"): CHOOSING, ("zoo:top-k", "int8"): CHOOSING}
"""Cells without a tolerance, because a small difference can cause a large one."""

Filled = dict[str, list[Cell]]


@pytest.fixture(scope="module")
def filled() -> Filled:
    """Cells by architecture. Each test adds those of one."""
    return {}


@pytest.mark.parametrize("name", TINY)
def test_every_site_is_found_and_equals_eager_attention(name: str, filled: Filled, tmp_path: Path) -> None:
    source = load_model(str(tiny_source(tmp_path / "source", name)))
    filled[name] = [cell for each in EXPORTERS for cell in _cells(name, source, *each, tmp_path)]
    assert not [cell.row() for cell in filled[name] if not _as_expected(cell)]


@pytest.mark.parametrize("name", ZOO)
def test_every_site_of_the_zoo_is_found_and_equals_its_definition(name: str, filled: Filled, tmp_path: Path) -> None:
    source = load_model(name, zoo_options=ZooOptions(size="tiny"))
    filled[name] = [cell for each in ZOO_EXPORTERS for cell in _cells(name, source, *each, tmp_path)]
    assert not [cell.row() for cell in filled[name] if not _as_expected(cell)]


def test_page_has_the_measured_cells(filled: Filled) -> None:
    names = [*TINY, *ZOO]
    if list(filled) != names:
        pytest.skip("only some architectures were run: the page is not written")
    cells = [cell for name in names for cell in filled[name]]
    assert not [cell.row() for cell in cells if not cell.explained]
    stored = settled(PAGE.read_text(encoding="utf-8")) if PAGE.exists() else []
    page = rendered(cells)
    PAGE.write_text(page, encoding="utf-8")
    assert settled(page) == stored, f"{PAGE.name} differed and was written again; review and commit it"


def _cells(name: str, source: TorchModel, exporter: str, opset: int, work: Path) -> list[Cell]:
    """Return a cell for each precision of one graph."""
    try:
        graph = checked(source.to_graph(exporter, opset), name)
    except BuildRefused as fault:
        return [Cell(name, exporter, opset, each, 0, 0, note=str(fault)) for each in PRECISIONS]
    expected = TINY[name].sites if name in TINY else _sites(source, graph)
    cells = []
    for precision in PRECISIONS:
        place = work / f"{exporter}-{opset}-{precision}"
        place.mkdir()
        cells.append(_cell(Cell(name, exporter, opset, precision, 0, expected), precision, source, graph, place))
    return cells


def _sites(source: TorchModel, graph: onnx.ModelProto) -> int:
    """Return the number of sites for which the model returns weights."""
    sampler = Sampler(signature_of(graph.graph, source.padding_id), vocabulary_sizes=source.vocabulary_sizes)
    feeds, _lengths = sampler.mixed((9, 5))
    return len(source.reference(feeds).weights)


def _cell(blank: Cell, precision: Precision, source: TorchModel, graph: onnx.ModelProto, work: Path) -> Cell:
    identity = (blank.architecture, blank.exporter, blank.opset, blank.precision)
    try:
        proto = checked(in_precision(graph, precision), blank.architecture)
        sampler = Sampler(signature_of(proto.graph, source.padding_id), vocabulary_sizes=source.vocabulary_sizes)
        assembled = assemble(proto, sampler, work, Steps.silent())
        lengths = {symbol: source.max_lengths[symbol] for symbol in sampler.signature.symbols}
        report = check_against_source(
            assembled, source.reference, source.architecture, lengths, rows=len(CHECK_LENGTHS)
        )
        batching = _batching(assembled, lengths)
    except BuildRefused as fault:
        return Cell(*identity, 0, blank.expected, note=str(fault))
    reasons = [site.unavailable_reason for site in assembled.sites if not site.available]
    return Cell(
        *identity,
        found=sum(site.available for site in assembled.sites),
        expected=blank.expected,
        weight_error=report.weight_max_abs_error,
        output_error=report.output_max_abs_error,
        batching=batching,
        time=report.tapped_over_source_time,
        note="; ".join(dict.fromkeys(reasons)) or NOT_JUDGED.get((blank.architecture, precision), ""),
    )


def _batching(assembled: Assembled, lengths: Mapping[str, int]) -> str:
    """Return the verdict on the batch and on each axis, with a reason if the default policy does not allow batching."""
    proof = prove(
        onnx.load(assembled.model_path),
        assembled.sampler.signature,
        assembled.outputs,
        assembled.sites,
        max_lengths=lengths,
        derived=assembled.derived_axes,
        precision=assembled.precision,
        vocabularies=assembled.sampler.vocabulary_sizes,
    )
    clauses = proof.clauses
    if any(clause.finite_mask for clause in clauses):
        # Only with a finite mask does the default policy depend on the attack.
        steps = Steps.silent()
        done = certify(assembled, lengths, steps, batching="proved", attack_seconds=ATTACK_SECONDS, max_batch_size=4)
        clauses = done.certificate.clauses
    if all(clause.verdict is Verdict.PROVED and clause.allows("proved") for clause in clauses):
        return "proved"
    return "; ".join(
        f"{clause.axis} {clause.status()}" + ("" if clause.allows("proved") else f": {clause.reason}")
        for clause in clauses
    )


def _as_expected(cell: Cell) -> bool:
    known = KNOWN.get((cell.architecture, cell.exporter, cell.opset, cell.precision))
    if known is not None:
        return re.search(known, cell.note) is not None
    if cell.found != cell.expected or cell.weight_error is None or cell.output_error is None:
        return False
    judged = (cell.architecture, cell.precision) not in NOT_JUDGED
    within = (
        cell.weight_error <= WEIGHT_TOLERANCE[cell.precision] and cell.output_error <= OUTPUT_TOLERANCE[cell.precision]
    )
    return within or not judged
