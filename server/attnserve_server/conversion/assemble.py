"""From a source graph to everything that a bundle needs: the tapped graph and the facts about it. Writes no bundle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import onnx
import onnx_ir as ir

from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.base.sites import (
    FoundSite,
    Layout,
    Learnt,
    Probabilities,
    Scores,
    Tappable,
    Untappable,
    Windows,
)
from attnserve_server.conversion.base.steps import Steps
from attnserve_server.conversion.base.tolerances import Tolerances
from attnserve_server.conversion.finders import find_sites
from attnserve_server.conversion.graphs.reading import precision_of, save
from attnserve_server.conversion.inputs.signature import dtype_of
from attnserve_server.conversion.learning.grids import Grid, grids_of
from attnserve_server.conversion.learning.layout import layouts_of
from attnserve_server.conversion.learning.origins import FixedAxes, fixed_axes, of_one_sequence
from attnserve_server.conversion.learning.products import product_errors
from attnserve_server.conversion.learning.windows import grid_of_windows, windows_apart, windows_of, with_key_axes
from attnserve_server.conversion.probing.feeds import Sampler
from attnserve_server.conversion.probing.probe import Axes, probe_axes, probe_lengths
from attnserve_server.conversion.probing.runtime import GraphRunner
from attnserve_server.conversion.rewrite.tapped import expose, tapped_at
from attnserve_server.conversion.rewrite.taps import ITEMS_PREFIX, WEIGHTS_PREFIX, add_taps, with_plain_values
from attnserve_server.domain.values import Array
from attnserve_server.model.certificate import Batching, Certificate
from attnserve_server.model.manifest import AxisSpec, DerivedLength, OutputSpec, SiteSpec, axes_under


@dataclass(frozen=True, slots=True)
class Assembled:
    """A tapped graph beside its source, opened for checks, and what was learnt about both."""

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
    grids: Mapping[str, Grid]
    derived_axes: Mapping[str, DerivedLength]
    tolerances: Tolerances
    precision: Literal["fp32", "fp16", "int8"]

    @property
    def weights(self) -> dict[str, str]:
        """The output of each available site, by its name."""
        return {name: WEIGHTS_PREFIX + name for name in self.site_axes}

    def product_errors(self, weights: Mapping[str, Array], feeds: Mapping[str, Array]) -> dict[str, float]:
        """How far weights @ value is from each site's own output, for weights (B, H, L, S or W) of these feeds."""
        return product_errors(self.checker, _tappable(self.found), self.learnt, weights, feeds)


def assemble(proto: onnx.ModelProto, sampler: Sampler, work: Path, steps: Steps) -> Assembled:
    """Tap a graph and learn by running what it does not say.

    Args:
        proto: the source, with inferred shapes.
        sampler: makes sequences for it.
        work: a folder for the files; `model.onnx` there is the tapped graph.
        steps: is told of every step, and of what is left out.

    Raises:
        BuildRefused: the graph does not run, or has no output that could be served.
    """
    _refuse_reserved_names(proto.graph)
    steps.begin("adding taps")
    source_path, checker_path, model_path = work / "source.onnx", work / "checker.onnx", work / "model.onnx"
    save(ir.from_proto(proto), source_path)
    source = GraphRunner(source_path)
    checker_model = ir.from_proto(proto)
    found = with_plain_values(checker_model.graph, find_sites(checker_model.graph))
    expose(checker_model, found.values())
    found, learnt = _learnt(proto, checker_model, found, sampler, work)
    add_taps(checker_model.graph, found, learnt)
    save(checker_model, checker_path)
    steps.begin("probing axes")
    checker = GraphRunner(checker_path)
    servable = _servable(proto.graph, steps)
    output_names = [value.name for value in servable]
    tolerances = Tolerances.of(precision_of(proto))
    found = _verified(checker, sampler, found, learnt, tolerances)
    axes = with_key_axes(probe_axes(checker, sampler, output_names, found), learnt)
    outputs = _outputs(servable, axes, steps)
    fixed = fixed_axes(axes.sites, found, [*sampler.signature.symbols, *axes.derived])
    sites = tuple(
        _site(layer, name, site, learnt.get(name), axes, fixed) for layer, (name, site) in enumerate(found.items())
    )
    for site in sites:
        if not site.available:
            steps.warn(f"site {site.name} gives no weights: {site.unavailable_reason}")
    available = {site.name: site.weight_axes for site in sites if site.available}
    save(tapped_at(proto, available, learnt), model_path)
    named = {symbol for site in sites if site.available for symbol in (site.query_axis, site.key_axis)}
    shown = {extent for spec in outputs for extent in spec.shape if isinstance(extent, str)}
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
        derived_axes={symbol: form for symbol, form in axes.derived.items() if symbol in named | shown},
        tolerances=tolerances,
        precision=precision_of(proto),
    )


def _tappable(found: Mapping[str, FoundSite]) -> dict[str, Tappable]:
    return {name: own for name, site in found.items() if not isinstance(own := site.attention, Untappable)}


def _learnt(
    proto: onnx.ModelProto, model: ir.Model, found: Mapping[str, FoundSite], sampler: Sampler, work: Path
) -> tuple[dict[str, FoundSite], dict[str, Learnt]]:
    """Run the graph to learn the layouts and windows of sites that have their own weights.

    Returns:
        The sites, of which those that are not understood are untappable; and what was learnt, of these too.
    """
    own = {name: weights for name, site in found.items() if isinstance(weights := site.attention, Probabilities)}
    if not own:
        return dict(found), {}
    path = work / "untapped.onnx"
    save(model, path)
    known: dict[str, Layout | Untappable]
    try:
        known = layouts_of(GraphRunner(path), sampler, own, probe_lengths(sampler.signature.symbols))
    except BuildRefused as fault:
        # The probe that follows will fail too, and says on which lengths.
        known = dict.fromkeys(own, Untappable(f"its layout is not known: {fault}"))
    learnt = {name: Learnt(layout) for name, layout in known.items() if isinstance(layout, Layout)}
    apart = windows_apart(proto, {name: each.layout for name, each in learnt.items()}, sampler, work)
    learnt |= {name: Learnt(layout) for name, layout in apart.items() if isinstance(layout, Layout)}
    known |= apart
    layouts = {name: layout for name, layout in known.items() if isinstance(layout, Layout)}
    windows = windows_of(proto, layouts, sampler, work)
    learnt |= {name: Learnt(layouts[name], each) for name, each in windows.items() if isinstance(each, Windows)}
    lost = {name: why for name, why in (known | windows).items() if isinstance(why, Untappable)}
    return {name: replace(site, attention=lost.get(name, site.attention)) for name, site in found.items()}, learnt


def _verified(
    checker: GraphRunner,
    sampler: Sampler,
    found: Mapping[str, FoundSite],
    learnt: Mapping[str, Learnt],
    tolerances: Tolerances,
) -> dict[str, FoundSite]:
    """The sites; those whose weights do not make their own output, or do not run, are no longer tappable."""
    lengths, _ = probe_lengths(sampler.signature.symbols)
    rows = range(sampler.signature.fixed_batch or 3)
    feeds = sampler.batch([sampler.sequence(lengths, row) for row in rows], lengths)
    verified = dict(found)
    tappable = _tappable(found)
    for name in tappable:
        try:
            weights = checker.run(feeds, [WEIGHTS_PREFIX + name])[WEIGHTS_PREFIX + name]
            error = product_errors(checker, tappable, learnt, {name: weights}, feeds)[name]
        except BuildRefused as fault:
            reason = f"its tap does not run: {fault}"
        except ValueError:  # shapes of weights and value do not fit
            reason = "its first axis is not the batch"
        else:
            reason = f"its weights @ value differ from its own output by {error:.3g}, more than {tolerances.output:g}"
            if error <= tolerances.output:
                continue
        verified[name] = replace(found[name], attention=Untappable(reason))
    return verified


def axes_of(
    assembled: Assembled, max_lengths: Mapping[str, int], certificate: Certificate, batching: Batching
) -> tuple[AxisSpec, ...]:
    """Every axis, with what its certificate allows under a policy. Derived and fixed axes that sites name come last."""
    specs = [AxisSpec(symbol=symbol, max_length=longest, paddable=False) for symbol, longest in max_lengths.items()]
    for symbol, form in assembled.derived_axes.items():
        longest = max(form.of(max_lengths[form.source]), 1)
        specs.append(AxisSpec(symbol=symbol, max_length=longest, paddable=False, derived=form))
    for symbol, length in assembled.fixed_axes.items():
        grid, leading = assembled.grids.get(symbol) or (grid_of_windows(assembled.sites, symbol), 0)
        specs.append(AxisSpec(symbol=symbol, max_length=length, paddable=False, fixed=True, grid=grid, leading=leading))
    return axes_under(specs, certificate, batching)


def _refuse_reserved_names(graph: onnx.GraphProto) -> None:
    for value in (*graph.input, *graph.output):
        if value.name.startswith((ITEMS_PREFIX, WEIGHTS_PREFIX)):
            raise BuildRefused(f"{value.name!r} is a name of taps: this graph has been prepared already")


def _servable(graph: onnx.GraphProto, steps: Steps) -> list[onnx.ValueInfoProto]:
    """The outputs of types that can be served; says which cannot."""
    servable: list[onnx.ValueInfoProto] = []
    for value in graph.output:
        kind = value.type.WhichOneof("value")
        if kind not in {None, "tensor_type"}:
            steps.warn(f"output {value.name!r} is left out: it is of type {str(kind).removesuffix('_type')}, no tensor")
            continue
        try:
            dtype_of(value.type.tensor_type.elem_type, value.name)
        except BuildRefused as fault:
            steps.warn(f"output {value.name!r} is left out: {fault}")
            continue
        servable.append(value)
    return servable


def _outputs(values: Sequence[onnx.ValueInfoProto], axes: Axes, steps: Steps) -> tuple[OutputSpec, ...]:
    specs: list[OutputSpec] = []
    for value in values:
        if value.name in axes.unbatched_outputs:
            steps.warn(f"output {value.name!r} is left out: its first axis is not the batch")
            continue
        shape = tuple(extent for extent in axes.outputs[value.name] if extent is not None)
        if len(shape) != len(axes.outputs[value.name]):
            steps.warn(f"output {value.name!r} is left out: an axis of it follows no axis of the inputs")
            continue
        element_type = value.type.tensor_type.elem_type
        specs.append(OutputSpec(name=value.name, dtype=dtype_of(element_type, value.name), shape=shape))
    if not specs:
        raise BuildRefused("no output could be served: the first axis must be the batch, the others axes of the inputs")
    return tuple(specs)


def _site(layer: int, name: str, site: FoundSite, learnt: Learnt | None, axes: Axes, fixed: FixedAxes) -> SiteSpec:
    query_axis, key_axis = (
        fixed.symbols[name, side] if isinstance(extent, int) else extent
        for side, extent in enumerate(axes.sites.get(name, (None, None)))
    )
    reason = site.unavailable_reason
    if not reason and name in axes.unbatched_sites:
        reason = "its first axis is not the batch"
    for role, axis in (("query", query_axis), ("key", key_axis)):
        if not reason and axis is None:
            reason = f"its {role} axis follows no axis of an input, and is not fixed"
    causal = site.causal or name in axes.causal_sites
    # Keys pooled from the positions of the queries are still the queries' own sequence.
    query_source, key_source = (
        axes.derived[axis].source if axis in axes.derived else axis for axis in (query_axis, key_axis)
    )
    # Two inputs of one length may share a symbol; what they hold are two sequences all the same.
    crossed = query_source != key_source or not of_one_sequence(site)
    layout, windows = (None, None) if learnt is None else (learnt.layout, learnt.windows)
    of_operator = site.attention.band if isinstance(site.attention, Scores) else None
    return SiteSpec(
        name=name,
        layer=layer,
        kind="causal" if causal else "cross" if crossed else "self",
        form="windowed" if layout is not None and layout.windowed else site.form,
        operator=site.operator,
        # Of a site that is not understood there may be any number.
        heads=(site if layout is None else layout).heads or 1,
        kv_heads=(site if layout is None else layout).kv_heads or 1,
        head_dim=site.head_dim or (0 if layout is None else layout.head_dim),
        query_axis=query_axis or "",
        key_axis=key_axis or "",
        items_input=None if reason else ITEMS_PREFIX + name,
        weights_output=None if reason else WEIGHTS_PREFIX + name,
        unavailable_reason=reason,
        band=None if reason else windows.band if windows is not None else of_operator,
        whole_rows=not reason and of_operator is not None,
    )
