"""Inspect: what a bundle or a bare ONNX file is, as a person or a program wants to read it. Runs and writes nothing."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Literal

import onnx
import onnx_ir as ir
from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.table import Table

from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.base.sites import FoundSite
from attnserve_server.conversion.finders import find_sites
from attnserve_server.conversion.graphs.reading import read_graph
from attnserve_server.conversion.inspect_batching import BatchingDescription, batching_of
from attnserve_server.model.manifest import BATCH, AxisSpec, Manifest
from attnserve_server.model.report import FusionReport, TrialReport
from attnserve_server.model.repository import MANIFEST_FILE, Bundle, Repository, verify

_INFERRED = "unk__"


class TensorDescription(BaseModel):
    """An input or an output. `shape` has the batch axis; an extent that the file does not name is "?"."""

    model_config = ConfigDict(frozen=True)
    name: str
    dtype: str
    shape: tuple[str | int, ...]


class AxisDescription(BaseModel):
    """One axis of a bundle. `how` says in words what it is beyond a dynamic one: derived, fixed, of patches."""

    model_config = ConfigDict(frozen=True)
    symbol: str
    max_length: int
    paddable: bool
    how: str = ""


class SiteDescription(BaseModel):
    """One site. Axes are empty, and heads 0, where a bare file does not name them: only running it would tell.

    `band`: of a bundle's windowed site, which kind of band its weights come as, of `band_width` columns; else empty.
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


class ModelDescription(BaseModel):
    """What `inspect` tells. Of a bare file, what only bundles have is empty, or 0.

    `source`: what the bundle was made from, as `check --against` takes it where it is at hand under that name.
    `text_axes`: the axes that texts go along, the second text's after the first's; empty if clients cannot send text.
    `batching`: what its certificate says; None for a bare file, which has none.
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
    axis_symbols: tuple[str, ...]
    axes: tuple[AxisDescription, ...] = ()
    inputs: tuple[TensorDescription, ...]
    outputs: tuple[TensorDescription, ...]
    sites: tuple[SiteDescription, ...]
    fusion: FusionReport | None = None
    trials: tuple[TrialReport, ...] = ()
    batching: BatchingDescription | None = None


def inspect_model(path: Path) -> ModelDescription:
    """Describe a bundle's folder, whose files are verified, or a bare ONNX file.

    Raises:
        BuildRefused: it is neither.
        BundleInvalid: it is a broken bundle.
    """
    if path.is_dir():
        place = path.resolve()
        if not (place / MANIFEST_FILE).is_file():
            raise BuildRefused(f"{place.name} is no bundle: it has no {MANIFEST_FILE}")
        bundle = Repository(place.parents[1]).bundle(place.parent.name, place.name)
        verify(bundle)
        return _of_bundle(bundle)
    return _of_graph(path.name, read_graph(path))


def show(description: ModelDescription, console: Console) -> None:
    """Print a description as tables."""
    title = f"{description.name}/{description.version}" if description.version else description.name
    symbols = ", ".join(description.axis_symbols) or "none"
    console.print(f"[bold]{title}[/bold]  {description.digest}".rstrip(), highlight=False, soft_wrap=True)
    if description.what == "bundle":
        console.print(_facts(description), highlight=False, markup=False, soft_wrap=True)
    console.print(f"axis symbols: {symbols}", highlight=False, markup=False)
    tensors = _table("inputs and outputs", "", "name", "dtype", "shape")
    for what, entries in (("input", description.inputs), ("output", description.outputs)):
        for entry in entries:
            tensors.add_row(what, entry.name, entry.dtype, " x ".join(str(extent) for extent in entry.shape))
    console.print(tensors)
    if description.axes:
        axes = _table("axes", "axis", "longest", "padding", "")
        for axis in description.axes:
            axes.add_row(axis.symbol, str(axis.max_length), "yes" if axis.paddable else "no", axis.how)
        console.print(axes)
    if not description.sites:
        console.print("no attention sites")
        return
    operators = ", ".join(sorted({site.operator for site in description.sites}))
    sites = _table(f"attention sites ({operators})", "layer", "site", "kind", "heads", "query, key", "weights")
    for site in description.sites:
        heads = str(site.heads or "?") if site.heads == site.kv_heads else f"{site.heads} over {site.kv_heads}"
        sides = f"{site.query_axis}, {site.key_axis}" if site.query_axis else "?"
        sites.add_row(str(site.layer), site.name, f"{site.kind}, {site.form}", heads, sides, _weights(site))
    console.print(sites)
    if description.fusion is not None:
        console.print(str(description.fusion), highlight=False, markup=False)
    for trial in description.trials:
        console.print(str(trial), highlight=False, markup=False)


def _facts(description: ModelDescription) -> str:
    """What concerns a bundle as a whole, in one line."""
    text = f"takes text along {' and '.join(description.text_axes)}" if description.text_axes else "takes no text"
    batch = f"batches of up to {description.max_batch_size}"
    return f"made from {description.source}; {description.precision}, {text}, {batch}"


def _weights(site: SiteDescription) -> str:
    """What can be had of a site's weights."""
    if not site.available:
        return f"no: {site.unavailable_reason}"
    return f"band of {site.band_width}" if site.band else "yes"


def _of_bundle(bundle: Bundle) -> ModelDescription:
    # As the server has it by default: what a bundle itself says of padding may be under another policy.
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
        text_axes=() if text is None else tuple(axis for axis in (text.axis, text.pair_axis) if axis),
        axis_symbols=(BATCH, *(axis.symbol for axis in manifest.axes)),
        axes=tuple(axis_of_bundle(axis) for axis in manifest.axes),
        inputs=tuple(TensorDescription(name=s.name, dtype=s.dtype, shape=(BATCH, *s.shape)) for s in manifest.inputs),
        outputs=tuple(TensorDescription(name=s.name, dtype=s.dtype, shape=(BATCH, *s.shape)) for s in manifest.outputs),
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
        batching=batching_of(manifest),
    )


def axis_of_bundle(axis: AxisSpec) -> AxisDescription:
    """An axis in words."""
    how: list[str] = []
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
    return AxisDescription(symbol=axis.symbol, max_length=axis.max_length, paddable=axis.paddable, how=", ".join(how))


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
        sites=tuple(_found(layer, name, site, symbols) for layer, (name, site) in enumerate(sites.items())),
    )


def _found(layer: int, name: str, site: FoundSite, symbols: Collection[str]) -> SiteDescription:
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
    """A symbol of the file's own; shape inference makes up others."""
    return "?" if not name or name.startswith(_INFERRED) else name


def _axes(site: FoundSite, symbols: Collection[str]) -> tuple[str, str]:
    """The symbols of the axes that queries and keys run along, where they are the file's own."""
    if site.scores is not None:
        query, key = site.scores.query, site.scores.key
        return (
            _axis(query.value, 1 if query.packed else 2, symbols),
            _axis(key.value, 1 if key.packed else 2, symbols),
        )
    own = site.probabilities
    if own is None or not own.query_axes:
        return "", ""
    nearest = min(own.query_axes, key=lambda place: abs(place - own.key_axis))
    return _axis(own.value, nearest, symbols), _axis(own.value, own.key_axis, symbols)


def _axis(value: ir.Value, place: int, symbols: Collection[str]) -> str:
    """The symbol of one axis, if it is one of the file's own."""
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


def _table(title: str, *columns: str) -> Table:
    """A table without lines, so that a model's longest names still fit into 80 columns."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
