"""The versions and operators of ONNX that are supported, and what changed between opsets.

The functions `refuse_...` raise BuildRefused for a model that is outside of them; the others raise nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Final

import onnx
import onnx.defs

from attnserve_server.conversion.base.errors import BuildRefused

IR_VERSIONS = (3, onnx.IR_VERSION)
"""Supported IR versions. Files before 3 declare no opset."""
OPSETS = (11, onnx.defs.onnx_opset_version())
"""Supported opsets. Taps need no operator that is newer than 11."""
STANDARD = ("", "ai.onnx")
SINCE: Final[Mapping[str, int]] = {
    "QuantizeLinear with a scale for each row": 13,
    "ReduceMax with axes as input": 18,
    "ReduceMin with axes as input": 18,
    "ReduceSum with axes as input": 13,
    "Reshape with allowzero": 14,
    "Shape with start and end": 15,
    "Softmax over one axis": 13,
    "Unsqueeze with axes as input": 13,
}
"""The opset from which an operator has a feature; before, axes are attributes, and Softmax runs over several axes."""
MICROSOFT = "com.microsoft"
PREVIEW = "ai.onnx.preview"
_KNOWN_DOMAINS = {*STANDARD, "ai.onnx.ml", MICROSOFT, "com.microsoft.nchwc", "com.ms.internal.nhwc"}
"""Domains of operators that the runtime has. Loading the model reports an operator that the runtime does not know."""
_PACKAGES = {
    "ai.onnx.contrib": "onnxruntime-extensions",
    "com.microsoft.extensions": "onnxruntime-extensions",
    "org.pytorch.aten": "a runtime that holds PyTorch",
    "ai.onnx.training": "a training runtime",
    "ai.onnx.preview.training": "a training runtime",
}


_RUNTIME_HAS_EARLIER = {"LayerNormalization": 17, "SimplifiedLayerNormalization": OPSETS[1] + 1}
"""Operators that the runtime has in the standard domain in any opset, and the opset in which the standard has them.
The runtime's optimizer writes them into files of older opsets: findings/optimized_file_is_not_onnx.sh."""


def opset_of(proto: onnx.ModelProto) -> int:
    """Return the version of the standard operator set that a model uses; 0 where it declares none."""
    return max((entry.version for entry in proto.opset_import if entry.domain in STANDARD), default=0)


def refuse_unknown_versions(proto: onnx.ModelProto, name: str) -> None:
    """Raise BuildRefused for an IR version or opset that is not supported, and for two opsets."""
    oldest, newest = IR_VERSIONS
    if not oldest <= proto.ir_version <= newest:
        raise BuildRefused(f"{name} has IR version {proto.ir_version}; {oldest} to {newest} are supported")
    versions = {entry.version for entry in proto.opset_import if entry.domain in STANDARD}
    low, high = OPSETS
    if not versions:
        raise BuildRefused(f"{name} declares no opset of the standard operators; {low} to {high} are supported")
    outside = sorted(version for version in versions if not low <= version <= high)
    if outside:
        raise BuildRefused(f"{name} has opset {outside[0]}; {low} to {high} are supported")
    if len(versions) > 1:
        raise BuildRefused(f"{name} declares two opsets, {min(versions)} and {max(versions)}; it must declare one")


def refuse_unknown_operators(proto: onnx.ModelProto, name: str) -> None:
    """Raise BuildRefused for an operator, in subgraphs too, of a domain that the runtime does not have."""
    waiting = [proto.graph]
    while waiting:
        for node in waiting.pop().node:
            if node.domain not in _KNOWN_DOMAINS:
                needs = f" (it needs {_PACKAGES[node.domain]})" if node.domain in _PACKAGES else ""
                operator = f"{node.op_type!r} of domain {node.domain!r}"
                raise BuildRefused(f"{name} uses the operator {operator}, which the runtime does not know{needs}")
            waiting.extend(subgraphs_of(node))


def subgraphs_of(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """Yield the graphs that a node holds: the branches of If, the bodies of Loop and Scan."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


@contextmanager
def runtime_operators_set_apart(proto: onnx.ModelProto) -> Iterator[None]:
    """Give operators that only the runtime has in this opset the runtime's domain, while the context lasts.

    onnx's checker does not check that domain.
    """
    opset = opset_of(proto)
    early = [
        node
        for node in proto.graph.node
        if node.domain in STANDARD and opset < _RUNTIME_HAS_EARLIER.get(node.op_type, 0)
    ]
    domains = [node.domain for node in early]
    added = bool(early) and all(entry.domain != MICROSOFT for entry in proto.opset_import)
    if added:
        proto.opset_import.add(domain=MICROSOFT, version=1)
    try:
        for node in early:
            node.domain = MICROSOFT
        yield
    finally:
        for node, domain in zip(early, domains, strict=True):
            node.domain = domain
        if added:
            del proto.opset_import[-1]
