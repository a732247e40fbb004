"""Resolves a selection: check it against a model's sites, make indices non-negative, and fill in defaults.

A site is a place where the model computes attention. An invalid field, and a site without weights, are errors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from attnserve_server.domain.errors import AttentionUnavailable, Violations, quoted
from attnserve_server.domain.values import (
    AttentionFeature,
    AttentionSelection,
    AttentionUnit,
    AttentionValue,
    EffectiveSelection,
    HeadReduction,
    LayerReduction,
    WeightDtype,
)
from attnserve_server.model.manifest import SiteSpec

MAX_NAMES_SHOWN = 20
"""Maximum number of site names in a message. A model may have hundreds, and error details travel in a gRPC trailer."""


def resolve(selection: AttentionSelection, sites: Sequence[SiteSpec], model: str) -> EffectiveSelection:
    """Check a selection against a model's sites and fill in its defaults.

    Args:
        selection: what the caller sent.
        sites: the model's sites in order of their layers.
        model: the model's name, for messages.

    Returns:
        The selection with sites as ascending layers without duplicates, and the heads of each as indices from 0. If
        the caller named no site, all available sites.

    Raises:
        InvalidRequest: with every invalid field.
        AttentionUnavailable: the model has no sites, a named site is not available, or no site is available.
    """
    if not sites:
        raise AttentionUnavailable(model, "it has no attention sites")
    violations = Violations()
    scores = selection.values is AttentionValue.SCORES
    layers = _layers(selection, sites, violations)
    heads = tuple(_heads(selection.heads, sites[layer], violations) for layer in layers)
    _check_values(selection, violations)
    head_reduction = _head_reduction(selection, violations)
    chosen = [sites[layer] for layer in layers]
    _check_features(selection, chosen, violations)
    if scores:
        _check_scores(selection, violations)
    if not violations:
        _check_joinable(selection.layer_reduction, head_reduction, chosen, heads, violations)
    violations.raise_any()
    require_outputs(model, chosen, selection.values)
    return EffectiveSelection(
        layers=layers,
        heads=heads,
        head_reduction=head_reduction,
        layer_reduction=selection.layer_reduction,
        queries=selection.queries,
        unit=selection.unit,
        special_tokens=selection.special_tokens,
        top_k=selection.top_k,
        min_weight=selection.min_weight,
        dtype=selection.dtype,
        all_heads=not selection.heads,
        features=selection.features,
        values=selection.values,
    )


def require_outputs(model: str, chosen: Sequence[SiteSpec], values: AttentionValue) -> None:
    """Raise AttentionUnavailable, with each reason, if some of the chosen sites do not return weights or scores."""
    missing = [site for site in chosen if site.output_of(values) is None]
    if missing:
        scores = values is AttentionValue.SCORES
        reasons = {
            site.name: site.why_no_scores if scores else site.unavailable_reason or "not tapped" for site in missing
        }
        of = "scores of site" if scores else "site"
        raise AttentionUnavailable(model, "; ".join(f"{of} {name!r}: {why}" for name, why in reasons.items()))


def from_end(index: int, length: int) -> int | None:
    """Return the index counted from 0, where a negative one counts from the end; None if it is out of range."""
    if not -length <= index < length:
        return None
    return index % length


def _layers(selection: AttentionSelection, sites: Sequence[SiteSpec], violations: Violations) -> tuple[int, ...]:
    if not selection.sites and not selection.layers:
        # No site is named, so a site without a tap must not make the request fail.
        given = (layer for layer, site in enumerate(sites) if site.output_of(selection.values) is not None)
        return tuple(given) or tuple(range(len(sites)))
    by_name = {site.name: layer for layer, site in enumerate(sites)}
    chosen: set[int] = set()
    hint = f"; the model's sites are {', '.join(list(by_name)[:MAX_NAMES_SHOWN])}"
    hint += ", ..." if len(by_name) > MAX_NAMES_SHOWN else ""
    for position, name in enumerate(selection.sites):
        if name in by_name:
            chosen.add(by_name[name])
        else:
            violations.add(f"attention.sites[{position}]", f"no site {quoted(name)}{hint}")
            hint = ""  # the first violation lists the sites
    for position, index in enumerate(selection.layers):
        layer = from_end(index, len(sites))
        if layer is None:
            limit = f"the model has {len(sites)} sites: -{len(sites)} to {len(sites) - 1}"
            violations.add(f"attention.layers[{position}]", f"layer {index} is out of range; {limit}")
        else:
            chosen.add(layer)
    return tuple(sorted(chosen))


def _heads(heads: tuple[int, ...], site: SiteSpec, violations: Violations) -> tuple[int, ...]:
    if not heads:
        return tuple(range(site.heads))
    chosen: list[int] = []
    for position, index in enumerate(heads):
        if violations.full:
            break
        field = f"attention.heads[{position}]"
        head = from_end(index, site.heads)
        if head is None:
            limit = f"site {site.name!r} has {site.heads} heads: -{site.heads} to {site.heads - 1}"
            violations.add_once(field, f"head {index} is out of range; {limit}")
        elif head in chosen:
            violations.add_once(field, f"head {index} names head {head} of site {site.name!r} again")
        else:
            chosen.append(head)
    return tuple(chosen)


def _check_values(selection: AttentionSelection, violations: Violations) -> None:
    seen: set[int] = set()
    for position, query in enumerate(selection.queries):
        if query in seen:
            violations.add(f"attention.queries[{position}]", f"query {query} is named again")
        seen.add(query)
    if selection.top_k < 0:
        violations.add("attention.top_k", f"{selection.top_k} is below 0")
    if not (math.isfinite(selection.min_weight) and 0 <= selection.min_weight <= 1):
        violations.add("attention.min_weight", f"{selection.min_weight!r} is not from 0 to 1")


def _check_features(selection: AttentionSelection, chosen: Sequence[SiteSpec], violations: Violations) -> None:
    """Add a violation for each repeated feature, and for each field that features of single rows exclude."""
    if not selection.features:
        return
    seen: set[AttentionFeature] = set()
    for position, feature in enumerate(selection.features):
        if feature in seen:
            violations.add(f"attention.features[{position}]", f"{feature} is named again")
        elif feature is AttentionFeature.MEAN_DISTANCE:
            _check_distances(f"attention.features[{position}]", chosen, violations)
        seen.add(feature)
    each_head, each_site = "features are of each head", "features are of each site"
    excluded = {
        "head_reduction": (selection.head_reduction not in {None, HeadReduction.EACH}, each_head),
        "layer_reduction": (selection.layer_reduction is not LayerReduction.EACH, each_site),
        "top_k": (selection.top_k > 0, "features are of whole rows"),
        "min_weight": (selection.min_weight > 0, "features are of whole rows"),
        "dtype": (selection.dtype is not WeightDtype.FLOAT32, "features are float32"),
    }
    for name, (is_set, why) in excluded.items():
        if is_set:
            violations.add_once(
                f"attention.{name}", f"{getattr(selection, name)} is for maps, and {why}; leave it unset"
            )


def _check_scores(selection: AttentionSelection, violations: Violations) -> None:
    """Add a violation for each field that has no meaning for scores."""
    excluded = {
        "layer_reduction": (selection.layer_reduction is LayerReduction.ROLLOUT, "rollout multiplies weights"),
        "unit": (selection.unit is AttentionUnit.WORD, "scores of the pieces of a word have no sum"),
        "top_k": (selection.top_k > 0, "links are of weights"),
        "min_weight": (selection.min_weight > 0, "links are of weights"),
        "dtype": (selection.dtype is WeightDtype.UINT8, "uint8 is for numbers from 0 to 1"),
        "features": (bool(selection.features), "features are of weights"),
    }
    for name, (is_set, why) in excluded.items():
        if is_set:
            violations.add_once(f"attention.{name}", f"it cannot be selected with scores: {why}; leave it unset")


def _check_distances(field: str, chosen: Sequence[SiteSpec], violations: Violations) -> None:
    """Add a violation if a query and a key of a chosen site are positions of different sequences."""
    for site in chosen:
        if site.kind == "cross" or site.query_axis != site.key_axis:
            axes = f"site {site.name!r} attends from {site.query_axis!r} to another sequence, {site.key_axis!r}"
            violations.add(field, f"mean_distance needs one sequence; {axes}: leave it out, or select other sites")
            return


def _head_reduction(selection: AttentionSelection, violations: Violations) -> HeadReduction:
    rollout = selection.layer_reduction is LayerReduction.ROLLOUT
    if selection.head_reduction is None:
        return HeadReduction.MEAN if rollout else HeadReduction.EACH
    if rollout and selection.head_reduction is HeadReduction.EACH:
        violations.add("attention.head_reduction", "each head by itself has no rollout: take mean or max")
    return selection.head_reduction


def _check_joinable(
    layer_reduction: LayerReduction,
    head_reduction: HeadReduction,
    chosen: Sequence[SiteSpec],
    heads: Sequence[tuple[int, ...]],
    violations: Violations,
) -> None:
    """Add a violation if the maps of the chosen sites cannot be joined by this reduction."""
    if layer_reduction is LayerReduction.EACH:
        return
    field = "attention.layer_reduction"
    axes = sorted({(site.query_axis, site.key_axis) for site in chosen})
    if len(axes) > 1:
        seen = ", ".join(f"{query} x {key}" for query, key in axes)
        violations.add_once(field, f"{layer_reduction} needs sites of the same axes; these have {seen}")
    if layer_reduction is LayerReduction.ROLLOUT:
        crossing = [site.name for site in chosen if site.kind == "cross" or site.query_axis != site.key_axis]
        if crossing:
            violations.add_once(field, f"rollout needs sites that attend within one sequence; {crossing[0]!r} does not")
    counts = sorted({len(each) for each in heads})
    if layer_reduction is LayerReduction.MEAN and head_reduction is HeadReduction.EACH and len(counts) > 1:
        violations.add_once(field, f"mean with each head by itself needs the same number of heads; these have {counts}")
