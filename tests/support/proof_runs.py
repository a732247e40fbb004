"""Runs of a case: a sequence alone, among others and padded, and whether they confirm its verdicts.

A case is a graph with the verdicts that the proof of batching must give: whether padding and other rows can change an
answer. `faults_of` returns each wrong verdict as a sentence, and raises what the proof or the runtime raises.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from attnserve_server.conversion.proof.prove import Proof
from attnserve_server.model.certificate import Clause
from attnserve_server.model.equality import WEIGHTS_PREFIX, Equality
from attnserve_server.model.manifest import BATCH, NUMPY_DTYPES, InputRole, InputSpec
from proof_cases import PROVED, REFUTED, UNKNOWN, VOCABULARY, Case

Array = np.ndarray[Any, np.dtype[Any]]
Feeds = dict[str, Array]

ROUNDS = 12
"""The number of random sequences that a case is run with: enough to show each difference in the tables."""


@dataclass(frozen=True)
class Runs:
    """Runs of one case: a sequence alone, and the same one among others and padded."""

    case: Case
    proof: Proof
    seed: int = 0

    def worst(self, axis: str) -> float:
        """Return the greatest difference by other rows (`batch`) or padding along a symbol. Above 1: not equal."""
        rng = np.random.default_rng(self.seed)
        worst = 0.0
        for turn in range(ROUNDS):
            worst = max(worst, self._once(rng, axis, turn))
            if worst > 1:
                return worst
        return worst

    def _once(self, rng: np.random.Generator, axis: str, turn: int) -> float:
        lengths = {symbol: int(rng.integers(self.case.shortest, 7)) for symbol in self.case.signature.symbols}
        own = self._content(rng, lengths, holes=turn % 2 == 1)
        fixed = self.case.signature.fixed_batch
        alone = self._run({name: array[None] for name, array in own.items()}, 1)
        if axis == BATCH:
            if fixed:
                return 0.0
            count, place = int(rng.integers(2, 4)), 0
            others = [
                self._content(rng, lengths, holes=True, scale=10.0 if turn % 3 else 1.0) for _ in range(count - 1)
            ]
            place = int(rng.integers(0, count))
            rows = [*others[:place], own, *others[place:]]
            together = self._run({name: np.stack([row[name] for row in rows]) for name in own}, count)
            return self._error(alone, together, lengths, place)
        more = {**lengths, axis: lengths[axis] + int(rng.integers(1, 9))}
        padded = {spec.name: _padded(own[spec.name], spec, more)[None] for spec in self.case.signature.inputs}
        return self._error(alone, self._run(padded, 1), lengths, 0)

    def _content(
        self, rng: np.random.Generator, lengths: Mapping[str, int], *, holes: bool, scale: float = 1.0
    ) -> Feeds:
        feeds = {}
        for spec in self.case.signature.inputs:
            shape = [lengths[extent] if isinstance(extent, str) else extent for extent in spec.shape]
            array = self._drawn(rng, spec, shape, scale)
            need = next((mask for mask in self.proof.masks if mask.input == spec.name), None)
            if spec.role is InputRole.ATTENTION_MASK or need is not None:
                array = self._mask(rng, spec, shape, array, holes=holes and (need is None or need.need == "some"))
                assert need is None or need.met_by(array, spec.padding)
            feeds[spec.name] = array
        return feeds

    def _drawn(self, rng: np.random.Generator, spec: InputSpec, shape: Sequence[int], scale: float) -> Array:
        dtype = NUMPY_DTYPES[spec.dtype]
        low_high = self.case.content.get(spec.name)
        if low_high is not None:
            return np.asarray(rng.uniform(*low_high, shape), dtype)
        if dtype == np.bool_:
            return np.asarray(rng.integers(0, 2, shape), dtype)
        if np.issubdtype(dtype, np.floating):
            return np.asarray(rng.normal(size=shape) * scale * self.case.scale, dtype)
        return np.asarray(rng.integers(0, VOCABULARY, shape), dtype)

    @staticmethod
    def _mask(rng: np.random.Generator, spec: InputSpec, shape: Sequence[int], array: Array, *, holes: bool) -> Array:
        hidden = NUMPY_DTYPES[spec.dtype].type(spec.padding)
        if spec.role is InputRole.TOKEN_IDS:
            allowed: Array = np.where(array == hidden, hidden + 1, array)
        else:
            allowed = np.full(shape, 0 if spec.padding else 1, NUMPY_DTYPES[spec.dtype])
        if not holes or not shape:
            return allowed
        gone = rng.random(shape) < 0.4
        gone[..., int(rng.integers(0, shape[-1]))] = False
        return np.where(gone, hidden, allowed)

    def _run(self, feeds: Feeds, rows: int) -> Feeds:
        graph = {value.name: value for value in self.case.session.get_inputs()}
        given = {name: array for name, array in feeds.items() if name in graph}
        for name in graph:
            if name not in given:  # of a tap
                given[name] = np.arange(rows, dtype=np.int64)
        names = [value.name for value in self.case.session.get_outputs()]
        return dict(zip(names, self.case.session.run(None, given), strict=True))

    def _error(self, alone: Feeds, together: Feeds, lengths: Mapping[str, int], place: int) -> float:
        equality = Equality(self.case.precision)
        worst = 0.0
        targets = [(spec.name, spec.shape) for spec in self.case.outputs]
        targets += [(site.weights_output or "", (site.heads, *site.weight_axes)) for site in self.case.sites]
        for name, shape in targets:
            cut = [slice(self._extent(extent, lengths)) for extent in shape]
            one, other = alone[name][0], together[name][place][tuple(cut)]
            said = f"{WEIGHTS_PREFIX}{name}" if name == self.case.weights else name
            worst = max(worst, equality.error(said, other, one))
        return worst

    def _extent(self, extent: str | int, lengths: Mapping[str, int]) -> int:
        if isinstance(extent, int):
            return extent
        form = self.case.derived.get(extent)
        return lengths[extent] if form is None else form.of(lengths[form.source])


def _padded(own: Array, spec: InputSpec, lengths: Mapping[str, int]) -> Array:
    shape = [lengths[extent] if isinstance(extent, str) else extent for extent in spec.shape]
    padded = np.full(shape, NUMPY_DTYPES[spec.dtype].type(spec.padding), NUMPY_DTYPES[spec.dtype])
    padded[tuple(slice(size) for size in own.shape)] = own
    return padded


def faults_of(case: Case) -> list[str]:
    """Return the errors of the proof of a case, and contradictions with its runs. Empty: the table is right."""
    proof = case.proof()
    faults = [fault for clause in proof.clauses for fault in _of_clause(case, clause)]
    needs = {need.input: need.need for need in proof.masks}
    if case.needs is not None and needs != case.needs:
        faults.append(f"needs {needs}, not {dict(case.needs)}")
    if bool(proof.causal_sites) != case.causal:
        faults.append(f"causal sites are {set(proof.causal_sites)}")
    if case.run:
        runs = Runs(case, proof)
        for clause in proof.clauses:
            faults += _of_runs(case, clause, runs)
    return faults


def _of_clause(case: Case, clause: Clause) -> list[str]:
    expected, why = case.expected(clause.axis), case.why.get(clause.axis, "")
    if clause.verdict is not expected:
        return [f"{clause.axis} is {clause.verdict}, not {expected}: {clause.reason}"]
    if why not in clause.reason:
        return [f"{clause.axis} is {clause.verdict} because of {clause.reason!r}, not of {why!r}"]
    if (clause.verdict is PROVED) == bool(clause.reason):
        return [f"{clause.axis} is {clause.verdict} with the reason {clause.reason!r}"]
    return []


def _of_runs(case: Case, clause: Clause, runs: Runs) -> list[str]:
    if clause.verdict is UNKNOWN or (clause.axis == BATCH and case.signature.fixed_batch):
        return []
    worst = runs.worst(clause.axis)
    if clause.verdict is PROVED and worst > 1:
        return [f"UNSOUND: {clause.axis} is proved, and a run differs by {worst:.3g} of what is allowed"]
    if clause.verdict is REFUTED and worst <= 1:
        return [f"{clause.axis} is refuted ({clause.reason}), and no run differs"]
    return []
