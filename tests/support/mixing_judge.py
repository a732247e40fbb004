"""Compare verdicts of the proof with the truth of generated graphs, and summarise many such comparisons.

The proof gives a verdict for the batch and each axis: whether other rows or padding can change an answer. A wrong
verdict is returned as a fault, and so is an exception of the proof. Only a graph that must be run and cannot be loaded
raises, with onnxruntime's error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from attnserve_server.conversion.proof import Proof, prove
from attnserve_server.model.certificate import Clause, Verdict
from attnserve_server.model.manifest import BATCH
from mixing_graphs import MixingGraph, mixing_graph
from mixing_values import UNSAID, Need
from mixing_witness import CLEAR, Witness, satisfying

Prover = Callable[[MixingGraph], Proof]


@dataclass(frozen=True, slots=True)
class Judgement:
    """One clause with its truth: `poison` as in `MixingGraph`; `fault` is empty where the verdict is right."""

    seed: int
    axis: str
    poison: str
    verdict: str
    pieces: tuple[str, ...]
    fault: str = ""
    reason: str = ""

    @property
    def unmixed(self) -> bool:
        """True if nothing is known to be mixed, so that a proof is expected."""
        return not self.poison


def proved_by_default(graph: MixingGraph) -> Proof:
    """Return the product's proof of a graph without taps."""
    return prove(
        graph.proto,
        graph.signature,
        graph.outputs,
        (),
        max_lengths=graph.max_lengths,
        derived=graph.derived,
        precision="fp32",
    )


def judged(graph: MixingGraph, prover: Prover = proved_by_default) -> list[Judgement]:
    """Return a judgement for `batch` and for each symbol. An exception of the proof is a fault of each."""
    try:
        proof = prover(graph)
    except Exception as fault:  # noqa: BLE001 - any exception is a finding, and the run continues with the next graph
        said = f"raised {type(fault).__name__}: {fault}"
        return [Judgement(graph.seed, axis, graph.poison(axis), "raised", graph.pieces, said) for axis in graph.axes]
    clauses = {clause.axis: clause for clause in proof.clauses}
    return [_judged(graph, axis, clauses.get(axis), proof) for axis in graph.axes]


def _judged(graph: MixingGraph, axis: str, clause: Clause | None, proof: Proof) -> Judgement:
    poison = graph.poison(axis)
    if clause is None:
        return Judgement(graph.seed, axis, poison, "missing", graph.pieces, "there is no clause of this axis")
    fault = _fault(graph, axis, clause, proof)
    return Judgement(graph.seed, axis, poison, str(clause.verdict), graph.pieces, fault, clause.reason)


def _fault(graph: MixingGraph, axis: str, clause: Clause, proof: Proof) -> str:
    """Return what is wrong with a clause, or an empty string."""
    if clause.verdict is Verdict.PROVED and graph.poison(axis) not in {"", UNSAID}:
        return f"UNSOUND: proved, but mixed by {graph.poison(axis)}"
    for output, verdict in clause.targets.items():
        poison = graph.truths.get(output, {}).get(axis, UNSAID)
        if verdict is Verdict.PROVED and poison not in {"", UNSAID}:
            return f"UNSOUND: {output} proved, but mixed by {poison}"
    if clause.verdict is Verdict.PROVED and axis != BATCH:
        unmet = [need for need in graph.needs_of(axis) if not _met(need, proof)]
        if unmet and changes(graph, axis, proof):
            return f"UNSOUND: proved without the need {unmet[0]}, and masks that break it change the answer"
    if clause.verdict is Verdict.REFUTED and not (clause.reason and clause.path):
        return "refuted without a reason and a path"
    if clause.verdict is Verdict.UNKNOWN and not clause.reason:
        return "unknown without a reason"
    return ""


def _met(need: Need, proof: Proof) -> bool:
    """Return whether a proof requires at least as much of a mask as is needed."""
    asked = [mask for mask in proof.masks if mask.input == need.input]
    enough = {"some": {"some", "all"}, "all": {"all"}}[need.need]
    return any(mask.need in enough for mask in asked) and (
        not need.ones or any(mask.allowed_value == 1 for mask in asked)
    )


def changes(graph: MixingGraph, axis: str, proof: Proof) -> bool:
    """Return whether running a graph shows that an axis changes an answer, under masks that meet the proof's needs.

    The difference must be clear: more than float32's rounding of sums in another order.
    """
    along = [] if axis == BATCH else [spec.name for spec in graph.signature.inputs if axis in spec.shape]
    asked = [Need(mask.input, mask.need, ones=mask.allowed_value == 1) for mask in proof.masks if mask.input in along]
    worst = Witness(graph).worst(axis, satisfying(asked), 2, enough=CLEAR)
    return max(worst.values()) > CLEAR


@dataclass(frozen=True, slots=True)
class Summary:
    """Many judgements."""

    judgements: tuple[Judgement, ...]

    @classmethod
    def of(cls, seeds: Iterable[int], prover: Prover = proved_by_default) -> Summary:
        """Return the judgements of the graphs of these seeds."""
        return cls(tuple(each for seed in seeds for each in judged(mixing_graph(seed), prover)))

    @property
    def faults(self) -> list[Judgement]:
        """The judgements with a fault."""
        return [each for each in self.judgements if each.fault]

    @property
    def proved_share(self) -> float:
        """The share of unmixed clauses that is proved."""
        unmixed = [each for each in self.judgements if each.unmixed]
        return sum(each.verdict == "proved" for each in unmixed) / max(len(unmixed), 1)

    def by_poison(self) -> dict[str, Counter[str]]:
        """Counts of verdicts for each poison. Unmixed clauses are under "(unmixed)"."""
        table: dict[str, Counter[str]] = {}
        for each in self.judgements:
            table.setdefault(each.poison or "(unmixed)", Counter())[each.verdict] += 1
        return table

    def by_piece(self) -> dict[str, Counter[str]]:
        """Counts of verdicts of unmixed clauses for each piece in their graphs."""
        table: dict[str, Counter[str]] = {}
        for each in self.judgements:
            for piece in set(each.pieces) if each.unmixed else ():
                table.setdefault(piece, Counter())[each.verdict] += 1
        return table
