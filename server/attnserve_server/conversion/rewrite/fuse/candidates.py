"""Copies of a graph in which attention is rewritten to a fused operator. choose/fusion.py decides which one is kept.

`ai.onnx.Attention` is the first choice: its kernel reads and writes packed heads in place, and treats fully masked rows
as a guarded softmax does. It needs opset 23, to which older graphs are converted. `com.microsoft.MultiHeadAttention` is
the second, for graphs that cannot be converted or are not faster. Source: ONNX operators, Attention-23; onnxruntime,
docs/ContribOperators.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import onnx
import onnx.shape_inference
import onnx.version_converter
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.graphs.operators import STANDARD, opset_of
from attnserve_server.conversion.graphs.reading import checked
from attnserve_server.conversion.graphs.walk import dimension_of
from attnserve_server.conversion.rewrite.fuse.heads import PackableSite, packable_sites
from attnserve_server.conversion.rewrite.fuse.plain import PlainSite, plain_sites
from attnserve_server.conversion.rewrite.fuse.rewriter import PENDING, Rewriter, is_packed

ATTENTION, MULTI_HEAD = "ai.onnx.Attention", "com.microsoft.MultiHeadAttention"
OPSET = 23
"""The first opset with `Attention`."""
_IR_VERSION = 10
"""The IR version of that opset."""


@dataclass(frozen=True, slots=True)
class Fused:
    """A rewritten copy of a graph.

    Attributes:
        proto: the copy.
        operator: the fused operator.
        sites: how many sites were rewritten.
        unfused: the other decomposed sites by name, and why they were not.
    """

    proto: onnx.ModelProto
    operator: str
    sites: int
    unfused: Mapping[str, str]


def candidates(proto: onnx.ModelProto) -> Iterator[Fused]:
    """Yield rewritten copies of a graph (inferred shapes), the most promising first; none where no site can be.

    A copy that is not valid, or cannot be converted to the opset that it needs, is left out.
    """
    if not {"Softmax", "Attention"} & {node.op_type for node in proto.graph.node}:
        return
    proto = _with_computed_shapes(proto)
    for operator, rewrite in ((ATTENTION, _with_attention), (MULTI_HEAD, _with_multi_head)):
        model = ir.from_proto(proto)
        sites, unfused = rewrite(model)
        if not sites:
            continue
        RemoveUnusedNodesPass()(model)
        try:
            fused = checked(_in_final_opset(ir.to_proto(model)), "the fused graph")
        except BuildRefused:
            continue
        yield Fused(fused, operator, sites, unfused)


def unfused_sites(proto: onnx.ModelProto) -> dict[str, str]:
    """Return, for a graph without candidates, why each decomposed site stays as it is, by name."""
    plain, reasons = _readable(ir.from_proto(_with_computed_shapes(proto)).graph)
    no_conversion = f"the graph cannot be converted to opset {OPSET}, which Attention needs"
    for name, site in plain.items():
        other = _not_multi_head(site) or "the graph with MultiHeadAttention is not valid"
        reasons[name] = f"{no_conversion}; {other}"
    return reasons


def _with_computed_shapes(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Infer shapes through the nodes that compute them, by which older exports state how many heads there are."""
    return onnx.shape_inference.infer_shapes(proto, data_prop=True)


def _readable(graph: ir.Graph) -> tuple[dict[str, PlainSite], dict[str, str]]:
    """Return the sites that `Attention` can replace, and, for every other decomposed site, the reason."""
    plain, reasons = plain_sites(graph)
    for name, site in plain.items():
        if reason := _uneven_heads(site):
            reasons[name] = reason
    return {name: site for name, site in plain.items() if name not in reasons}, reasons


def _with_attention(model: ir.Model) -> tuple[int, dict[str, str]]:
    """Rewrite to `Attention`; return how many sites, and why the others are not."""
    plain, reasons = _readable(model.graph)
    places: dict[ir.Node | None, PlainSite | PackableSite] = {site.output.producer(): site for site in plain.values()}
    places |= {site.node: site for site in packable_sites(model.graph)}
    rewriter = Rewriter(model.graph)
    for site in [places[node] for node in model.graph if node in places]:
        if isinstance(site, PlainSite):
            rewriter.attention(site)
        else:
            rewriter.packed(site)
    return len(places), reasons


def _with_multi_head(model: ir.Model) -> tuple[int, dict[str, str]]:
    """Rewrite to `MultiHeadAttention`; return how many sites, and why the others are not."""
    plain, reasons = _readable(model.graph)
    for name, site in plain.items():
        if reason := _not_multi_head(site):
            reasons[name] = reason
    places = {site.output.producer(): site for name, site in plain.items() if name not in reasons}
    rewriter = Rewriter(model.graph)
    for site in [places[node] for node in model.graph if node in places]:
        rewriter.multi_head(site)
    return len(places), reasons


def _uneven_heads(site: PlainSite) -> str:
    """Return why the heads of query, key and value do not allow a fused operator; a MatMul would broadcast them.

    Of operands that are not packed, the shapes of query and key must state the heads, or no tap could read the site.
    """
    operands = (site.query, site.key, site.value)
    stated = [dimension_of(one.value, 2 if one.heads_last else 1) for one in operands]
    heads = [one.heads or number for one, number in zip(operands, stated, strict=True)]
    if len({*heads} - {None}) > 1:
        return f"its query, key and value have different numbers of heads: {', '.join(map(str, heads))}"
    if not {*heads} - {None} or (not is_packed(site) and None in stated[:2]):
        return "the number of its heads is not in the graph"
    return ""


def _not_multi_head(site: PlainSite) -> str:
    """Return why `MultiHeadAttention` cannot replace a site that `Attention` can."""
    operands = (site.query, site.key, site.value)
    if not all(one.value.dtype in {ir.DataType.FLOAT, ir.DataType.FLOAT16} for one in operands):
        return "MultiHeadAttention computes in float32 and float16 only"
    if not is_packed(site):
        return "its query, key and value are not split from packed values"
    if site.guarded and site.masks:
        return "MultiHeadAttention gives NaN in fully masked rows, which the graph sets to 0"
    return ""


def _in_final_opset(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return the graph in the opset that its new operators need, and these in the standard domain."""
    if PENDING not in {entry.domain for entry in proto.opset_import}:
        return proto
    if opset_of(proto) < OPSET:
        proto = _converted(proto)
    del proto.opset_import[[entry.domain for entry in proto.opset_import].index(PENDING)]
    for node in proto.graph.node:
        node.domain = STANDARD[0] if node.domain == PENDING else node.domain
    return proto


def _converted(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return the graph in opset 23, with the metadata that names sites, which the converter drops.

    Raises:
        BuildRefused: it cannot be converted.
    """
    metadata = {node.output[0]: node.metadata_props for node in proto.graph.node if node.metadata_props}
    try:
        converted = onnx.version_converter.convert_version(proto, OPSET)
    except Exception as fault:  # the boundary to onnx, which raises many types here
        raise BuildRefused("the graph cannot be converted to the opset of its new operators") from fault
    converted.ir_version = max(converted.ir_version, _IR_VERSION)
    for node in converted.graph.node:
        if node.output[0] in metadata and not node.metadata_props:
            node.metadata_props.extend(metadata[node.output[0]])
    return converted
