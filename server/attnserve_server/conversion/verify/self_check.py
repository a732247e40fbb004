"""The check that needs no source but the graph itself: tapped against untapped, and weights against what they weigh."""

from __future__ import annotations

from attnserve_server.conversion.assemble import Assembled
from attnserve_server.conversion.base.tolerances import CHECK_LENGTHS, reported, row_sum_error
from attnserve_server.conversion.probing.probe import croppers, max_abs
from attnserve_server.conversion.probing.runtime import GraphRunner, time_ratio
from attnserve_server.model.manifest import CheckReport


def check_against_itself(
    assembled: Assembled, max_lengths: dict[str, int], rows: int, *, paddable: bool
) -> CheckReport:
    """Tapped against untapped, and weights @ value against each operator's own output.

    On mixed lengths in one padded batch; sequences of one length where padding is not harmless, and at most `rows`.
    """
    longest = min(max_lengths.values(), default=max(CHECK_LENGTHS))
    lengths = tuple(min(length, longest) for length in CHECK_LENGTHS[-rows:])
    if not paddable:
        lengths = (lengths[-1],) * len(lengths)
    feeds, each = assembled.sampler.mixed(lengths)
    tapped = GraphRunner(assembled.model_path)
    outputs = [spec.name for spec in assembled.outputs]
    expected = assembled.source.run(feeds, outputs)
    found = tapped.run(feeds, [*outputs, *assembled.weights.values()])
    worst_output = 0.0
    for row, own in enumerate(each):
        for name, crop in croppers(assembled.outputs, {}, own, assembled.derived_axes).items():
            worst_output = max(worst_output, max_abs(crop(found[name][row]), crop(expected[name][row])))
    weights = {name: found[output] for name, output in assembled.weights.items()}
    products = assembled.product_errors(weights, feeds)
    sums = [row_sum_error(own) for name, own in weights.items() if assembled.found[name].rows_sum_to_one]
    return reported(
        against="the file itself, weights @ value with each operator's own output",
        lengths=lengths,
        output_max_abs_error=worst_output,
        output_tolerance=assembled.tolerances.output,
        weight_max_abs_error=max(products.values(), default=0.0),
        weight_tolerance=assembled.tolerances.output,
        row_sum_max_abs_error=max(sums, default=0.0),
        tapped_over_source_time=time_ratio(tapped, assembled.source, feeds, outputs) if assembled.site_axes else None,
    )
