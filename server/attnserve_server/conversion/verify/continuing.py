"""Tap the continuing graph of a decoder, compare it with the prompt graph, and describe it: `with_past`.

The same positions are computed twice: by the prompt graph as one prompt of P + T tokens, and by the continuing graph as
T new tokens after a past, whose keys and values are what the prompt graph returns for the first P. Outputs of the new
positions, the continued cache, and the weights of the new queries must agree. A decoder for which they do not is served
without a past, with a warning.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
import onnx
import onnx_ir as ir

from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.base.sites import FoundSite, Layout, Learnt, Probabilities
from attnserve_server.conversion.base.steps import Steps
from attnserve_server.conversion.base.tolerances import Tolerances, max_abs
from attnserve_server.conversion.caches.decoder import Decoder
from attnserve_server.conversion.finders import find_sites
from attnserve_server.conversion.graphs.reading import save
from attnserve_server.conversion.inputs.signature import signature_of, with_counted_positions
from attnserve_server.conversion.learning.layout import layouts_of
from attnserve_server.conversion.probing.feeds import Lengths, Sampler
from attnserve_server.conversion.probing.runtime import GraphRunner
from attnserve_server.conversion.proof import prove
from attnserve_server.conversion.rewrite.counted_masks import with_whole_masks
from attnserve_server.conversion.rewrite.taps import add_means, add_taps, expose
from attnserve_server.domain.errors import AttnserveError
from attnserve_server.domain.values import Array
from attnserve_server.engine.session import CPU, RuntimeSession
from attnserve_server.engine.warmup import touch
from attnserve_server.model.certificate import Certificate, Clause, Verdict
from attnserve_server.model.formula import Formula
from attnserve_server.model.manifest import (
    BATCH,
    NUMPY_DTYPES,
    Dimension,
    IndexRange,
    InputRole,
    InputSpec,
    Manifest,
    OutputSpec,
    SiteSpec,
)
from attnserve_server.model.past import PAST_FILE, CacheSpec, PastSpec

_COUNTS: Final = ((3, 2), (2, 5))
"""P and T of the two comparisons; the second has another P and another T, and more new positions than past ones."""
_OTHER: Final = 4
"""Length of every other axis, such as that of an encoder."""
_QUANTIZED: Final = 0.1
"""Greatest relative difference where activations are quantized: one scale serves all positions of a run."""


@dataclass(frozen=True, slots=True)
class Continuing:
    """The tapped continuing graph, ready for the bundle.

    Args:
        path: the graph.
        past: its description, without golden answers.
        sequence: the inputs of one sequence, by name and without the batch axis, for golden answers.
    """

    path: Path
    past: PastSpec
    sequence: Mapping[str, Array]


def continuing_of(
    decoder: Decoder, manifest: Manifest, model_path: Path, sampler: Sampler, work: Path, steps: Steps
) -> Continuing | None:
    """Return the continuing graph; None, with a warning, if it does not answer as the prompt graph does.

    Args:
        decoder: both graphs of the source.
        manifest: of the tapped prompt graph.
        model_path: that graph.
        sampler: draws sequences for it.
        work: a folder for files.
        steps: receives the warning.
    """
    try:
        return _Trial(decoder, manifest, model_path, sampler, work).run()
    except (AttnserveError, ValueError) as fault:
        steps.warn(f"sequences cannot have a past: {fault}")
        return None


class _Trial:
    """One attempt to serve a continuing graph."""

    def __init__(self, decoder: Decoder, manifest: Manifest, model_path: Path, sampler: Sampler, work: Path) -> None:
        cache = decoder.cache
        self.cache, self.manifest, self.sampler, self.work = cache, manifest, sampler, work
        self.prompt = GraphRunner(model_path)
        ids = manifest.input_of_role(InputRole.TOKEN_IDS)
        self.proto, masks = with_whole_masks(decoder.continuing)
        signature = with_counted_positions(signature_of(self.proto.graph, int(ids.padding) if ids else 0))
        self.total = cache.total_axis or f"{cache.past_axis} + {cache.new_axis}"
        if self.total in signature.symbols:
            both = Formula(None, "+", (Formula(cache.past_axis), Formula(cache.new_axis)))
            signature = signature.solved({self.total: both})
        self.signature = replace(signature, inputs=tuple(_without_zeros(spec, masks.kept) for spec in signature.inputs))
        if cache.new_axis not in {axis.symbol for axis in manifest.axes}:
            raise BuildRefused(f"its new positions follow {cache.new_axis!r}, which is no axis of whole sequences")
        self.tolerances = Tolerances.of(manifest.precision)

    def run(self) -> Continuing:
        """Tap, compare and describe the graph. Raises BuildRefused if it cannot be served."""
        path = self._tapped()
        runner = GraphRunner(path)
        outputs = self._outputs(runner)
        for past, new in _COUNTS:
            self._compare(runner, outputs, past, new)
        longest = self.manifest.axis(self.cache.new_axis).max_length
        for past, new in ((longest - 1, 1), (1, longest - 1)):
            runner.run(_batch([self._sequence(past, new, 0)]), [outputs[0].name])
        refuted = self._rows_agree(runner, outputs)
        spec = PastSpec(
            file=PAST_FILE,
            axis=self.cache.past_axis,
            follows=self.cache.new_axis,
            key_axis=self.total,
            caches=tuple(self._cache_spec(name, present) for name, present in self._presents().items()),
            inputs=tuple(spec for spec in self.signature.inputs if spec.name not in self._presents()),
            outputs=outputs,
            without_scores=tuple(
                site.name for site in self.manifest.sites if site.scores_output not in {None, *runner.output_names}
            ),
        )
        if self.manifest.max_batch_size > 1:
            sites = spec.continuing(self.manifest).sites
            spec = spec.model_copy(update={"certificate": self._certificate(path, outputs, sites, refuted)})
        spec.check(self.manifest)
        session = RuntimeSession.load(path, provider=CPU, left_out=self.manifest.left_out)
        touch(session, spec.continuing(self.manifest))
        return Continuing(path, spec, self._sequence(*_COUNTS[0], 0))

    def _presents(self) -> dict[str, str]:
        """The output of each cache input, by the input's name."""
        return {past.name: past.present for past in self.cache.pasts}

    def _cache_spec(self, name: str, present: str) -> CacheSpec:
        spec = next(spec for spec in self.signature.inputs if spec.name == name)
        if any(past.crossed for past in self.cache.pasts if past.name == name):
            # An encoder's keys: the positions are those of the encoder's output, by its name in whole sequences.
            spec = spec.model_copy(update={"shape": self.manifest.output(present).shape})
        return CacheSpec(input=spec, present=present)

    def _lengths(self, past: int, new: int) -> dict[str, int]:
        return {
            **dict.fromkeys(self.signature.symbols, _OTHER),
            self.cache.past_axis: past,
            self.cache.new_axis: new,
            self.total: past + new,
        }

    def _tapped(self) -> Path:
        """Write the graph with a tap for each site that gives weights in the prompt graph, under the same name."""
        model = ir.from_proto(self.proto)
        found = self._named(find_sites(model.graph))
        learnt = self._learnt({name: site for name, site in found.items() if isinstance(site.attention, Probabilities)})
        add_taps(model.graph, found, learnt)
        add_means(model.graph, self.manifest.sites)
        path = self.work / PAST_FILE
        save(model, path)
        return path

    def _named(self, found: Mapping[str, FoundSite]) -> dict[str, FoundSite]:
        """The sites that give weights in the prompt graph, by their names there; both graphs have the same order."""
        sites = self.manifest.sites
        if len(found) != len(sites):
            raise BuildRefused(f"it has {len(found)} attention sites, and whole sequences have {len(sites)}")
        named: dict[str, FoundSite] = {}
        for site, own in zip(sites, found.values(), strict=True):
            if not site.available:
                continue
            if not own.tappable:
                raise BuildRefused(f"site {site.name} gives no weights after a past: {own.unavailable_reason}")
            if own.heads not in {0, site.heads}:
                raise BuildRefused(f"site {site.name} has {own.heads} heads, and {site.heads} in whole sequences")
            named[site.name] = own
        return named

    def _learnt(self, sites: Mapping[str, FoundSite]) -> dict[str, Learnt]:
        """Learn the layouts of sites that have their own weights."""
        if not sites:
            return {}
        model = ir.from_proto(self.proto)
        copies = self._named(find_sites(model.graph))
        own = {name: copies[name] for name in sites}
        expose(model, own.values())
        path = self.work / "past.untapped.onnx"
        save(model, path)
        attention = {name: each for name, site in own.items() if isinstance(each := site.attention, Probabilities)}
        sampler = Sampler(self.signature, self.sampler.vocabulary_size, vocabulary_sizes=self.sampler.vocabulary_sizes)
        lengths = self._probes()
        learnt: dict[str, Learnt] = {}
        for name, layout in layouts_of(GraphRunner(path), sampler, attention, lengths).items():
            if not isinstance(layout, Layout):
                raise BuildRefused(f"site {name} gives no weights after a past: {layout.reason}")
            if layout.windowed:
                raise BuildRefused(f"site {name} has windows, which a past would move")
            learnt[name] = Learnt(layout, None)
        return learnt

    def _probes(self) -> tuple[Lengths, Lengths]:
        """Two sets of lengths in which no symbol has the same length."""
        first, second = self._lengths(7, 5), self._lengths(11, 6)
        counted = {self.cache.past_axis, self.cache.new_axis, self.total}
        return first, {symbol: second[symbol] if symbol in counted else first[symbol] + 9 for symbol in first}

    def _whole(self, count: int, row: int) -> dict[str, Array]:
        """Inputs of the prompt graph for the first `count` positions; the same row has the same tokens."""
        longest = self.manifest.axis(self.cache.new_axis).max_length
        lengths = {**dict.fromkeys(self.sampler.signature.symbols, _OTHER), self.cache.new_axis: longest}
        drawn = self.sampler.sequence(lengths, row)
        return {
            spec.name: drawn[spec.name][tuple(self._first(extent, count) for extent in spec.shape)]
            for spec in self.sampler.signature.inputs
        }

    def _first(self, extent: Dimension, count: int) -> slice:
        return slice(count) if extent == self.cache.new_axis else slice(None)

    def _sequence(self, past: int, new: int, row: int) -> dict[str, Array]:
        """Inputs of the continuing graph: T positions after the prompt graph's own keys and values of the first P."""
        before = self._whole(past, row)
        presents = self._presents()
        cached = self.prompt.run(_batch([before]), [name for name in presents.values() if name], tap=False)
        whole = self._whole(past + new, row)
        given: dict[str, Array] = {}
        for spec in self.signature.inputs:
            if spec.name in presents:
                if not presents[spec.name]:
                    raise BuildRefused(f"no output continues input {spec.name!r}")
                given[spec.name] = cached[presents[spec.name]][0]
            elif spec.role is InputRole.POSITION_IDS:
                given[spec.name] = np.arange(past, past + new, dtype=NUMPY_DTYPES[spec.dtype])
            else:
                given[spec.name] = self._continued(spec, whole, past)
        return given

    def _continued(self, spec: InputSpec, whole: Mapping[str, Array], past: int) -> Array:
        """One plain input, from the prompt's input of the same name."""
        if spec.name not in whole:
            raise BuildRefused(f"input {spec.name!r} is none of whole sequences")
        if self.total in spec.shape and spec.fill is None:
            raise BuildRefused(f"input {spec.name!r} is over past and new positions, and its values are not known")
        place = tuple(slice(past, None) if extent == self.cache.new_axis else slice(None) for extent in spec.shape)
        return whole[spec.name][place]

    def _outputs(self, runner: GraphRunner) -> tuple[OutputSpec, ...]:
        """The outputs of the graph that whole sequences have too, with their axes as two runs show them."""
        names = {spec.name: spec for spec in self.manifest.outputs if spec.name in runner.output_names}
        found = [runner.run(_batch([self._sequence(past, new, 0)]), list(names), tap=False) for past, new in _COUNTS]
        shown: list[OutputSpec] = []
        for name, spec in names.items():
            shape: list[Dimension] = []
            for at, extent in enumerate(spec.shape, start=1):
                sizes = tuple(each[name].shape[at] for each in found)
                shape.append(self._followed(name, sizes) if extent == self.cache.new_axis else extent)
            shown.append(spec.model_copy(update={"shape": tuple(shape)}))
        return tuple(shown)

    def _followed(self, name: str, sizes: tuple[int, ...]) -> str:
        """The axis whose lengths in both comparisons are these."""
        for symbol in (self.cache.new_axis, self.total):
            if sizes == tuple(self._lengths(past, new)[symbol] for past, new in _COUNTS):
                return symbol
        raise BuildRefused(f"output {name!r} has {sizes[0]} and {sizes[1]} positions, neither new nor all of them")

    def _compare(self, runner: GraphRunner, outputs: Sequence[OutputSpec], past: int, new: int) -> None:
        """Compare with whole sequences. Raises BuildRefused for the first difference that exceeds its tolerance."""
        tapped = {name: site for site in self.manifest.sites for name in site.outputs if name in runner.output_names}
        names = [spec.name for spec in outputs]
        whole = self.prompt.run(_batch([self._whole(past + new, 0)]), [*names, *tapped])
        found = runner.run(_batch([self._sequence(past, new, 0)]), [*names, *tapped])
        for spec in outputs:
            old = self.manifest.output(spec.name).shape
            if self.cache.new_axis not in old:
                continue  # an answer about all positions, which differ
            cut = tuple(slice(past, None) if extent == self.cache.new_axis else slice(None) for extent in spec.shape)
            expected = whole[spec.name][(slice(None), *cut)]
            self._judge(f"output {spec.name!r}", found[spec.name], expected, self.tolerances.output)
        for name, site in tapped.items():
            expected = whole[name][..., past:, :] if site.query_axis == self.cache.new_axis else whole[name]
            self._judge(f"the attention of {site.name}", found[name], expected, self.tolerances.weight)

    def _judge(self, what: str, found: Array, expected: Array, tolerance: float) -> None:
        greatest = max(1.0, float(np.abs(expected[np.isfinite(expected)]).max(initial=0.0)))
        allowed = greatest * (_QUANTIZED if self.manifest.precision == "int8" else tolerance)
        error = max_abs(found, expected)
        if not error <= allowed:
            raise BuildRefused(
                f"{what} after a past differs from that of whole sequences by {error:.3g}, more than {allowed:.3g}"
            )

    def _rows_agree(self, runner: GraphRunner, outputs: Sequence[OutputSpec]) -> str:
        """Return why rows cannot share runs; empty if two rows get the same answers as each alone."""
        rows = [self._sequence(*_COUNTS[0], row) for row in (0, 1)]
        names = [spec.name for spec in outputs]
        try:
            both = runner.run(_batch(rows), names, tap=False)
        except BuildRefused:
            return "it does not run on two sequences with a past"
        for row, sequence in enumerate(rows):
            alone = runner.run(_batch([sequence]), names, tap=False)
            for name in names:
                greatest = max(1.0, float(np.abs(alone[name]).max(initial=0.0)))
                if not max_abs(both[name][row], alone[name][0]) <= self.tolerances.neighbours * greatest:
                    return f"output {name!r} of a sequence with a past depends on its batch"
        return ""

    def _certificate(
        self, path: Path, outputs: Sequence[OutputSpec], sites: Sequence[SiteSpec], refuted: str
    ) -> Certificate:
        """Prove that rows do not change each other's answers, at equal lengths of the past and of new positions."""
        padding = Clause(axis=self.cache.new_axis, verdict=Verdict.UNKNOWN, reason="padding after a past is not proved")
        if refuted:
            return Certificate(clauses=(Clause(axis=BATCH, verdict=Verdict.REFUTED, reason=refuted), padding))
        proof = prove(
            onnx.load(path),
            replace(self.signature, symbols=()),
            outputs,
            sites,
            max_lengths={axis.symbol: axis.max_length for axis in self.manifest.axes},
            precision=self.manifest.precision,
            vocabularies=self.sampler.vocabulary_sizes,
        )
        return Certificate(clauses=(*proof.clauses, padding))


def _without_zeros(spec: InputSpec, counted: Collection[str]) -> InputSpec:
    """Return a mask whose ones the graph counts as one without zeros, which would leave out past keys."""
    if spec.name not in counted:
        return spec
    return spec.model_copy(update={"index_ranges": (IndexRange(least=1, greatest=1),)})


def _batch(sequences: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """Sequences of equal lengths as one batch."""
    return {name: np.stack([sequence[name] for sequence in sequences]) for name in sequences[0]}
