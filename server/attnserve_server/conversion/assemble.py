"""Adds taps to a source graph, and finds out by running it what a manifest states about its axes, outputs and sites.

A site is one attention computation of the graph. A tap is the nodes that return a site's weights as an output.
`assemble` takes a graph with inferred shapes and raises BuildRefused; a site that no tap fits is kept with its reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import onnx
import onnx_ir as ir

from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.base.sites import FoundSite, Learnt, Scores
from attnserve_server.conversion.base.steps import Steps
from attnserve_server.conversion.base.tolerances import Tolerances
from attnserve_server.conversion.graphs.reading import precision_of, save
from attnserve_server.conversion.inputs.signature import dtype_of
from attnserve_server.conversion.learning.fixed_axes import FixedAxes, PatchGrid, fixed_axes, grids_of, of_one_sequence
from attnserve_server.conversion.learning.products import product_errors
from attnserve_server.conversion.learning.scores import scoreless_sites
from attnserve_server.conversion.learning.sites import grid_of_windows, learn, tappable_of, verified, with_key_axes
from attnserve_server.conversion.probing.axes import ProbedAxes, probe_axes
from attnserve_server.conversion.probing.feeds import Sampler
from attnserve_server.conversion.probing.runtime import GraphRunner
from attnserve_server.conversion.rewrite.taps import (
    ITEMS_PREFIX,
    MEAN_PREFIX,
    SCORES_PREFIX,
    TAP_PREFIXES,
    WEIGHTS_PREFIX,
    add_means,
    add_taps,
    expose,
    sites_to_tap,
    tapped_at,
    with_plain_values,
)
from attnserve_server.domain.values import Array
from attnserve_server.model.certificate import Batching, Certificate
from attnserve_server.model.manifest import AxisSpec, DerivedLength, Following, OutputSpec, SiteSpec, axes_under


@dataclass(frozen=True, slots=True)
class Assembled:
    """A tapped graph beside its source, opened for checks, and what is known about both.

    Attributes:
        model_path: the tapped graph that will be served.
        source: the source graph.
        checker: the source graph with taps, and with every value that checks need as an output.
        sampler: draws sequences for all three.
        sites: as the manifest describes them, in the order of their layers.
        found: the sites of `checker`, by name.
        learnt: the layouts and windows of sites with their own weights, by name.
        outputs: the outputs that are served.
        site_axes: the query axis and the key axis of each available site's weights, by name.
        fixed_axes: the length of each fixed axis that a site names.
        grids: the patch grid of each fixed axis that has one.
        derived_axes: the form of each derived axis that a site or an output names, and the formula of each axis of
            inputs that has one.
        tolerances: of checks in this precision.
        precision: of the source.
    """

    model_path: Path
    source: GraphRunner
    checker: GraphRunner
    sampler: Sampler
    sites: tuple[SiteSpec, ...]
    found: Mapping[str, FoundSite]
    learnt: Mapping[str, Learnt]
    outputs: tuple[OutputSpec, ...]
    site_axes: Mapping[str, tuple[str, str]]
    fixed_axes: Mapping[str, int]
    grids: Mapping[str, PatchGrid]
    derived_axes: Mapping[str, Following]
    tolerances: Tolerances
    precision: Literal["fp32", "fp16", "int8", "bf16-scores"]

    @property
    def weights(self) -> dict[str, str]:
        """The name of each available site's output."""
        return {name: WEIGHTS_PREFIX + name for name in self.site_axes}

    def product_errors(self, weights: Mapping[str, Array], feeds: Mapping[str, Array]) -> dict[str, float]:
        """Return the greatest difference of weights @ value from each site's own output.

        Args:
            weights: (B, H, L, S) by site, or (B, H, L, W) where it has windows.
            feeds: the inputs that the weights were computed for.
        """
        return product_errors(self.checker, tappable_of(self.found), self.learnt, weights, feeds)


def assemble(proto: onnx.ModelProto, sampler: Sampler, work: Path, steps: Steps) -> Assembled:
    """Add taps to a graph, and learn by running it what it does not state.

    Args:
        proto: the source, with inferred shapes.
        sampler: draws sequences for it.
        work: a folder for the files; `model.onnx` there is the tapped graph.
        steps: receives progress notes, and a warning for each output and site that is left out.

    Raises:
        BuildRefused: the graph does not run, or has no output that could be served.
    """
    _refuse_reserved_names(proto.graph)
    source_path, checker_path, model_path = work / "source.onnx", work / "checker.onnx", work / "model.onnx"
    save(ir.from_proto(proto), source_path)
    source = GraphRunner(source_path)
    checker_model = ir.from_proto(proto)
    found = with_plain_values(checker_model.graph, sites_to_tap(checker_model.graph))
    expose(checker_model, found.values())
    found, learnt = learn(proto, checker_model, found, sampler, work)
    add_taps(checker_model.graph, found, learnt)
    save(checker_model, checker_path)
    steps.note("probing axes")
    checker = GraphRunner(checker_path)
    servable = _servable(proto.graph, steps)
    output_names = [value.name for value in servable]
    tolerances = Tolerances.of(precision_of(proto))
    found = verified(checker, sampler, found, learnt, tolerances.output)
    axes = with_key_axes(probe_axes(checker, sampler, output_names, found), learnt)
    outputs = _outputs(servable, axes, steps)
    fixed = fixed_axes(axes.sites, found, [*sampler.signature.symbols, *sampler.signature.relations, *axes.derived])
    scoreless = scoreless_sites(checker, sampler, found, tolerances.output)
    sites = tuple(
        _site(layer, name, site, learnt.get(name), axes, fixed, scoreless.get(name, ""))
        for layer, (name, site) in enumerate(found.items())
    )
    for site in sites:
        if not site.available:
            steps.warn(f"site {site.name} gives no weights: {site.unavailable_reason}")
    available = {site.name: site.weight_axes for site in sites if site.available}
    model = tapped_at(proto, available, learnt)
    add_means(model.graph, sites)
    save(model, model_path)
    named = {symbol for site in sites if site.available for symbol in (site.query_axis, site.key_axis)}
    shown = {axis for spec in outputs for axis in spec.shape if isinstance(axis, str)}
    return Assembled(
        model_path=model_path,
        source=source,
        checker=checker,
        sampler=sampler,
        sites=sites,
        found=found,
        learnt=learnt,
        outputs=outputs,
        site_axes=available,
        fixed_axes={symbol: length for symbol, length in fixed.lengths.items() if symbol in named},
        grids=grids_of(sampler.signature, fixed),
        derived_axes={
            **sampler.signature.relations,
            **{symbol: form for symbol, form in axes.derived.items() if symbol in named | shown},
        },
        tolerances=tolerances,
        precision=precision_of(proto),
    )


def axes_of(
    assembled: Assembled,
    max_lengths: Mapping[str, int],
    certificate: Certificate,
    batching: Batching,
    bounds: Mapping[str, str] = MappingProxyType({}),
) -> tuple[AxisSpec, ...]:
    """Return every axis, with what its certificate allows under a policy; derived and fixed axes come last.

    Args:
        assembled: the graph.
        max_lengths: the greatest length of each free axis of its inputs; a missing one raises KeyError.
        certificate: of the graph.
        batching: the policy.
        bounds: where these lengths come from, where that is known.
    """
    specs = [
        AxisSpec(symbol=symbol, max_length=longest, paddable=False, bound=bounds.get(symbol, ""))
        for symbol, longest in max_lengths.items()
    ]
    for symbol, form in assembled.derived_axes.items():
        how = {"derived": form} if isinstance(form, DerivedLength) else {"formula": str(form)}
        longest = max(form.length_at(max_lengths), 1)
        specs.append(AxisSpec.model_validate({"symbol": symbol, "max_length": longest, "paddable": False, **how}))
    for symbol, length in assembled.fixed_axes.items():
        known = assembled.grids.get(symbol)
        grid = (known.rows, known.columns) if known else grid_of_windows(assembled.sites, symbol)
        leading = known.leading if known else 0
        specs.append(AxisSpec(symbol=symbol, max_length=length, paddable=False, fixed=True, grid=grid, leading=leading))
    return axes_under(specs, certificate, batching)


def _refuse_reserved_names(graph: onnx.GraphProto) -> None:
    for value in (*graph.input, *graph.output):
        if value.name.startswith((ITEMS_PREFIX, *TAP_PREFIXES)):
            raise BuildRefused(f"{value.name!r} is a name of taps: this graph is converted already; convert its source")


def _servable(graph: onnx.GraphProto, steps: Steps) -> list[onnx.ValueInfoProto]:
    """Return the outputs of types that can be served, and warn of each other one."""
    servable: list[onnx.ValueInfoProto] = []
    for value in graph.output:
        kind = value.type.WhichOneof("value")
        if kind not in {None, "tensor_type"}:
            steps.warn(f"output {value.name!r} is left out: its type is {str(kind).removesuffix('_type')}, not tensor")
            continue
        try:
            dtype_of(value.type.tensor_type.elem_type, value.name)
        except BuildRefused as fault:
            steps.warn(f"output {value.name!r} is left out: {fault}")
            continue
        servable.append(value)
    return servable


def _outputs(values: Sequence[onnx.ValueInfoProto], axes: ProbedAxes, steps: Steps) -> tuple[OutputSpec, ...]:
    specs: list[OutputSpec] = []
    for value in values:
        if value.name in axes.unbatched_outputs:
            steps.warn(f"output {value.name!r} is left out: its first axis is not the batch")
            continue
        shape = tuple(axis for axis in axes.outputs[value.name] if axis is not None)
        if len(shape) != len(axes.outputs[value.name]):
            steps.warn(f"output {value.name!r} is left out: an axis of it follows no axis of the inputs")
            continue
        element_type = value.type.tensor_type.elem_type
        specs.append(OutputSpec(name=value.name, dtype=dtype_of(element_type, value.name), shape=shape))
    if not specs:
        raise BuildRefused("no output can be served: its first axis must be the batch, the others axes of the inputs")
    return tuple(specs)


def _site(
    layer: int, name: str, site: FoundSite, learnt: Learnt | None, axes: ProbedAxes, fixed: FixedAxes, scoreless: str
) -> SiteSpec:
    query_axis, key_axis = (
        fixed.symbols[name, side] if isinstance(axis, int) else axis
        for side, axis in enumerate(axes.sites.get(name, (None, None)))
    )
    reason = site.unavailable_reason
    if not reason and name in axes.unbatched_sites:
        reason = "its first axis is not the batch"
    for role, axis in (("query", query_axis), ("key", key_axis)):
        if not reason and axis is None:
            reason = f"its {role} axis follows no axis of an input, and is not fixed"
    causal = site.causal or name in axes.causal_sites
    # Keys that are pooled from the positions of the queries are still of the queries' sequence.
    query_source, key_source = (
        axes.derived[axis].source if axis in axes.derived else axis for axis in (query_axis, key_axis)
    )
    # Two inputs of one length may share a symbol, and still hold two sequences.
    crossed = query_source != key_source or not of_one_sequence(site)
    layout, windows = (None, None) if learnt is None else (learnt.layout, learnt.windows)
    of_operator = site.attention.band if isinstance(site.attention, Scores) else None
    heads = (site if layout is None else layout).heads or 1
    return SiteSpec(
        name=name,
        layer=layer,
        kind="causal" if causal else "cross" if crossed else "self",
        form="windowed" if layout is not None and layout.windowed else site.form,
        operator=site.operator,
        # The number of heads of a site that is not understood is unknown.
        heads=heads,
        kv_heads=(site if layout is None else layout).kv_heads or 1,
        head_dim=site.head_dim or (0 if layout is None else layout.head_dim),
        query_axis=query_axis or "",
        key_axis=key_axis or "",
        items_input=None if reason else ITEMS_PREFIX + name,
        weights_output=None if reason else WEIGHTS_PREFIX + name,
        unavailable_reason=reason,
        scores_output=None if reason or scoreless else SCORES_PREFIX + name,
        scores_unavailable_reason=reason or scoreless,
        mean_output=None if reason or heads == 1 else MEAN_PREFIX + name,
        band=None if reason else windows.band if windows is not None else of_operator,
        whole_rows=not reason and of_operator is not None,
    )


def with_grid(axis: AxisSpec, grid: PatchGrid | None) -> AxisSpec:
    """Return a fixed axis with its patch grid, if the source states one for its length."""
    if not axis.fixed or axis.grid or grid is None:
        return axis
    update = {"grid": (grid.rows, grid.columns), "leading": grid.leading}
    return AxisSpec.model_validate({**axis.model_dump(), **update})
