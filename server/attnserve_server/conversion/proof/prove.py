"""Prove, or refute, that padding and batch neighbours cannot change an answer: a verdict for each output and each tap.

Why `proved` is sound: take two runs of the graph, of a sequence alone and of the same sequence in a batch (or
padded to any length). By induction over the nodes in order, the statement of `Value` holds for every value in both
runs. It holds for the inputs, by the definition of a batch and of padding (`given`). Each rule keeps it: if it holds
for a node's inputs, it holds for its outputs. A node without a rule yields `unknown`, and so does a case that a rule
does not cover. So an output whose standing is EQUAL has the same elements, in the sequence's own part, in both runs, up
to the rounding of kernels that sum in another order. The attack measures that rounding.

Assumptions:
- Requests meet the `MaskNeed`s; the server runs others without padding.
- Arithmetic of finite numbers stays finite. Infinities and NaN come only from operators that make them
  (`Interval.wild`).
- The score of a real key is far above -1e30 (-6e4 in fp16), so a mask this low leaves a padded key no weight.
- Onnxruntime's fused attention kernels give finite rows where a mask leaves no key.
- Positions and sizes that an fp16 graph computes in fp16 stay below 2048, up to which they are exact.

A tap is the nodes of the graph that return attention weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import onnx
import onnx.inliner
import onnx_ir as ir

from attnserve_server.conversion.inputs.signature import Signature
from attnserve_server.conversion.proof.context import Context
from attnserve_server.conversion.proof.given import allowed_value, size_of_formula, symbol_size, values_of_inputs
from attnserve_server.conversion.proof.interpret import Interpreter
from attnserve_server.conversion.proof.layout import Axis, Layout, is_plain, ordinals
from attnserve_server.conversion.proof.paths import path_of
from attnserve_server.conversion.proof.sizes import Size, floor_div
from attnserve_server.conversion.proof.values import Cause, Standing, Value
from attnserve_server.model.certificate import Clause, MaskNeed, PathStep, Verdict
from attnserve_server.model.equality import FLOORS
from attnserve_server.model.formula import Formula
from attnserve_server.model.manifest import BATCH, NUMPY_DTYPES, Following, OutputSpec, SiteSpec

_VERDICTS = {
    Standing.EQUAL: Verdict.PROVED,
    Standing.ASSUMED: Verdict.UNKNOWN,
    Standing.UNKNOWN: Verdict.UNKNOWN,
    Standing.DIFFERENT: Verdict.REFUTED,
}
_LENGTHS_OF = ("kernel_shape", "strides", "dilations", "local_window_size", "block_size")
"""Attributes whose numbers the attack straddles."""
_SHORTEST, _LONGEST = 2, 1 << 16


@dataclass(frozen=True, slots=True)
class Proof:
    """The verdicts, and what the attack aims at."""

    clauses: tuple[Clause, ...]
    """One for the batch, then one for each symbol of the signature."""
    masks: tuple[MaskNeed, ...] = ()
    """What the clauses assume of requests."""
    causal_sites: frozenset[str] = frozenset()
    """Sites where it is proved that no query attends to a key behind it."""
    thresholds: tuple[int, ...] = ()
    """Lengths that the attack straddles: numbers that the graph compares with, strides, widths of windows."""


@dataclass(frozen=True, slots=True)
class _Target:
    """An output or a tap, with its axes behind the first: symbols, numbers, or None for any plain axis."""

    name: str
    axes: tuple[str | int | None, ...]


@dataclass(frozen=True, slots=True)
class _Question:
    """One graph, and everything that its interpretation needs."""

    graph: ir.Graph
    opset: int
    signature: Signature
    targets: tuple[_Target, ...]
    max_lengths: Mapping[str, int]
    derived: Mapping[str, Following]
    precision: str
    vocabularies: Mapping[str, int]


def prove(
    proto: onnx.ModelProto,
    signature: Signature,
    outputs: Sequence[OutputSpec],
    sites: Sequence[SiteSpec],
    *,
    max_lengths: Mapping[str, int] = MappingProxyType({}),
    derived: Mapping[str, Following] = MappingProxyType({}),
    precision: str = "fp32",
    vocabularies: Mapping[str, int] = MappingProxyType({}),
) -> Proof:
    """Interpret a tapped graph from its inputs to its outputs, once for the batch and once for each symbol.

    Args:
        proto: The tapped graph.
        signature: Its inputs, without the taps'.
        outputs: The outputs that are served.
        sites: All sites. Unavailable ones are skipped.
        max_lengths: The greatest length of each symbol, in positions.
        derived: The forms of symbols that no input has.
        precision: The precision that the graph computes in: `fp32`, `fp16`, `bf16` or `int8`, else KeyError. It decides
            what is equal.
        vocabularies: The number of ids of each input of token ids, where the signature has none.

    Returns:
        The clauses, the mask needs, the causal sites and the thresholds. What cannot be proved is a verdict: an
        unsupported operator raises nothing.
    """
    if proto.functions:
        proto = onnx.inliner.inline_local_functions(proto)
    model = ir.from_proto(proto)
    targets = [_Target(spec.name, spec.shape) for spec in outputs]
    for site in sites:
        if site.weights_output is not None:
            query, key = site.weight_axes
            shape = (site.heads, query or None, key or None)
            targets.append(_Target(site.weights_output, shape))
            if site.scores_output is not None:
                targets.append(_Target(site.scores_output, shape))
    question = _Question(
        model.graph,
        model.opset_imports.get("", 23),
        signature,
        tuple(targets),
        max_lengths,
        derived,
        precision,
        vocabularies,
    )
    clauses: list[Clause] = []
    needs: dict[str, MaskNeed] = {}
    causal: set[str] = set()
    thresholds = set(_lengths_in(model.graph))
    for varied in (BATCH, *signature.symbols):
        clause, ctx, values = _clause(question, varied)
        clauses.append(clause)
        thresholds |= ctx.thresholds
        if clause.verdict is not Verdict.REFUTED:
            for name, need in _needs(question, ctx):
                wider = need == "all" or (name in needs and needs[name].need == "all")
                allowed = ctx.mask_values.get(name)
                needs[name] = MaskNeed(input=name, need="all" if wider else "some", allowed_value=allowed)
        causal |= {site.name for site in sites if _is_causal(site, varied, question, values)}
    aimed = tuple(sorted(number for number in thresholds if _SHORTEST <= number <= _LONGEST))
    return Proof(tuple(clauses), tuple(needs[name] for name in sorted(needs)), frozenset(causal), aimed)


def _needs(question: _Question, ctx: Context) -> Iterator[tuple[str, str]]:
    """Yield the mask needs of one clause, also of masks whose numbers were only assumed to be 0 and 1."""
    found = dict(ctx.needs)
    relations = question.signature.relations
    varying = {ctx.varied, *(symbol for symbol, formula in relations.items() if ctx.varied in formula.symbols)}
    for spec in question.signature.inputs:
        allowed = allowed_value(spec)
        hides = not varying.isdisjoint(spec.shape) and allowed is not None and not math.isnan(allowed)
        if hides and NUMPY_DTYPES[spec.dtype] != np.bool_:
            found.setdefault(spec.name, "some")
    yield from found.items()


def _clause(question: _Question, varied: str) -> tuple[Clause, Context, Mapping[ir.Value, Value]]:
    """Return the verdict on one axis. Bounds of scores are computed only where a finite mask needs them."""
    for bounds in (False, True):
        ctx, values = _followed(question, varied, bounds=bounds)
        found = {target.name: _judged(question, ctx, target, values) for target in question.targets}
        worst = max((standing for standing, _ in found.values()), default=Standing.EQUAL)
        if worst is not Standing.ASSUMED:
            break
    verdicts = {name: _VERDICTS[standing] for name, (standing, _) in found.items()}
    if worst is Standing.EQUAL:
        return Clause(axis=varied, verdict=Verdict.PROVED, targets=verdicts), ctx, values
    name = next(name for name, (standing, _) in found.items() if standing is worst)
    cause = found[name][1] or Cause("", "", "no cause is known")
    outputs = {str(value.name): value for value in question.graph.outputs}
    path: tuple[PathStep, ...] = ()
    if name in outputs:
        path = path_of(question.graph, cause, outputs[name], values, others=ctx.others)
    where = f" (node {cause.node}, {cause.operator})" if cause.node else ""
    clause = Clause(
        axis=varied,
        verdict=_VERDICTS[worst],
        reason=f"{cause.reason}{where}",
        path=path,
        targets=verdicts,
        finite_mask=worst is Standing.ASSUMED,
    )
    return clause, ctx, values


def _followed(question: _Question, varied: str, *, bounds: bool) -> tuple[Context, Mapping[ir.Value, Value]]:
    length = question.max_lengths.get(varied, math.inf)
    ctx = Context(
        varied=varied,
        lengths=question.max_lengths,
        precision=question.precision,
        weight_tolerance=FLOORS[question.precision][1],
        opset=question.opset,
        own_size=symbol_size(varied, length),
        bounds=bounds,
    )
    interpreter = Interpreter(ctx)
    given = values_of_inputs(ctx, question.graph, question.signature, question.vocabularies)
    interpreter.run(question.graph, given)
    return ctx, interpreter.values


def _judged(
    question: _Question, ctx: Context, target: _Target, values: Mapping[ir.Value, Value]
) -> tuple[Standing, Cause | None]:
    """Return the standing of one target. Its axes must be those by which the server crops it."""
    output = next((value for value in question.graph.outputs if value.name == target.name), None)
    if output is None or output not in values:
        return Standing.UNKNOWN, Cause("", "", f"the graph has no output {target.name}")
    ctx.node = output.producer()
    value = ctx.as_data(values[output])
    if value.layout is None:
        return max(value.standing, Standing.UNKNOWN), value.cause or ctx.cause("its axes are not known")
    if value.standing is Standing.DIFFERENT:
        return value.standing, value.cause
    why = _misplaced(question, ctx, target, value.axes)
    if why:
        return Standing.UNKNOWN, ctx.cause(why)
    return value.standing, value.cause


def _misplaced(question: _Question, ctx: Context, target: _Target, layout: Layout) -> str:
    """Return why the sequence's own part is not where the server crops it, or an empty string."""
    if len(layout) != len(target.axes) + 1:
        return f"it has {len(layout)} axes, where {len(target.axes) + 1} are declared"
    if ctx.is_batch:
        if question.signature.fixed_batch:
            return ""
        first = len(layout[0]) == 1 and layout[0][0].varies
        plain_rest = all(is_plain(axis) for axis in layout[1:])
        return "" if first and plain_rest else "its first axis is not the batch"
    for at, (axis, declared) in enumerate(zip(layout, (None, *target.axes), strict=True)):
        expected = _expected(question, ctx, declared)
        if expected is None:
            if not is_plain(axis):
                return f"its axis {at} varies with {ctx.varied}, which is not declared"
        elif not _runs_along(axis, expected):
            return f"its axis {at} does not begin with the sequence's own positions along {declared}"
    return ""


def _expected(question: _Question, ctx: Context, declared: str | int | None) -> Size | None:
    """Return the sequence's own number of positions along a declared axis, where it depends on the varied axis."""
    assert ctx.own_size is not None
    if declared == ctx.varied:
        return ctx.own_size
    form = question.derived.get(declared) if isinstance(declared, str) else None
    if form is None or ctx.varied not in form.symbols:
        return None
    if isinstance(form, Formula):
        return size_of_formula(ctx, form)
    return floor_div(ctx.own_size + Size.of(form.offset), Size.of(form.stride))


def _runs_along(axis: Axis, expected: Size) -> bool:
    return len(axis) == 1 and axis[0].real == expected and not axis[0].tail


def _is_causal(site: SiteSpec, varied: str, question: _Question, values: Mapping[ir.Value, Value]) -> bool:
    """Return whether all weights of keys behind their query are 0."""
    if site.weights_output is None or site.weight_axes != (varied, varied):
        return False
    output = next((value for value in question.graph.outputs if value.name == site.weights_output), None)
    value = values.get(output) if output is not None else None
    if value is None or value.layout is None or len(value.axes) != 4:
        return False
    query, key = ordinals(value.axes, 2), ordinals(value.axes, 3)
    if len(query) != 1 or len(key) != 1:
        return False
    entry = value.regions.get(("above", query[0], key[0]))
    return entry is not None and entry.only == 0


def _lengths_in(graph: ir.Graph) -> Iterator[int]:
    """Yield the numbers of attributes that are strides or widths of windows."""
    for node in graph:
        for name, attribute in node.attributes.items():
            if isinstance(attribute.value, ir.Graph):
                yield from _lengths_in(attribute.value)
            elif name in _LENGTHS_OF:
                found = attribute.value if isinstance(attribute.value, (tuple, list)) else [attribute.value]
                yield from (int(number) for number in found)
