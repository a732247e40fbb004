"""How far a file with constant quantizers differs from itself by rounding: between optimizers, and between last bits.

A quantizer rounds to steps. A number near a tie is rounded to either neighbour, depending on its last bit, and later
numbers move with it. Runtimes, their optimizers and processors compute other last bits.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx

from attnserve_server.conversion.assemble import Assembled
from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.base.tolerances import CHECK_LENGTHS, max_abs
from attnserve_server.conversion.graphs.reading import quantizes_statically
from attnserve_server.conversion.probing.runtime import GraphRunner
from attnserve_server.conversion.proof.noise import with_other_last_bits
from attnserve_server.engine.session import EVERY_OPTIMIZER
from attnserve_server.model.equality import FLOORS


@contextmanager
def other_last_bits(proto: onnx.ModelProto) -> Iterator[GraphRunner | None]:
    """Open a graph with other last bits of its constants; None where no constant quantizer amplifies these.

    Raises:
        BuildRefused: the runtime cannot load the graph.
    """
    if not quantizes_statically(proto):
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="attnserve-") as folder:
        path = Path(folder) / "moved.onnx"
        path.write_bytes(with_other_last_bits(proto).SerializeToString())
        yield GraphRunner(path)


def rounds_by_constants(assembled: Assembled) -> bool:
    """Whether constant quantizers round in the source, so that the runtime's optimizers may change its answers."""
    return assembled.precision == "int8" and quantizes_statically(onnx.load(assembled.source.path))


def instability(assembled: Assembled, max_lengths: Mapping[str, int]) -> str:
    """Describe how far a statically quantized file differs from itself with and without the runtime's optimizers.

    Args:
        assembled: the tapped graph, and its source.
        max_lengths: the greatest length of each axis of its inputs.

    Returns:
        A warning; empty where the outputs differ by at most a step of 8 bits, or the file has no constant quantizers.

    Raises:
        BuildRefused: the source does not run.
    """
    if not rounds_by_constants(assembled):
        return ""
    lengths = {symbol: min(most, max(CHECK_LENGTHS)) for symbol, most in max_lengths.items()}
    feeds = assembled.sampler.rows(lengths, assembled.sampler.signature.fixed_batch or 2)
    outputs = [spec.name for spec in assembled.outputs]
    try:
        as_written = GraphRunner(assembled.source.path, EVERY_OPTIMIZER).run(feeds, outputs)
    except BuildRefused:
        return ""  # some files run only as the runtime rewrites them
    optimized = assembled.source.run(feeds, outputs)
    worst = 0.0
    for name in outputs:
        finite = np.abs(as_written[name].astype(np.float64))
        greatest = float(finite[np.isfinite(finite)].max(initial=0.0))
        worst = max(worst, max_abs(optimized[name], as_written[name]) / max(greatest, float(np.finfo(np.float32).tiny)))
    if worst <= FLOORS["int8"][0]:
        return ""
    return (
        f"the file differs from itself by {worst:.2g} of its greatest output, with and without the runtime's "
        "optimizers: answers of other tools and processors to it may differ as much"
    )
