"""Compares the answers of a tapped graph with a reference: its source model, or the untapped graph itself.

`check_against_source` runs a torch model on one batch; `differences` takes any source's answers to one.
`check_against_itself` needs no source: it compares tapped with untapped outputs, and weights @ value with each
operator's own output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from attnserve_server.attention.bands import band_keys, lay_out
from attnserve_server.conversion.assemble import Assembled
from attnserve_server.conversion.base.errors import BuildRefused, CheckFailed
from attnserve_server.conversion.base.tolerances import CHECK_LENGTHS, check_report, max_abs, row_sum_error
from attnserve_server.conversion.probing.feeds import croppers
from attnserve_server.conversion.probing.runtime import GraphRunner, time_ratio
from attnserve_server.conversion.verify.stability import rounds_by_constants
from attnserve_server.domain.values import Array
from attnserve_server.engine.session import EVERY_OPTIMIZER
from attnserve_server.model.manifest import CheckReport, OutputSpec, SiteSpec


@dataclass(frozen=True, slots=True)
class Reference:
    """The answer of a source to one batch.

    Attributes:
        outputs: by name, (B, ...).
        weights: one (B, H, L, S) array for each site, in the order in which the graph computes the sites; None for a
            site whose weights the source does not return.
    """

    outputs: dict[str, Array]
    weights: list[Array | None]


@dataclass(frozen=True, slots=True)
class Differences:
    """The greatest absolute differences of outputs, of weights, and of the sum of a row of weights from 1."""

    output: float
    weight: float
    row_sum: float


def differences(
    outputs: Sequence[OutputSpec],
    sites: Sequence[SiteSpec],
    found: Mapping[str, Array],
    reference: Reference,
    lengths: Sequence[Mapping[str, int]],
) -> Differences:
    """Compare one padded batch with the source's answers; padding is cropped first.

    Args:
        outputs: those that are compared; one that the source does not give is left out.
        sites: all sites, in order; one without weights in the graph or in the source is left out.
        found: the graph's outputs and weights, by their names, (B, ...) each.
        reference: the source's answers to the same batch.
        lengths: of each sequence, by axis symbol: dynamic, derived and fixed axes.

    Raises:
        CheckFailed: the source has another number of sites.
        IndexError, ValueError: the source's arrays have another number of rows or axes.
    """
    if len(reference.weights) != len(sites):
        raise CheckFailed(
            f"check failed: {len(sites)} sites in the graph, but the source gives {len(reference.weights)} attention "
            "tensors; no bundle was written"
        )
    output = weight = row_sum = 0.0
    for row, own in enumerate(lengths):
        crops = croppers(outputs, {}, own)
        for name, crop in crops.items():
            if name in reference.outputs:
                output = max(output, max_abs(crop(found[name][row]), crop(reference.outputs[name][row])))
        for site in sites:
            expected = reference.weights[site.layer]
            if site.weights_output is None or expected is None:
                continue
            queries, keys = own[site.query_axis], own[site.key_axis]
            weights = over_keys(site, found[site.weights_output][row], queries, keys)
            weight = max(weight, max_abs(weights, expected[row][:, :queries, :keys]))
            row_sum = max(row_sum, row_sum_error(weights))
    return Differences(output, weight, row_sum)


def over_keys(site: SiteSpec, weights: Array, queries: int, keys: int) -> Array:
    """Crop one sequence's weights to (H, L, S), and put the columns of a band where their keys are.

    Args:
        site: whose weights they are.
        weights: (H, L or more, S or more), or (H, L or more, columns of the band).
        queries: L.
        keys: S.
    """
    own = weights[:, :queries]
    if site.band is None or site.whole_rows:
        return own[:, :, :keys]
    return lay_out(own, band_keys(site.band, queries, keys), keys)


def check_against_source(
    assembled: Assembled,
    reference: Callable[[Mapping[str, Array]], Reference],
    architecture: str,
    max_lengths: Mapping[str, int],
    rows: int,
) -> CheckReport:
    """Compare a tapped graph with a torch model, on one padded batch of mixed lengths.

    A graph whose rows change each other's answers still passes: the rows of the model change alike.

    Args:
        assembled: the tapped graph.
        reference: returns the model's own answer to a batch.
        architecture: the class of the model, for the report.
        max_lengths: the greatest length of each axis symbol.
        rows: the greatest batch.

    Raises:
        CheckFailed: the model returns the weights of another number of sites, or a difference is not finite.
        BuildRefused: the tapped graph does not run.
        IndexError, ValueError: as `differences`.
    """
    tapped = GraphRunner(assembled.model_path)
    longest = min(max_lengths.values(), default=max(CHECK_LENGTHS))
    mixed = tuple(min(length, longest) for length in (CHECK_LENGTHS[-rows:] if rows > 1 else CHECK_LENGTHS))
    feeds, lengths = assembled.sampler.mixed(mixed)
    outputs = [spec.name for spec in assembled.outputs]
    found = tapped.run(feeds, [*outputs, *assembled.weights.values()])
    named = [_all_lengths(assembled, own) for own in lengths]
    worst = differences(assembled.outputs, assembled.sites, found, reference(feeds), named)
    return check_report(
        against=f"{architecture} in torch, eager attention",
        lengths=mixed,
        output_max_abs_error=worst.output,
        output_tolerance=assembled.tolerances.output,
        weight_max_abs_error=worst.weight,
        weight_tolerance=assembled.tolerances.weight,
        row_sum_max_abs_error=worst.row_sum,
        tapped_over_source_time=time_ratio(tapped, assembled.source, feeds, outputs),
    )


def _all_lengths(assembled: Assembled, own: Mapping[str, int]) -> dict[str, int]:
    """Return the length of a sequence along every axis: its own ones, derived ones and fixed ones."""
    derived = {symbol: form.length_at(own) for symbol, form in assembled.derived_axes.items()}
    return {**assembled.fixed_axes, **own, **derived}


def check_against_itself(
    assembled: Assembled, max_lengths: dict[str, int], rows: int, *, paddable: bool
) -> CheckReport:
    """Compare tapped with untapped outputs, and weights @ value with each operator's own output.

    The runtime's optimizers may change the rounding of a statically quantized file. Where taps keep them from it, the
    tapped graph answers as the file is written: then the file without optimizers is the reference.

    Args:
        assembled: the graph.
        max_lengths: the greatest length of each axis.
        rows: the most sequences of the batch, which has mixed lengths.
        paddable: whether padding is harmless; else all sequences have one length.

    Raises:
        CheckFailed: a difference is not finite.
        BuildRefused: a graph does not run.
    """
    longest = min(max_lengths.values(), default=max(CHECK_LENGTHS))
    lengths = tuple(min(length, longest) for length in CHECK_LENGTHS[-rows:])
    if not paddable:
        lengths = (lengths[-1],) * len(lengths)
    tapped, by_the_file = GraphRunner(assembled.model_path), "the file itself"
    report = _compared(assembled, assembled, tapped, lengths, by_the_file)
    if _within_tolerance(report) or not rounds_by_constants(assembled):
        return report
    try:
        source, checker = (GraphRunner(each.path, EVERY_OPTIMIZER) for each in (assembled.source, assembled.checker))
        written = replace(assembled, source=source, checker=checker)
        second = _compared(assembled, written, tapped, lengths, f"{by_the_file} without the runtime's optimizers")
    except BuildRefused:
        return report  # some files run only as the runtime rewrites them
    return second if _within_tolerance(second) else report


def _within_tolerance(report: CheckReport) -> bool:
    outputs = report.output_max_abs_error <= report.output_tolerance
    return outputs and report.weight_max_abs_error <= report.weight_tolerance


def _compared(
    assembled: Assembled, reference: Assembled, tapped: GraphRunner, lengths: tuple[int, ...], against: str
) -> CheckReport:
    """Compare a tapped graph with one reference, on one batch of these lengths.

    Args:
        assembled: the graph, whose source it is timed against.
        reference: its source and checker, as they are compared.
        tapped: the opened graph.
        lengths: of the sequences.
        against: what the reference is, for the report.
    """
    feeds, each = assembled.sampler.mixed(lengths)
    outputs = [spec.name for spec in assembled.outputs]
    expected = reference.source.run(feeds, outputs)
    found = tapped.run(feeds, [*outputs, *assembled.weights.values()])
    worst_output = 0.0
    for row, own in enumerate(each):
        for name, crop in croppers(assembled.outputs, {}, own, assembled.derived_axes).items():
            worst_output = max(worst_output, max_abs(crop(found[name][row]), crop(expected[name][row])))
    weights = {name: found[output] for name, output in assembled.weights.items()}
    products = reference.product_errors(weights, feeds)
    sums = [row_sum_error(own) for name, own in weights.items() if assembled.found[name].rows_sum_to_one]
    return check_report(
        against=f"{against}, weights @ value with each operator's own output",
        lengths=lengths,
        output_max_abs_error=worst_output,
        output_tolerance=assembled.tolerances.output,
        weight_max_abs_error=max(products.values(), default=0.0),
        weight_tolerance=assembled.tolerances.output,
        row_sum_max_abs_error=max(sums, default=0.0),
        tapped_over_source_time=time_ratio(tapped, assembled.source, feeds, outputs) if assembled.site_axes else None,
    )
