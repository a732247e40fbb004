"""Open a bundle for a check: load its graph, and find and tap attention again in the graph without taps.

A bundle is the folder of a converted model. Taps are the nodes of its graph that return attention weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from attnserve_server.conversion.assemble import Assembled, assemble
from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.base.steps import Steps
from attnserve_server.conversion.base.tolerances import CHECK_LENGTHS, Tolerances
from attnserve_server.conversion.graphs.reading import read_graph
from attnserve_server.conversion.inputs.signature import Signature, signature_of
from attnserve_server.conversion.probing.feeds import Sampler
from attnserve_server.conversion.probing.runtime import GraphRunner
from attnserve_server.conversion.rewrite.taps import ITEMS_PREFIX, TAP_PREFIXES
from attnserve_server.domain.values import Array
from attnserve_server.engine.session import RuntimeSession
from attnserve_server.model.formula import Formula
from attnserve_server.model.manifest import InputRole, Manifest
from attnserve_server.model.repository import MANIFEST_FILE, Bundle, Repository


@dataclass(frozen=True, slots=True)
class Opened:
    """A loaded bundle, and the same graph assembled again: taps removed, attention found again, taps added again.

    Attributes:
        bundle: the bundle; its manifest states what shares runs under the batching policy of the check.
        session: the bundle's graph, loaded as the server loads it.
        runner: the bundle's graph, for runs of the check.
        sampler: draws sequences for the graph's inputs.
        again: the graph that was assembled again.
        work: a folder for temporary files.
    """

    bundle: Bundle
    session: RuntimeSession
    runner: GraphRunner
    sampler: Sampler
    again: Assembled
    work: Path

    @property
    def manifest(self) -> Manifest:
        """The manifest of the bundle, under the policy of the check."""
        return self.bundle.manifest

    @property
    def tolerances(self) -> Tolerances:
        """The tolerances of the bundle's precision."""
        return Tolerances.of(self.manifest.precision)

    @property
    def bundled(self) -> Assembled:
        """The bundle's own tapped graph with its own sites, in the form that the proof takes."""
        manifest = self.manifest
        return replace(
            self.again,
            model_path=self.bundle.model_path,
            checker=self.runner,
            sites=manifest.sites,
            outputs=manifest.outputs,
            site_axes={site.name: site.weight_axes for site in manifest.sites if site.available},
            derived_axes={axis.symbol: axis.follows for axis in manifest.axes if axis.follows is not None},
            precision=manifest.precision,
        )

    def mixed(self) -> tuple[dict[str, Array], list[dict[str, int]]]:
        """Return a batch of mixed lengths within the model's limits, and each sequence's lengths along every axis."""
        symbols = self.sampler.signature.symbols
        longest = min((self.manifest.axis(symbol).max_length for symbol in symbols), default=max(CHECK_LENGTHS))
        rows = self.sampler.signature.fixed_batch or self.manifest.max_batch_size
        lengths = [min(length, longest) for length in CHECK_LENGTHS][-rows:]
        if not all(self.manifest.axis(symbol).paddable for symbol in symbols):
            lengths = [lengths[-1]] * len(lengths)
        feeds, each = self.sampler.mixed(lengths)
        return feeds, [{**self.manifest.fixed_lengths, **self.manifest.with_derived(own)} for own in each]


def bundle_at(path: Path) -> Bundle:
    """Return the bundle in a folder, without verifying its files.

    Raises:
        BuildRefused: the folder has no manifest.
        BundleInvalid: the manifest is broken.
    """
    place = path.resolve()
    if not place.is_dir() or not (place / MANIFEST_FILE).is_file():
        raise BuildRefused(f"{path.name or place.name} is not a bundle: it has no {MANIFEST_FILE}")
    return Repository(place.parents[1]).bundle(place.parent.name, place.name)


def opened(bundle: Bundle, work: Path) -> Opened:
    """Load a bundle's graph, remove its taps, and assemble it again.

    Args:
        bundle: a bundle with verified files; its manifest states what shares runs under the check's batching policy.
        work: an empty folder for temporary files.

    Raises:
        BuildRefused: the graph cannot be read, or does not run.
        LoadFailed: the runtime cannot load the graph.
    """
    manifest = bundle.manifest
    proto = _untapped(read_graph(bundle.model_path))
    relations = {axis.symbol: Formula.parse(axis.formula) for axis in manifest.axes if axis.formula}
    shown = (axis for spec in manifest.inputs for axis in spec.shape if isinstance(axis, str) and axis not in relations)
    fixed_batch = signature_of(proto.graph).fixed_batch
    signature = Signature(manifest.inputs, tuple(dict.fromkeys(shown)), fixed_batch, relations=relations)
    sizes = {spec.name: manifest.vocabulary_of(spec) for spec in manifest.inputs if spec.role is InputRole.TOKEN_IDS}
    sampler = Sampler(signature, vocabulary_sizes=sizes)
    session = RuntimeSession.load(bundle.model_path, provider="CPUExecutionProvider", left_out=manifest.left_out)
    place = work / "again"
    place.mkdir()
    again = assemble(proto, sampler, place, Steps.silent())
    return Opened(bundle, session, GraphRunner(bundle.model_path), sampler, again, work)


def _untapped(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return a bundle's graph without its taps."""
    model = ir.from_proto(proto)
    graph = model.graph
    for values, prefixes in ((graph.outputs, TAP_PREFIXES), (graph.inputs, (ITEMS_PREFIX,))):
        if values is graph.inputs:
            RemoveUnusedNodesPass()(model)
        for value in [value for value in values if str(value.name).startswith(prefixes)]:
            values.remove(value)
    return ir.to_proto(model)
