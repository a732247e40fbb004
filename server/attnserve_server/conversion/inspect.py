"""Describe a bundle or an ONNX file: inputs, outputs, axes, attention sites and the batching certificate. Runs nothing.

A bundle is the folder of one converted model. Its certificate states whether a batch or padding can change an answer.
`inspect_model` raises BuildRefused or BundleInvalid for a path that holds neither. A site is a place in a graph that
computes attention.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Literal

import onnx
import onnx_ir as ir
from pydantic import BaseModel, ConfigDict

from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.base.sites import FoundSite, Probabilities, Scores
from attnserve_server.conversion.caches.splitting import whole_sequences
from attnserve_server.conversion.finders import find_sites
from attnserve_server.conversion.graphs.reading import read_graph
from attnserve_server.model.batching import Ruling, rulings
from attnserve_server.model.certificate import BATCHING, AttackReport, Clause, MaskNeed, PathStep, Verdict
from attnserve_server.model.heads import EmbeddingSpec, HeadSpec
from attnserve_server.model.holding import verify
from attnserve_server.model.manifest import BATCH, AxisSpec, Manifest
from attnserve_server.model.report import FusionReport, TrialReport
from attnserve_server.model.repository import MANIFEST_FILE, Bundle, Repository

_INFERRED = "unk__"
"""Prefix of the symbols that ONNX shape inference invents."""


class TensorDescription(BaseModel):
    """An input or an output. `shape` includes the batch axis; a dimension without a name in the file is "?".

    `on_request`: whether a bundle returns the output only to requests that name it.
    """

    model_config = ConfigDict(frozen=True)
    name: str
    dtype: str
    shape: tuple[str | int, ...]
    on_request: bool = False


class AxisDescription(BaseModel):
    """One axis of a bundle. `paddable`: whether the server pads along it under its default policy, "proved".

    `how` describes a fixed axis, one that follows from others, and a patch grid; it is empty otherwise. `bound`: where
    the greatest length comes from; empty where the bundle does not state it.
    """

    model_config = ConfigDict(frozen=True)
    symbol: str
    max_length: int
    paddable: bool
    how: str = ""
    bound: str = ""


class SiteDescription(BaseModel):
    """One site. Axes are empty and heads are 0 where an ONNX file does not name them.

    `available`: whether the site can give its weights; if not, `unavailable_reason` states why.
    `band`: the kind of band in which a bundle's windowed site gives its weights, with `band_width` columns; else empty.
    """

    model_config = ConfigDict(frozen=True)
    name: str
    layer: int
    kind: str
    form: str
    operator: str
    heads: int
    kv_heads: int
    head_dim: int
    query_axis: str
    key_axis: str
    available: bool
    unavailable_reason: str
    band: str = ""
    band_width: int = 0


class ClauseDescription(BaseModel):
    """One clause of a certificate, for the batch or for one axis. `under`: whether each policy allows batching.

    `finite_mask`: whether the clause is unknown only because a mask adds a finite number to scores without a bound.
    """

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")
    axis: str
    verdict: Verdict
    status: str
    reason: str
    under: dict[str, bool]
    path: tuple[PathStep, ...] = ()
    targets: dict[str, Verdict] = {}
    finite_mask: bool = False
    attack: AttackReport | None = None


class BatchingDescription(BaseModel):
    """The certificate of a bundle. A bundle without one has `format` 1 and no clauses."""

    model_config = ConfigDict(frozen=True)
    format: int
    clauses: tuple[ClauseDescription, ...] = ()
    masks: tuple[MaskNeed, ...] = ()
    noise: dict[str, float] = {}


class ModelDescription(BaseModel):
    """A bundle or an ONNX file. For an ONNX file, the fields that only bundles have are empty or 0.

    `source`: the model that the bundle was converted from, in the form that `check --against` accepts.
    `text_axes`: the axes that texts fill, first text first; empty if clients cannot send text.
    `solved`: what was solved for or fixed about the axes of inputs, each with its reason.
    `head`, `embedding`, `prompts`: what a checkpoint's task adds to hidden states; None or empty without it.
    `batching`: the certificate; None for an ONNX file.
    """

    model_config = ConfigDict(frozen=True)
    what: Literal["bundle", "onnx"]
    name: str
    version: str = ""
    digest: str = ""
    source: str = ""
    precision: str = ""
    max_batch_size: int = 0
    text_axes: tuple[str, ...] = ()
    head: HeadSpec | None = None
    embedding: EmbeddingSpec | None = None
    prompts: dict[str, str] = {}
    axis_symbols: tuple[str, ...]
    axes: tuple[AxisDescription, ...] = ()
    inputs: tuple[TensorDescription, ...]
    outputs: tuple[TensorDescription, ...]
    sites: tuple[SiteDescription, ...]
    fusion: FusionReport | None = None
    trials: tuple[TrialReport, ...] = ()
    solved: tuple[str, ...] = ()
    batching: BatchingDescription | None = None


def inspect_model(path: Path) -> ModelDescription:
    """Describe the bundle in a folder, after verifying its files, or an ONNX file.

    Of a decoder with a cache, the graph of whole sequences is described.

    Raises:
        BuildRefused: the folder has no manifest, or the file is not a usable ONNX model.
        BundleInvalid: the manifest is broken, or a file differs from its digest.
    """
    if path.is_dir():
        place = path.resolve()
        if not (place / MANIFEST_FILE).is_file():
            raise BuildRefused(f"{place.name} is not a bundle: it has no {MANIFEST_FILE}")
        bundle = Repository(place.parents[1]).bundle(place.parent.name, place.name)
        verify(bundle)
        return _of_bundle(bundle)
    return _of_graph(path.name, whole_sequences(read_graph(path), path.name))


def _of_bundle(bundle: Bundle) -> ModelDescription:
    # The server's default policy: the stored `paddable` may be that of another one.
    manifest: Manifest = bundle.manifest.under("proved").model_copy(
        update={"max_batch_size": bundle.manifest.max_batch_size}
    )
    text = manifest.text
    return ModelDescription(
        what="bundle",
        name=manifest.name,
        version=manifest.version,
        digest=manifest.digest,
        source=manifest.provenance.source,
        precision=manifest.precision,
        max_batch_size=manifest.max_batch_size,
        head=manifest.head,
        embedding=manifest.embedding,
        prompts={} if text is None else text.prompts,
        text_axes=() if text is None else tuple(axis for axis in (text.axis, text.pair_axis) if axis),
        axis_symbols=(BATCH, *(axis.symbol for axis in manifest.axes)),
        axes=tuple(described_axis(axis) for axis in manifest.axes),
        inputs=tuple(TensorDescription(name=s.name, dtype=s.dtype, shape=(BATCH, *s.shape)) for s in manifest.inputs),
        outputs=tuple(
            TensorDescription(name=s.name, dtype=s.dtype, shape=(BATCH, *s.shape), on_request=s.on_request)
            for s in manifest.outputs
        ),
        sites=tuple(
            SiteDescription(
                **site.model_dump(include=set(SiteDescription.model_fields) - {"band"}),
                available=site.available,
                band="" if site.band is None else site.band.kind,
                band_width=0 if site.band is None else site.band.width,
            )
            for site in manifest.sites
        ),
        fusion=manifest.check.fusion,
        trials=manifest.check.trials,
        solved=manifest.provenance.solved,
        batching=_batching_of(manifest),
    )


def described_axis(axis: AxisSpec) -> AxisDescription:
    """Describe an axis of a bundle, for example "(seq + 3) / 4", "past + seq" or "fixed, 7 x 7 patches behind 1"."""
    how: list[str] = [f"always {axis.formula}"] if axis.formula else []
    if axis.fixed:
        how.append("fixed")
    if axis.grid is not None:
        how.append(f"{axis.grid[0]} x {axis.grid[1]} patches" + (f" behind {axis.leading}" if axis.leading else ""))
    if axis.derived is not None:
        offset = f" {'+' if axis.derived.offset > 0 else '-'} {abs(axis.derived.offset)}" if axis.derived.offset else ""
        stride = f" / {axis.derived.stride}" if axis.derived.stride > 1 else ""
        how.append(
            f"({axis.derived.source}{offset}){stride}"
            if offset and stride
            else f"{axis.derived.source}{offset}{stride}"
        )
    return AxisDescription(
        symbol=axis.symbol,
        max_length=axis.max_length,
        paddable=axis.paddable,
        how=", ".join(how),
        bound=axis.bound,
    )


def _batching_of(manifest: Manifest) -> BatchingDescription:
    certificate = manifest.certificate
    if certificate is None:
        return BatchingDescription(format=manifest.format)
    ruled = {policy: {ruling.axis: ruling for ruling in rulings(manifest, policy)} for policy in BATCHING}
    return BatchingDescription(
        format=manifest.format,
        clauses=tuple(
            _clause(clause, {policy: found[clause.axis] for policy, found in ruled.items()})
            for clause in certificate.clauses
        ),
        masks=certificate.masks,
        noise=certificate.noise,
    )


def _clause(clause: Clause, ruled: dict[str, Ruling]) -> ClauseDescription:
    shared = clause.model_dump(include={"axis", "verdict", "path", "targets", "finite_mask", "attack"})
    return ClauseDescription(
        **shared,
        status=ruled["proved"].status,
        reason=ruled["proved"].reason,
        under={policy: ruling.allowed for policy, ruling in ruled.items()},
    )


def _of_graph(name: str, proto: onnx.ModelProto) -> ModelDescription:
    sites = find_sites(ir.from_proto(proto).graph)
    initialized = {tensor.name for tensor in proto.graph.initializer}
    inputs = tuple(_tensor(value) for value in proto.graph.input if value.name not in initialized)
    outputs = tuple(_tensor(value) for value in proto.graph.output)
    symbols = {extent: None for tensor in (*inputs, *outputs) for extent in tensor.shape if isinstance(extent, str)}
    symbols.pop("?", None)
    return ModelDescription(
        what="onnx",
        name=name,
        axis_symbols=tuple(symbols),
        inputs=inputs,
        outputs=outputs,
        sites=tuple(_site(layer, name, site, symbols) for layer, (name, site) in enumerate(sites.items())),
    )


def _site(layer: int, name: str, site: FoundSite, symbols: Collection[str]) -> SiteDescription:
    query_axis, key_axis = _axes(site, symbols)
    crossed = query_axis and key_axis and query_axis != key_axis
    return SiteDescription(
        name=name,
        layer=layer,
        kind="causal" if site.causal else "cross" if crossed else "self",
        form=site.form,
        operator=site.operator,
        heads=site.heads,
        kv_heads=site.kv_heads,
        head_dim=site.head_dim,
        query_axis=query_axis,
        key_axis=key_axis,
        available=site.tappable,
        unavailable_reason=site.unavailable_reason,
    )


def _symbol(name: str) -> str:
    """Return a symbol that the file itself names, or "?" for one that shape inference invented."""
    return "?" if not name or name.startswith(_INFERRED) else name


def _axes(site: FoundSite, symbols: Collection[str]) -> tuple[str, str]:
    """Return the symbols of the query and the key axis; empty where the file does not name them."""
    match site.attention:
        case Scores(query=query, key=key):
            return (
                _axis(query.value, 1 if query.packed else 2, symbols),
                _axis(key.value, 1 if key.packed else 2, symbols),
            )
        case Probabilities(weights=weights, key_axis=key_axis, query_axes=query_axes):
            nearest = min(query_axes, key=lambda place: abs(place - key_axis))
            return _axis(weights, nearest, symbols), _axis(weights, key_axis, symbols)
    return "", ""


def _axis(value: ir.Value, place: int, symbols: Collection[str]) -> str:
    """Return the symbol of one axis of a value, if it is in `symbols`; else an empty string."""
    if value.shape is None:
        return ""
    extent = value.shape[place]
    symbol = extent.value if isinstance(extent, ir.SymbolicDim) else None
    return symbol if symbol is not None and symbol in symbols else ""


def _tensor(value: onnx.ValueInfoProto) -> TensorDescription:
    kind = value.type.tensor_type
    shape = tuple(axis.dim_value if axis.HasField("dim_value") else _symbol(axis.dim_param) for axis in kind.shape.dim)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name if kind.elem_type else "?"
    return TensorDescription(name=value.name, dtype=dtype, shape=shape)
