"""Which versions and operators of ONNX are supported: those that the runtime and the taps know."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import onnx
import onnx.defs

from attnserve_server.conversion.base.errors import BuildRefused

IR_VERSIONS = (3, onnx.IR_VERSION)
"""Before 3, files name no operator set."""
OPSETS = (11, onnx.defs.onnx_opset_version())
"""Taps are written in what operator set 11 has."""
STANDARD = ("", "ai.onnx")
_RUNTIME = "com.microsoft"
_KNOWN_DOMAINS = {*STANDARD, "ai.onnx.ml", _RUNTIME, "com.microsoft.nchwc", "com.ms.internal.nhwc"}
"""Domains whose operators the runtime has; it says for itself which of them it does not know."""
_PACKAGES = {
    "ai.onnx.contrib": "onnxruntime-extensions",
    "com.microsoft.extensions": "onnxruntime-extensions",
    "org.pytorch.aten": "a runtime that holds PyTorch",
    "ai.onnx.training": "a training runtime",
    "ai.onnx.preview.training": "a training runtime",
}


_RUNTIME_HAS_EARLIER = {"LayerNormalization": 17, "SimplifiedLayerNormalization": OPSETS[1] + 1}
"""Operators that the runtime has in the standard domain before the version in which the standard has them, if ever;
its own optimizer writes them into files of any opset."""


def opset_of(proto: onnx.ModelProto) -> int:
    """The version of the standard operator set that a model is written in; 0 where it names none."""
    return max((entry.version for entry in proto.opset_import if entry.domain in STANDARD), default=0)


def refuse_unknown_versions(proto: onnx.ModelProto, name: str) -> None:
    """Raise BuildRefused for versions of the format and of the standard operators that are too old, or too new."""
    oldest, newest = IR_VERSIONS
    if not oldest <= proto.ir_version <= newest:
        raise BuildRefused(f"{name} is of IR version {proto.ir_version}; {oldest} to {newest} are supported")
    versions = {entry.version for entry in proto.opset_import if entry.domain in STANDARD}
    low, high = OPSETS
    if not versions:
        raise BuildRefused(f"{name} names no version of the standard operators; opsets {low} to {high} are supported")
    outside = sorted(version for version in versions if not low <= version <= high)
    if outside:
        raise BuildRefused(f"{name} is of opset {outside[0]}; {low} to {high} are supported")
    if len(versions) > 1:
        raise BuildRefused(f"{name} names two opsets, {min(versions)} and {max(versions)}")


def refuse_unknown_operators(proto: onnx.ModelProto, name: str) -> None:
    """Raise BuildRefused for the first operator, in subgraphs too, of a domain that the runtime does not have."""
    waiting = [proto.graph]
    while waiting:
        for node in waiting.pop().node:
            if node.domain not in _KNOWN_DOMAINS:
                needs = f" (it needs {_PACKAGES[node.domain]})" if node.domain in _PACKAGES else ""
                said = f"{node.op_type!r} of domain {node.domain!r}"
                raise BuildRefused(f"{name} uses the operator {said}, which the runtime does not know{needs}")
            for attribute in node.attribute:
                waiting.extend((*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs))


@contextmanager
def without_what_only_the_runtime_has(proto: onnx.ModelProto) -> Iterator[None]:
    """Within, operators that the standard does not know, and the runtime does, bear the runtime's own domain.

    The library's checker passes over that domain.
    """
    opset = opset_of(proto)
    early = [
        node
        for node in proto.graph.node
        if node.domain in STANDARD and opset < _RUNTIME_HAS_EARLIER.get(node.op_type, 0)
    ]
    domains = [node.domain for node in early]
    added = bool(early) and all(entry.domain != _RUNTIME for entry in proto.opset_import)
    if added:
        proto.opset_import.add(domain=_RUNTIME, version=1)
    try:
        for node in early:
            node.domain = _RUNTIME
        yield
    finally:
        for node, domain in zip(early, domains, strict=True):
            node.domain = domain
        if added:
            del proto.opset_import[-1]
