"""Rewritten copies of a graph, with fused operators. Judges nothing: what is kept is decided elsewhere.

`ai.onnx.Attention` comes first: its kernel reads and writes packed heads in place, and takes hidden rows as softmax
with a guard does. It needs opset 23, to which older graphs are converted. `com.microsoft.MultiHeadAttention` stands in
where that cannot be done, or does not pay. Source: ONNX operators, Attention-23; onnxruntime, docs/ContribOperators.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx
import onnx.shape_inference
import onnx.version_converter
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.graphs.reading import checked
from attnserve_server.conversion.rewrite.fuse.carried import extent
from attnserve_server.conversion.rewrite.fuse.packing import PackableSite, packable_sites
from attnserve_server.conversion.rewrite.fuse.plain import PlainSite, plain_sites
from attnserve_server.conversion.rewrite.fuse.rewriter import PENDING, Rewriter, is_packed

ATTENTION, MULTI_HEAD = "ai.onnx.Attention", "com.microsoft.MultiHeadAttention"
OPSET = 23
"""The first with `Attention`."""
_IR_VERSION = 10
"""What a graph of that opset is written as."""


@dataclass(frozen=True, slots=True)
class Fused:
    """A rewritten copy of a graph: which operator, and how many sites were rewritten."""

    proto: onnx.ModelProto
    operator: str
    sites: int


def candidates(proto: onnx.ModelProto) -> Iterator[Fused]:
    """Rewritten copies of a graph (inferred shapes), the most promising first; none where nothing can be rewritten."""
    if not {"Softmax", "Attention"} & {node.op_type for node in proto.graph.node}:
        return
    # Legacy exports compute the shapes that heads are split by; only following those numbers tells how many there are.
    proto = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    for operator, rewrite in ((ATTENTION, _with_attention), (MULTI_HEAD, _with_multi_head)):
        model = ir.from_proto(proto)
        sites = rewrite(model)
        if not sites:
            continue
        RemoveUnusedNodesPass()(model)
        try:
            yield Fused(checked(_settled(ir.to_proto(model)), "the fused graph"), operator, sites)
        except BuildRefused:
            continue


def _with_attention(model: ir.Model) -> int:
    """Rewrite to `Attention`; how many sites."""
    plain = [site for site in plain_sites(model.graph) if _same_heads(site)]
    places: dict[ir.Node | None, PlainSite | PackableSite] = {site.output.producer(): site for site in plain}
    places |= {site.node: site for site in packable_sites(model.graph)}
    rewriter = Rewriter(model.graph)
    for site in [places[node] for node in model.graph if node in places]:
        if isinstance(site, PlainSite):
            rewriter.attention(site)
        else:
            rewriter.packed(site)
    return len(places)


def _with_multi_head(model: ir.Model) -> int:
    """Rewrite to `MultiHeadAttention`; how many sites."""
    places = {site.output.producer(): site for site in plain_sites(model.graph) if _multi_head_can(site)}
    rewriter = Rewriter(model.graph)
    for site in [places[node] for node in model.graph if node in places]:
        rewriter.multi_head(site)
    return len(places)


def _same_heads(site: PlainSite) -> bool:
    """Whether query, key and value have as many heads, as far as the graph tells; a product would broadcast them.

    Where they are not packed, the shapes of query and key must tell, or the fused site could not be tapped.
    """
    carried = (site.query, site.key, site.value)
    told = [extent(one.value, 2 if one.heads_last else 1) for one in carried]
    heads = {one.heads or number for one, number in zip(carried, told, strict=True)}
    return len(heads - {None}) == 1 and (is_packed(site) or None not in told[:2])


def _multi_head_can(site: PlainSite) -> bool:
    """All packed, in a type that the kernel has, and no row that it would make NaN where the graph has zeros."""
    carried = (site.query, site.key, site.value)
    typed = all(one.value.dtype in {ir.DataType.FLOAT, ir.DataType.FLOAT16} for one in carried)
    return typed and is_packed(site) and _same_heads(site) and not (site.guarded and site.masks)


def _settled(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The graph in the opset that its new operators need, and these in the domain where they belong."""
    if PENDING not in {entry.domain for entry in proto.opset_import}:
        return proto
    if next((entry.version for entry in proto.opset_import if entry.domain in {"", "ai.onnx"}), 0) < OPSET:
        proto = _converted(proto)
    del proto.opset_import[[entry.domain for entry in proto.opset_import].index(PENDING)]
    for node in proto.graph.node:
        node.domain = "" if node.domain == PENDING else node.domain
    return proto


def _converted(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The graph in opset 23. The converter forgets what metadata says, by which sites are named.

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
