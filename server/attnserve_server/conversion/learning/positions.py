"""Learns by running a graph whether a server may number its positions from 0, where a request sends none.

A decoder of text numbers positions from 0; an encoder may not: RoBERTa begins with 2. A graph is a decoder if a token
changes later answers and no earlier ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
import onnx
import onnx_ir as ir

from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.base.tolerances import Tolerances, max_abs
from attnserve_server.conversion.graphs.reading import precision_of, save
from attnserve_server.conversion.inputs.roles import is_position
from attnserve_server.conversion.inputs.signature import Signature, with_counted_positions
from attnserve_server.conversion.probing.feeds import Sampler
from attnserve_server.conversion.probing.runtime import GraphRunner
from attnserve_server.domain.values import Array
from attnserve_server.model.manifest import InputRole

_LENGTH: Final = 7
"""The length of the sequence. Every other dynamic axis has another one."""
_OTHER_LENGTH: Final = 9
_ROUNDING: Final = 0.2
"""Where a file rounds, a token changes earlier answers by at most this share of what it changes later ones."""
_CHANGED: Final = (2, 4)
"""Places of the tokens that are changed, one after the other."""


def with_learnt_positions(proto: onnx.ModelProto, signature: Signature, work: Path) -> Signature:
    """Return the signature with positions that the server numbers, if the graph has some and is a decoder.

    Args:
        proto: the graph.
        signature: of the graph.
        work: a folder for a file.

    Raises:
        BuildRefused: the runtime cannot load the graph.
    """
    counted = with_counted_positions(signature)
    axes = {spec.shape for spec in signature.inputs if spec.role is InputRole.TOKEN_IDS}
    if counted == signature or not all(spec.shape in axes for spec in signature.inputs if is_position(spec.name)):
        return signature
    path = work / "positions.onnx"
    save(ir.from_proto(proto), path)
    return counted if _is_decoder(GraphRunner(path), signature, precision_of(proto)) else signature


def _is_decoder(runner: GraphRunner, signature: Signature, precision: str) -> bool:
    """Whether tokens change later answers and no earlier ones; False if the graph does not run.

    Where a file rounds, a token may change the rounding of earlier answers, but far less than it changes later ones.
    """
    ids = next(spec for spec in signature.inputs if spec.role is InputRole.TOKEN_IDS)
    lengths = {symbol: _OTHER_LENGTH + place for place, symbol in enumerate(signature.symbols)}
    lengths[str(ids.shape[0])] = _LENGTH
    feeds = {name: array[None] for name, array in Sampler(signature).sequence(lengths, 0).items()}
    try:
        before, *after = (
            runner.run({**feeds, ids.name: _changed(feeds[ids.name], at)}, runner.output_names, tap=False)
            for at in (None, *_CHANGED)
        )
    except BuildRefused:
        return False
    answers = {
        name: array for name, array in before.items()
        if array.dtype.kind == "f" and array.ndim > 1 and array.shape[1] == _LENGTH
    }  # fmt: skip
    greatest = max((float(np.abs(array).max(initial=0.0)) for array in answers.values()), default=0.0)
    tolerance = Tolerances.of(precision).neighbours * greatest
    for at, found in zip(_CHANGED, after, strict=True):
        earlier = max((max_abs(array[:, :at], found[name][:, :at]) for name, array in answers.items()), default=np.inf)
        later = max(
            (max_abs(array[:, at + 1 :], found[name][:, at + 1 :]) for name, array in answers.items()), default=0.0
        )
        allowed = tolerance if precision == "fp32" else _ROUNDING * later
        if not earlier <= allowed or not later > tolerance:
            return False
    return True


def _changed(ids: Array, at: int | None) -> Array:
    """Return ids (1, T) with another token of the same sequence at a place; unchanged for None."""
    if at is None:
        return ids
    changed = ids.copy()
    changed[0, at] = next((each for each in ids[0] if each != ids[0, at]), ids[0, at])
    return changed
