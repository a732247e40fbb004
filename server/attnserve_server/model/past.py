"""The past of a decoder with a cache: what the manifest states about the graph that continues after one.

A bundle of such a decoder has two graphs with the same sites: the prompt graph, `model.onnx`, whose past is empty, and
the continuing graph, which reads the keys and values of P earlier positions from its cache inputs. A bundle is the
folder of one converted model, and a site a place in a graph that computes attention. A past whose parts do not fit
raises pydantic's ValidationError.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Self

from pydantic import Field, model_validator

from attnserve_server.model.certificate import Batching, Certificate
from attnserve_server.model.frozen import BATCH, FileName, Frozen, Symbol
from attnserve_server.model.report import GoldenSpec
from attnserve_server.model.specs import AxisSpec, DerivedLength, InputSpec, OutputSpec

if TYPE_CHECKING:
    from attnserve_server.model.manifest import Manifest, SiteSpec

PAST_FILE = "past.onnx"
"""Usual name of the continuing graph in a bundle."""
_NO_SCORES = "its graph for sequences with a past does not compute scores that can be returned"


class CacheSpec(Frozen):
    """One cache input, and the output whose value continues it.

    Args:
        input: the input, for example of shape (kv_heads, past, head_dim).
        present: name of the output that is the cache after this call; empty: there is none. If the prompt graph alone
            has it, as for the keys of an encoder, the cache stays the same after a past.
    """

    input: InputSpec
    present: str = ""


class PastSpec(Frozen):
    """The continuing graph: a sequence of T new positions after P past ones.

    Args:
        file: name of the graph in the bundle.
        axis: symbol of the past positions, P of them.
        follows: symbol of the new positions, T of them, an axis of the manifest.
        key_axis: symbol of all P + T positions, such as those of the mask and of the keys in maps.
        caches: the cache inputs; a sequence gives all of them.
        inputs: all other inputs of the continuing graph, in the order of the graph.
        outputs: its outputs.
        certificate: whether rows, and padding along `follows`, can change an answer; None: sequences run alone.
        batched: whether sequences of equal P share runs, under the policy that the manifest is for.
        paddable: whether sequences of equal P and different T share runs, under that policy.
        golden: golden answers of this graph; None: it has none.
        without_scores: names of the sites whose scores the prompt graph alone returns.
    """

    file: FileName = PAST_FILE
    axis: Symbol
    follows: Symbol
    key_axis: Symbol
    caches: Annotated[tuple[CacheSpec, ...], Field(min_length=1)]
    inputs: tuple[InputSpec, ...]
    outputs: Annotated[tuple[OutputSpec, ...], Field(min_length=1)]
    certificate: Certificate | None = None
    batched: bool = False
    paddable: bool = False
    golden: GoldenSpec | None = None
    without_scores: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        if len({self.axis, self.follows, self.key_axis}) < 3:
            raise ValueError("past: axis, follows and key_axis must be three symbols")
        names = [spec.name for spec in self.all_inputs]
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            raise ValueError(f"past: input names are used twice: {doubled}")
        if not any(self.axis in cache.input.shape for cache in self.caches):
            raise ValueError(f"past: no cache input has axis {self.axis}")
        return self

    @property
    def all_inputs(self) -> tuple[InputSpec, ...]:
        """The inputs of the graph: the plain ones, then the cache inputs."""
        return (*self.inputs, *(cache.input for cache in self.caches))

    @property
    def cache_names(self) -> frozenset[str]:
        """Names of the cache inputs."""
        return frozenset(cache.input.name for cache in self.caches)

    def under(self, batching: Batching) -> PastSpec:
        """Return the past for a policy: `batched` and `paddable`, by its certificate."""
        clauses = () if self.certificate is None else self.certificate.clauses
        allowed = {clause.axis for clause in clauses if clause.allows(batching)}
        batched = BATCH in allowed
        return self.model_copy(update={"batched": batched, "paddable": batched and self.follows in allowed})

    def check(self, manifest: Manifest) -> None:
        """Check that the continuing graph agrees with the manifest of the prompt graph. Raise ValueError if not."""
        declared = {axis.symbol: axis for axis in manifest.axes}
        new = declared.get(self.follows)
        if new is None or new.fixed or new.derived is not None:
            raise ValueError(f"past: {self.follows} is not a given axis of variable length")
        if new.max_length < 2:
            raise ValueError(f"past: axis {self.follows} has no room for a past and a new position")
        taken = sorted({self.axis, self.key_axis} & set(declared))
        if taken:
            raise ValueError(f"past: axis symbols {taken} belong to the prompt graph")
        shapes = [(spec.name, spec.shape) for spec in self.all_inputs]
        shapes += [(spec.name, spec.shape) for spec in self.outputs]
        for name, shape in shapes:
            symbols = {extent for extent in shape if isinstance(extent, str)}
            unknown = sorted(symbols - {*declared, self.axis, self.key_axis})
            if unknown:
                raise ValueError(f"past: {name}: axis symbols {unknown} are not declared")
        for site in manifest.sites:
            if site.available and site.band is not None and not site.whole_rows:
                raise ValueError(f"past: the weights of site {site.name} are a band, which a past would move")
        self._check_answers(manifest)

    def _check_answers(self, manifest: Manifest) -> None:
        usual = {spec.name for spec in manifest.outputs if not spec.on_request}
        missing = sorted(usual - {spec.name for spec in self.outputs})
        if missing:
            raise ValueError(f"past: {missing} are not outputs after a past")
        known = {spec.name for spec in (*self.outputs, *manifest.outputs)}
        unknown = sorted({cache.present for cache in self.caches if cache.present} - known)
        if unknown:
            raise ValueError(f"past: {unknown} continue cache inputs, but are not outputs")
        clauses = () if self.certificate is None else self.certificate.clauses
        if self.certificate is not None and not {BATCH, self.follows} <= {clause.axis for clause in clauses}:
            raise ValueError(f"past: its certificate needs clauses for {BATCH} and {self.follows}")

    def continuing(self, manifest: Manifest) -> Manifest:
        """Return the manifest of the continuing graph, from that of the prompt graph."""
        changed = {
            "axes": self._axes(manifest.axes),
            "inputs": self.all_inputs,
            "outputs": self.outputs,
            "sites": tuple(map(self._site, manifest.sites)),
            "max_batch_size": manifest.max_batch_size if self.batched else 1,
            "certificate": self.certificate,
            "golden": self.golden,
            "past": None,
        }
        # Not `model_copy`, which would also copy what the manifest keeps about its own axes.
        return type(manifest).model_construct(**{**dict(manifest), **changed})

    def _axes(self, axes: Sequence[AxisSpec]) -> tuple[AxisSpec, ...]:
        """The axes of the continuing graph. P + T is at most the greatest length of a prompt."""
        longest = next(axis.max_length for axis in axes if axis.symbol == self.follows)
        kept = (
            axis.model_copy(update={"max_length": longest - 1, "paddable": self.paddable})
            if axis.symbol == self.follows
            else axis.model_copy(update={"paddable": False})
            for axis in axes
        )
        both = DerivedLength(source=self.follows, stride=1, plus=self.axis)
        return (
            *kept,
            AxisSpec(symbol=self.axis, max_length=longest - 1, paddable=False),
            AxisSpec(symbol=self.key_axis, max_length=longest, paddable=self.paddable, derived=both),
        )

    def _site(self, site: SiteSpec) -> SiteSpec:
        """A site as the continuing graph has it: keys along the new positions' axis are those of the past too."""
        if site.name in self.without_scores:
            site = site.model_copy(update={"scores_output": None, "scores_unavailable_reason": _NO_SCORES})
        if site.key_axis != self.follows:
            return site
        return site.model_copy(update={"key_axis": self.key_axis, "band": None, "whole_rows": False})
