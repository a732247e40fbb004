"""The attack on a certificate: runs that try to change a sequence's answer by padding it, or by its batch neighbours.

A clause states whether the batch, or padding along one axis, can change an answer. A probe is one batch to try.

`probes` lists the batches that are tried, `contents` the contents of their sequences. Each row of a batch is
compared with its own answer alone, outputs and weights, by the rule of equality. A difference is attributed to padding
where the sequence, padded alone, differs too, and otherwise to its neighbours. Sequences that the server would not pad,
because their masks do not meet the proof's needs, are not padded here either.

A proved clause gets at most 20 probes, as a check of the proof. Any other gets probes until they are exhausted, for
several seeds, or until its share of the time is used up. The attack is deterministic except for when its time ends. A
run that fails counts as a difference; a run that would exceed the time or the memory is skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Final

from attnserve_server.conversion.proof import probes
from attnserve_server.conversion.proof.aim import Aim, Probe
from attnserve_server.conversion.proof.answers import Answers, OutOfTime
from attnserve_server.conversion.proof.judge import Judge, Outcome
from attnserve_server.conversion.proof.prove import Proof
from attnserve_server.conversion.proof.target import Target
from attnserve_server.domain.clock import Clock, MonotonicClock
from attnserve_server.model.certificate import AttackReport, Clause, Verdict
from attnserve_server.model.equality import Equality
from attnserve_server.model.manifest import BATCH

DEFAULT_SECONDS: Final = 60.0
_PROVED_SHARE: Final = 0.2
"""The maximum share of the attack's time that checks one proved clause."""
_CORE_FACTOR: Final = 2.0
"""Core probes may take this many times the attack's time, so that a busy machine does not change a verdict."""
_JOINT: Final = 6
"""The number of probes of a proved batch that join rows of unequal lengths."""

_Stage = tuple[str, Callable[[], Iterable[Probe]]]
"""An axis, and its probes, which are planned when the stage begins."""


@dataclass(slots=True)
class _Tally:
    """The results of the attack on one clause so far."""

    probes: int = 0
    seconds: float = 0.0
    worst: float = 0.0
    broke: str = ""
    complete: bool = True

    def report(self) -> AttackReport:
        return AttackReport(
            probes=self.probes,
            seconds=round(self.seconds, 2),
            worst=float(f"{self.worst:.3g}"),
            broke=self.broke,
            complete=self.complete,
        )


def attack(
    target: Target,
    proof: Proof,
    equality: Equality,
    *,
    seconds: float = DEFAULT_SECONDS,
    report: Callable[[str], None] = lambda _: None,
    clock: Clock | None = None,
) -> tuple[Clause, ...]:
    """Try to break every clause of a proof that is not refuted.

    Args:
        target: The model.
        proof: The clauses, the mask needs, and the thresholds to straddle.
        equality: The rule of equality.
        seconds: The time of the whole attack, 0 or more. 0: nothing is tried.
        report: Called with the progress at every probe.
        clock: The clock. None: the machine's.

    Returns:
        The clauses in their order, each with its report. A refuted clause, and the batch of a graph that takes one row,
        have none.
    """
    return _Attack(target, proof, equality, seconds, report, clock or MonotonicClock()).clauses()


class _Attack:
    """The attack on one model. For one use."""

    def __init__(
        self,
        target: Target,
        proof: Proof,
        equality: Equality,
        seconds: float,
        report: Callable[[str], None],
        clock: Clock,
    ) -> None:
        self._answers = Answers(target, proof.masks, clock)
        self._judge = Judge(self._answers, equality)
        self._proof = proof
        self._aim = aim = _aim(self._answers, proof)
        self._seconds = seconds
        self._report = report
        self._end = clock.now() + seconds
        attacked = [
            clause
            for clause in proof.clauses
            if clause.verdict is not Verdict.REFUTED and (clause.axis != BATCH or aim.max_batch_size > 1)
        ]
        self._proved = {clause.axis for clause in attacked if clause.verdict is Verdict.PROVED}
        self._tallies = {clause.axis: _Tally() for clause in attacked}

    def clauses(self) -> tuple[Clause, ...]:
        """Run the whole attack."""
        symbols = [symbol for symbol in self._aim.longest if symbol in self._tallies]
        stages: list[_Stage] = [(symbol, partial(self._padding, symbol)) for symbol in symbols]
        if BATCH in self._tallies:
            # First, because it decides whether rows may share the runs of the other stages. Joint probes come last.
            stages = [(BATCH, self._equal), *stages, (BATCH, partial(self._joint, symbols))]
        # The core probes of all clauses come before the rest of any clause.
        passes = [(axis, planned, core) for core in (True, False) for axis, planned in stages]
        for done, (axis, planned, core) in enumerate(passes):
            left = sum(later not in self._proved for later, _, at in passes[done:] if at is core)
            end = self._end + (_CORE_FACTOR - 1) * self._seconds * core
            share = (end - self._answers.now()) / max(left, 1)
            most = self._seconds * _PROVED_SHARE if axis in self._proved else share
            self._stage(axis, [probe for probe in planned() if probe.core is core], min(most, share))
        return tuple(
            clause.model_copy(update={"attack": self._tallies[clause.axis].report()})
            if clause.axis in self._tallies
            else clause
            for clause in self._proof.clauses
        )

    @property
    def _rows_join(self) -> bool:
        """True if the batch is not broken, so that rows may share a run."""
        return BATCH in self._tallies and not self._tallies[BATCH].broke

    def _equal(self) -> Iterable[Probe]:
        if BATCH in self._proved:
            return islice(probes.proved_batch_probes(self._aim), probes.MAX_PROVED_PROBES - _JOINT)
        return probes.batch_probes(self._aim)

    def _padding(self, symbol: str) -> Iterable[Probe]:
        if symbol in self._proved:
            return probes.proved_padding_probes(self._aim, symbol)
        return probes.padding_probes(self._aim, symbol)

    def _joint(self, symbols: Sequence[str]) -> Iterator[Probe]:
        """Yield probes of unequal lengths, along the axes that are not broken when the stage begins."""
        standing = [symbol for symbol in symbols if not self._tallies[symbol].broke]
        if standing and self._rows_join:
            proved = self._proved >= {BATCH, *standing}
            yield from islice(probes.joint_probes(self._aim, standing, proved=proved), _JOINT if proved else None)

    def _stage(self, axis: str, planned: Sequence[Probe], seconds: float) -> None:
        """Run the probes of one stage, until its clause is broken or its time is over."""
        begun = self._answers.now()
        self._answers.deadline = begun + seconds
        for done, probe in enumerate(planned):
            if self._is_done(axis):
                break
            self._report(f"attacking {axis}: {done + 1} of {len(planned)} probes")
            self._probe(axis, probe)
        self._tallies[axis].seconds += self._answers.now() - begun

    def _probe(self, axis: str, probe: Probe) -> None:
        """Run one probe: its rows together while rows may share a run, otherwise one by one."""
        tally, joined = self._tallies[axis], axis == BATCH or self._rows_join
        # Rows that never share a run are never padded either, so only the core probes are worth their time then.
        singles = [replace(probe, rows=(row,)) for row in probe.rows] if probe.core else []
        for each in [probe] if joined else singles:
            if self._is_done(axis):
                return
            try:
                self._count(axis, self._judge.outcome(each))
            except OutOfTime:
                tally.complete = tally.complete and not probe.core
        if joined and axis != BATCH and not self._rows_join:
            self._probe(
                axis, probe
            )  # neighbours caused the difference: run the rows one by one, to test the padding itself

    def _is_done(self, axis: str) -> bool:
        """Return whether a clause is broken, or the check of its proof is complete."""
        tally = self._tallies[axis]
        return bool(tally.broke) or (axis in self._proved and tally.probes >= probes.MAX_PROVED_PROBES)

    def _count(self, axis: str, outcome: Outcome) -> None:
        tally = self._tallies[axis]
        tally.probes += outcome.tried
        tally.worst = max(tally.worst, outcome.worst)
        for broken_axis, broken in outcome.broken.items():
            # No probe pads along an axis whose clause is refuted, so such an axis never breaks here.
            blamed = self._tallies[broken_axis]
            blamed.worst = max(blamed.worst, broken.error)
            blamed.broke = blamed.broke or broken.sentence


def _aim(answers: Answers, proof: Proof) -> Aim:
    target = answers.target
    longest = {symbol: _longest(answers, symbol) for symbol in target.max_lengths}
    return Aim(longest, proof.thresholds, target.rows, answers.author.contents, answers.rows_that_fit)


def _longest(answers: Answers, symbol: str) -> int:
    """Return the greatest length of an axis, by halving, for which one row fits into the memory of a run."""
    max_lengths = answers.target.max_lengths
    length = max_lengths[symbol]
    while length > 1 and not answers.rows_that_fit({**dict.fromkeys(max_lengths, 1), symbol: length}):
        length //= 2
    return length
