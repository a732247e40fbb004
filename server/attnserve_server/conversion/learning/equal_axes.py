"""Nameless axes that must be equal, found by running: a file that names none of them says so in no other way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice, product
from pathlib import Path

import onnx
import onnx_ir as ir

from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.graphs.reading import save
from attnserve_server.conversion.inputs.signature import Signature
from attnserve_server.conversion.probing.feeds import Sampler
from attnserve_server.conversion.probing.probe import probe_lengths
from attnserve_server.conversion.probing.runtime import GraphRunner

_MOST_TRIES, _MOST_SYMBOLS = 64, 6


def with_equal_axes(proto: onnx.ModelProto, signature: Signature, work: Path) -> Signature:
    """The signature, in which nameless axes that only run when they are equal share a symbol.

    Axes that the file names keep their names: two names say that they differ. The signature as it is where it runs
    already, or where no way is found in a few tries.

    Args:
        proto: the graph.
        signature: of the graph.
        work: a folder for a file.
    """
    named = {axis.dim_param for value in proto.graph.input for axis in value.type.tensor_type.shape.dim}
    nameless = [symbol for symbol in signature.symbols if symbol not in named]
    if not nameless or not 2 <= len(signature.symbols) <= _MOST_SYMBOLS:
        return signature
    path = work / "nameless.onnx"
    save(ir.from_proto(proto), path)
    runner = GraphRunner(path)
    for candidate in islice(_candidates(signature, nameless), _MOST_TRIES):
        if _runs(runner, candidate):
            return candidate
    return signature


def _candidates(signature: Signature, nameless: Sequence[str]) -> Iterator[Signature]:
    """The signature itself, and those with nameless axes taken for one that stands before them; few such first."""
    before = {symbol: signature.symbols[: signature.symbols.index(symbol)] for symbol in nameless}
    ways = [
        dict(zip(nameless, way, strict=True)) for way in product(*((symbol, *before[symbol]) for symbol in nameless))
    ]
    for way in sorted(ways, key=lambda way: sum(symbol != name for symbol, name in way.items())):
        if any(way.get(name, name) != name for name in way.values()):
            continue  # the same, by way of an axis that is taken for another itself
        inputs = tuple(
            spec.model_copy(update={"shape": tuple(way.get(str(extent), extent) for extent in spec.shape)})
            for spec in signature.inputs
        )
        symbols = tuple(symbol for symbol in signature.symbols if way.get(symbol, symbol) == symbol)
        yield replace(signature, inputs=inputs, symbols=symbols)


def _runs(runner: GraphRunner, signature: Signature) -> bool:
    sampler = Sampler(signature)
    try:
        for lengths in probe_lengths(signature.symbols):
            runner.run(sampler.batch([sampler.sequence(lengths)], lengths), runner.output_names)
    except BuildRefused:
        return False
    return True
