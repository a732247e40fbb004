"""Rewrites decomposed sites of the plain form to one fused operator. Judges nothing: what is kept is decided elsewhere.

`ai.onnx.Attention` comes first: its kernel reads and writes packed heads in place, and hidden rows are as the graph's
own. It needs opset 23, to which older graphs are converted. `com.microsoft.MultiHeadAttention` stands in where that
cannot be done. Source: ONNX operators, Attention-23; onnxruntime, docs/ContribOperators.md.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnx.version_converter
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from attnserve_server.build.errors import BuildRefused
from attnserve_server.build.graph import checked
from attnserve_server.build.plain import HEADS_FIRST, Carried, MaskStep, PlainSite, constant, extent, plain_sites

ATTENTION, MULTI_HEAD = "ai.onnx.Attention", "com.microsoft.MultiHeadAttention"
OPSET = 23
"""The first with `Attention`."""
_IR_VERSION = 10
"""What a graph of that opset is written as."""
_PENDING = "attnserve.pending"
"""The domain of an operator until its graph has the opset that it needs."""


Attribute = int | float | Sequence[int]
Extent = int | ir.SymbolicDim | None


@dataclass(frozen=True, slots=True)
class Fused:
    """A rewritten copy of a graph: which operator, and how many sites have it now."""

    proto: onnx.ModelProto
    operator: str
    sites: int


def candidates(proto: onnx.ModelProto) -> Iterator[Fused]:
    """Rewritten copies of a graph (inferred shapes), the most promising first; none where no site is plain."""
    for operator, rewrite in ((ATTENTION, _with_attention), (MULTI_HEAD, _with_multi_head)):
        fused = rewrite(proto)
        if fused is not None:
            yield Fused(fused[0], operator, fused[1])


def _with_attention(proto: onnx.ModelProto) -> tuple[onnx.ModelProto, int] | None:
    model = ir.from_proto(proto)
    sites = [site for site in plain_sites(model.graph) if _same_heads(site)]
    if not sites:
        return None
    rewriter = _Rewriter(model.graph)
    for site in sites:
        rewriter.attention(site)
    rewritten = _cleaned(model)
    try:
        rewritten = rewritten if _opset(rewritten) >= OPSET else _converted(rewritten)
        for node in rewritten.graph.node:
            node.domain = "" if node.domain == _PENDING else node.domain
        del rewritten.opset_import[[entry.domain for entry in rewritten.opset_import].index(_PENDING)]
        return checked(rewritten, "the fused graph"), len(sites)
    except (BuildRefused, RuntimeError):  # onnx's converter raises the latter
        return None


def _with_multi_head(proto: onnx.ModelProto) -> tuple[onnx.ModelProto, int] | None:
    model = ir.from_proto(proto)
    sites = [site for site in plain_sites(model.graph) if _multi_head_can(site)]
    if not sites:
        return None
    model.graph.opset_imports.setdefault("com.microsoft", 1)
    rewriter = _Rewriter(model.graph)
    for site in sites:
        rewriter.multi_head(site)
    try:
        return checked(_cleaned(model), "the fused graph"), len(sites)
    except BuildRefused:
        return None


def _same_heads(site: PlainSite) -> bool:
    """Whether query, key and value have as many heads, as far as the graph tells; a product would broadcast them."""
    heads = {one.heads or extent(one.value, 2 if one.heads_last else 1) for one in (site.query, site.key, site.value)}
    return len(heads - {None}) == 1


def _multi_head_can(site: PlainSite) -> bool:
    """All packed, in a type that the kernel has, and no row that it would make NaN where the graph has zeros."""
    carried = (site.query, site.key, site.value)
    typed = all(one.value.dtype in {ir.DataType.FLOAT, ir.DataType.FLOAT16} for one in carried)
    return typed and _packed(site) and _same_heads(site) and not (site.guarded and site.masks)


def _packed(site: PlainSite) -> bool:
    return all(one.packed is not None for one in (site.query, site.key, site.value))


def _opset(proto: onnx.ModelProto) -> int:
    return next((entry.version for entry in proto.opset_import if entry.domain in {"", "ai.onnx"}), 0)


def _cleaned(model: ir.Model) -> onnx.ModelProto:
    RemoveUnusedNodesPass()(model)
    return ir.to_proto(model)


def _converted(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The graph in opset 23. The converter forgets what metadata says, by which sites are named."""
    metadata = {node.output[0]: node.metadata_props for node in proto.graph.node if node.metadata_props}
    converted = onnx.version_converter.convert_version(proto, OPSET)
    converted.ir_version = max(converted.ir_version, _IR_VERSION)
    for node in converted.graph.node:
        if node.output[0] in metadata and not node.metadata_props:
            node.metadata_props.extend(metadata[node.output[0]])
    return converted


class _Rewriter:
    """Puts fused operators into one graph, site after site in the graph's order; what sites share is made once."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._opset = graph.opset_imports.get("", 0)
        self._numbers = itertools.count()
        self._shared: dict[tuple[object, ...], ir.Value] = {}
        self._nodes: list[ir.Node] = []

    def attention(self, site: PlainSite) -> None:
        """`Attention` on packed values where the graph has them, else on (B, H, T, D)."""
        self._graph.opset_imports[_PENDING] = 1
        packed = _packed(site)
        operands = [self._operand(one, packed=packed) for one in (site.query, site.key, site.value)]
        heads = {"q_num_heads": site.query.heads, "kv_num_heads": site.key.heads} if packed else {}
        # The kernel makes rows zero that are hidden by the lowest number as by minus infinity; softmax does not.
        bias = self._bias(site.masks, operands, packed=packed, spare_lowest=True)
        inputs = [*operands, *([bias] if bias is not None else [])]
        self._replace(site, inputs, ("Attention", _PENDING), {**heads, "scale": site.scale}, packed=packed)

    def multi_head(self, site: PlainSite) -> None:
        """`MultiHeadAttention` on packed values."""
        operands = [self._operand(one, packed=True) for one in (site.query, site.key, site.value)]
        bias = self._bias(site.masks, operands, packed=True, spare_lowest=False)
        inputs = [*operands, *([None, None, bias] if bias is not None else [])]
        attributes = {"num_heads": site.query.heads, "scale": site.scale}
        self._replace(site, inputs, ("MultiHeadAttention", "com.microsoft"), attributes, packed=True)

    def _operand(self, carried: Carried, *, packed: bool) -> ir.Value:
        if packed and carried.packed is not None:
            return carried.packed
        if not carried.heads_last:
            return carried.value
        batch, length, *rest = carried.value.shape or [None] * 4
        heads_first = self._op("Transpose", [carried.value], perm=HEADS_FIRST)
        return _typed(heads_first, carried.value.dtype, [batch, rest[0], length, rest[1]])

    def _bias(
        self, masks: Sequence[MaskStep], operands: Sequence[ir.Value], *, packed: bool, spare_lowest: bool
    ) -> ir.Value | None:
        """What all masks together add to the scores, (B or 1, H or 1, L, S); None where there are none."""
        query, key, _ = operands
        dtype = query.dtype or ir.DataType.FLOAT
        lowest = np.finfo(dtype.numpy()).min
        spared = float(np.nextafter(lowest, dtype.numpy().type(0)) if spare_lowest else lowest)
        # Any number this low hides a key; one that swallows the scores also leaves rows of hidden keys uniform.
        swallows = max(float(lowest) / 2, -1e30)
        bias: ir.Value | None = None
        for step in masks:
            value = self._rank_4(step.value)
            if step.fill is None:
                value = value if value.dtype is dtype else self._once("Cast", [value], to=int(dtype))
                bias = value if bias is None else self._once("Add", [bias, value])
                continue
            number = step.fill if np.isinf(step.fill) else max(min(step.fill, swallows), spared)
            fill, shown = self._number(number, dtype), bias if bias is not None else self._number(0, dtype)
            bias = self._once("Where", [value, *((fill, shown) if step.inverted else (shown, fill))])
        added = [step.value for step in masks if step.fill is None]
        if spare_lowest and bias is not None and added and (len(masks) > 1 or _may_hold(added[0], float(lowest))):
            reaches = self._once("Equal", [bias, self._number(float(lowest), dtype)])
            bias = self._once("Where", [reaches, self._number(spared, dtype), bias])
        if bias is None:
            return None
        last = masks[-1].value
        axis = 1 if packed else 2
        if len(masks) == 1 and _spans(last, query, key, axis):
            square = bias
        else:
            ones = self._ints(1, 1)
            lengths = [self._extent(query, axis), self._extent(key, axis)]
            square = self._once("Expand", [bias, self._once("Concat", [ones, *lengths], axis=0)])
        batch, heads = (
            last.shape[:2] if last.shape is not None and len(last.shape) == 4 and len(masks) == 1 else (None,) * 2
        )
        return _typed(square, dtype, [batch, heads, _axis(query, axis), _axis(key, axis)])

    def _rank_4(self, value: ir.Value) -> ir.Value:
        rank = len(value.shape) if value.shape is not None else 4
        if rank >= 4:
            return value
        axes = list(range(4 - rank))
        if self._opset >= 13:
            return self._once("Unsqueeze", [value, self._ints(*axes)])
        return self._once("Unsqueeze", [value], axes=axes)

    def _extent(self, value: ir.Value, axis: int) -> ir.Value:
        """One extent, int64 (1,)."""
        return self._once("Gather", [self._once("Shape", [value]), self._ints(axis)], axis=0)

    def _replace(
        self,
        site: PlainSite,
        inputs: Sequence[ir.Value | None],
        operator: tuple[str, str],
        attributes: dict[str, int | float],
        *,
        packed: bool,
    ) -> None:
        """Let the operator's output stand for weights @ value, and the operator for the softmax that names the site."""
        query, value = site.query, site.value
        output = self._op(operator[0], inputs, operator[1], **attributes)
        fused = self._nodes[-1]
        fused.name = site.softmax.name
        fused.metadata_props.update(site.softmax.metadata_props)
        dtype = site.output.dtype or query.value.dtype
        turned: list[tuple[ir.Value, ir.Value]] = []
        if packed:
            assert query.packed is not None
            batch, length, _ = query.packed.shape or [None] * 3
            _typed(output, dtype, [batch, length, query.heads * value.head_dim])
            parts = self._op("Reshape", [output, self._ints(0, 0, query.heads, value.head_dim)])
            _typed(parts, dtype, [batch, length, query.heads, value.head_dim])
            turned = [
                (node.outputs[0], parts)
                for node in site.output.consumers()
                if node.op_type == "Transpose" and list(node.attributes.get_ints("perm", ())) == HEADS_FIRST
            ]
            output = _typed(
                self._op("Transpose", [parts], perm=HEADS_FIRST), dtype, [batch, query.heads, length, value.head_dim]
            )
        else:
            _typed(output, dtype, list(site.output.shape or [None] * 4))
        product = site.output.producer()
        assert product is not None
        self._graph.insert_after(product, self._nodes)
        self._nodes = []
        for old, new in [*turned, (site.output, output)]:
            _stand_in(old, new)

    def _op(
        self, op_type: str, inputs: Sequence[ir.Value | None], domain: str = "", /, **attributes: Attribute
    ) -> ir.Value:
        name = f"attnserve.fused/{op_type}_{next(self._numbers)}"
        node = ir.node(op_type, inputs, attributes=attributes, domain=domain, outputs=[ir.val(name)], name=name)
        self._nodes.append(node)
        return node.outputs[0]

    def _once(self, op_type: str, inputs: Sequence[ir.Value], **attributes: Attribute) -> ir.Value:
        """One node for all sites that need it: that of the first site stands before the others."""
        known = (op_type, *inputs, *(repr(pair) for pair in attributes.items()))
        if known not in self._shared:
            self._shared[known] = self._op(op_type, inputs, **attributes)
        return self._shared[known]

    def _ints(self, *numbers: int) -> ir.Value:
        return self._constant(np.array(numbers, np.int64))

    def _number(self, number: float, dtype: ir.DataType) -> ir.Value:
        return self._constant(np.array(number, dtype.numpy()))

    def _constant(self, array: np.ndarray) -> ir.Value:
        known = ("constant", str(array.dtype), repr(array.tolist()))
        if known not in self._shared:
            name = f"attnserve.fused.constant_{next(self._numbers)}"
            value = ir.val(name, const_value=ir.tensor(array, name=name))
            _typed(value, ir.DataType.from_numpy(array.dtype), list(array.shape))
            self._graph.register_initializer(value)
            self._shared[known] = value
        return self._shared[known]


def _typed(value: ir.Value, dtype: ir.DataType | None, shape: Sequence[Extent]) -> ir.Value:
    value.type = ir.TensorType(dtype) if dtype is not None else None
    value.shape = ir.Shape(shape)
    return value


def _axis(value: ir.Value, axis: int) -> Extent:
    return value.shape[axis] if value.shape is not None else None


def _spans(mask: ir.Value, query: ir.Value, key: ir.Value, axis: int) -> bool:
    """Whether a mask is known to have a row for every query and a column for every key."""
    if mask.shape is None or len(mask.shape) < 2:
        return False
    pairs = ((mask.shape[-2], _axis(query, axis)), (mask.shape[-1], _axis(key, axis)))
    return all(one == other and not (isinstance(one, ir.SymbolicDim) and one.value is None) for one, other in pairs)


def _may_hold(bias: ir.Value, number: float) -> bool:
    """Whether a bias may hold a number: what is made by choice between two numbers holds those two."""
    node = bias.producer()
    chosen = [constant(one) for one in node.inputs[1:]] if node is not None and node.op_type == "Where" else [None]
    return None in chosen or number in chosen


def _stand_in(old: ir.Value, new: ir.Value) -> None:
    """Let one value take another's place, as an output of the graph too."""
    if old.is_graph_output():
        assert old.name is not None
        old.name, new.name = f"{old.name}.decomposed", old.name
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
