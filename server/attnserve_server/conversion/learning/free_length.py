"""Files whose text input was exported with one fixed length: found, by running, not to need it.

Many graphs compute all that depends on the length, and only declare it. Freed of that, such a graph takes any text; it
is used where it answers short texts as the file answers them when they are padded to its length and masked.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.base.tolerances import Tolerances
from attnserve_server.conversion.graphs.reading import checked, precision_of, save
from attnserve_server.conversion.inputs.roles import is_position
from attnserve_server.conversion.inputs.signature import SEQUENCE, Signature, signature_of
from attnserve_server.conversion.probing.feeds import Sampler
from attnserve_server.conversion.probing.probe import max_abs
from attnserve_server.conversion.probing.runtime import GraphRunner
from attnserve_server.domain.values import Array
from attnserve_server.model.manifest import InputRole

_TRIED = (3, 7)
"""Lengths, beside the file's own."""


def with_free_length(proto: onnx.ModelProto, signature: Signature, work: Path) -> tuple[onnx.ModelProto, int] | None:
    """The graph with a dynamic length of text, and the length that it was exported with.

    None where the length is not fixed, or is needed, or cannot be padded to since no mask tells what is padding.

    Args:
        proto: the graph.
        signature: of the graph.
        work: a folder for files.
    """
    ids = [spec for spec in signature.inputs if spec.role is InputRole.TOKEN_IDS]
    masks = [spec.shape for spec in signature.inputs if spec.role is InputRole.ATTENTION_MASK]
    if len(ids) != 1 or not isinstance(ids[0].shape[0], int) or ids[0].shape not in masks:
        return None
    length = ids[0].shape[0]
    along = {
        spec.name
        for spec in signature.inputs
        if spec.shape == (length,) and (spec.role is not InputRole.DATA or is_position(spec.name))
    }
    freed = _freed(proto, along, length)
    try:
        freed = checked(freed, "the file")
        same = _answers_alike(proto, freed, int(ids[0].padding), length, work)
    except BuildRefused:
        return None
    return (freed, length) if same else None


def _freed(proto: onnx.ModelProto, inputs: set[str], length: int) -> onnx.ModelProto:
    freed = onnx.ModelProto()
    freed.CopyFrom(proto)
    del freed.graph.value_info[:]
    for value in freed.graph.input:
        if value.name in inputs:
            value.type.tensor_type.shape.dim[1].dim_param = SEQUENCE
    for value in freed.graph.output:
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_value == length:
                axis.Clear()
    return freed


def _answers_alike(proto: onnx.ModelProto, freed: onnx.ModelProto, padding_id: int, length: int, work: Path) -> bool:
    """Whether short texts are answered as by the file, padded to its length and cropped."""
    paths = work / "fixed.onnx", work / "freed.onnx"
    for path, graph in zip(paths, (proto, freed), strict=True):
        save(ir.from_proto(graph), path)
    fixed, free = (GraphRunner(path) for path in paths)
    sampler = Sampler(signature_of(freed.graph, padding_id))
    tolerance = Tolerances.of(precision_of(proto)).company
    for own in (*(tried for tried in _TRIED if tried < length), length):
        sequence = sampler.sequence({SEQUENCE: own})
        expected = fixed.run(sampler.batch([sequence], {SEQUENCE: length}), fixed.output_names)
        found = free.run(sampler.batch([sequence], {SEQUENCE: own}), free.output_names)
        if any(_error(found[name], expected[name]) > tolerance for name in found):
            return False
    return True


def _error(found: Array, expected: Array) -> float:
    if found.ndim != expected.ndim or any(one > other for one, other in zip(found.shape, expected.shape, strict=True)):
        return float("inf")
    cropped = expected[tuple(slice(extent) for extent in found.shape)]
    wide = np.abs(np.nan_to_num(cropped.astype(np.float64), posinf=0.0, neginf=0.0))
    return max_abs(found, cropped) / max(1.0, float(wide.max(initial=0.0)))
