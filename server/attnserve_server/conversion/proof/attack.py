"""The attack on a certificate: runs that try to change a sequence's answer by padding it, or by its batch neighbours.

`probes` lists the kinds of batches that are tried, `contents` what their sequences hold. Each row of a batch is
compared with its own answer alone, outputs and weights, by the one rule of equality. A difference is laid to padding
where the sequence, padded alone, differs too, and else to its neighbours. Sequences that the server would not pad,
because their masks do not hold what the proof takes for granted, are not padded here either.

A proved clause gets at most 20 probes, as a check of the proof. Any other gets probes until they are exhausted, several
seeds over, or until its share of the time is spent. The attack is deterministic but for where its time ends.
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
"""Of the attack's time, at most so much checks one proved clause."""
_CORE_FACTOR: Final = 2.0
"""What an attack is not complete without may take so many times its time: a busy machine must not change a verdict."""
_JOINT: Final = 6
"""Probes of a proved batch that join rows of unequal lengths."""

_Stage = tuple[str, Callable[[], Iterable[Probe]]]
"""An axis, and the probes of it that are planned once the stage begins."""


@dataclass(slots=True)
class _Tally:
    """What came of the attack on one clause so far."""

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
        target: the model.
        proof: the clauses, what they take for granted of masks, and the thresholds to straddle.
        equality: what counts as equal.
        seconds: for the whole attack, 0 or more. 0: nothing is tried.
        report: is called with the progress, at every probe.
        clock: tells time; None: the machine's.

    Returns:
        The clauses in their order, each with its report. A refuted clause, and the batch of a graph that takes one row,
        have none.
    """
    return _Attack(target, proof, equality, seconds, report, clock or MonotonicClock()).clauses()


class _Attack:
    """The attack on one model. Used once."""

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
            # First, since it decides whether rows may share the runs of the other stages; joint probes come last.
            stages = [(BATCH, self._equal), *stages, (BATCH, partial(self._joint, symbols))]
        # What an attack is not complete without comes before the rest of any clause.
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
        """Whether the batch still stands, so that rows may share a run."""
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
        """Probes of unequal lengths, along the axes that stand by the time that this is begun."""
        standing = [symbol for symbol in symbols if not self._tallies[symbol].broke]
        if standing and self._rows_join:
            proved = self._proved >= {BATCH, *standing}
            yield from islice(probes.joint_probes(self._aim, standing, proved=proved), _JOINT if proved else None)

    def _stage(self, axis: str, planned: Sequence[Probe], seconds: float) -> None:
        """Run the probes of one stage, until it is broken or its time is over."""
        begun = self._answers.now()
        self._answers.deadline = begun + seconds
        for done, probe in enumerate(planned):
            if self._is_done(axis):
                break
            self._report(f"attacking {axis}: {done + 1} of {len(planned)} probes")
            self._probe(axis, probe)
        self._tallies[axis].seconds += self._answers.now() - begun

    def _probe(self, axis: str, probe: Probe) -> None:
        """Run one probe: its rows together while rows may share a run, else one by one."""
        tally, joined = self._tallies[axis], axis == BATCH or self._rows_join
        # What is never batched is never padded either, so the core is all that is worth its time then.
        singles = [replace(probe, rows=(row,)) for row in probe.rows] if probe.core else []
        for each in [probe] if joined else singles:
            if self._is_done(axis):
                return
            try:
                self._count(axis, self._judge.outcome(each))
            except OutOfTime:
                tally.complete = tally.complete and not probe.core
        if joined and axis != BATCH and not self._rows_join:
            self._probe(axis, probe)  # neighbours were to blame: what padding does is still to be seen

    def _is_done(self, axis: str) -> bool:
        """Whether a clause is broken, or its proof is checked."""
        tally = self._tallies[axis]
        return bool(tally.broke) or (axis in self._proved and tally.probes >= probes.MAX_PROVED_PROBES)

    def _count(self, axis: str, outcome: Outcome) -> None:
        tally = self._tallies[axis]
        tally.probes += outcome.tried
        tally.worst = max(tally.worst, outcome.worst)
        for broken_axis, broken in outcome.broken.items():
            # A padded axis whose clause is refuted is never blamed: no probe pads along it.
            blamed = self._tallies[broken_axis]
            blamed.worst = max(blamed.worst, broken.error)
            blamed.broke = blamed.broke or broken.sentence


def _aim(answers: Answers, proof: Proof) -> Aim:
    target = answers.target
    longest = {symbol: _longest(answers, symbol) for symbol in target.max_lengths}
    return Aim(longest, proof.thresholds, target.rows, answers.author.contents, answers.rows_that_fit)


def _longest(answers: Answers, symbol: str) -> int:
    """The greatest length of an axis, others short, for which one row fits a run's memory; by halves."""
    max_lengths = answers.target.max_lengths
    length = max_lengths[symbol]
    while length > 1 and not answers.rows_that_fit({**dict.fromkeys(max_lengths, 1), symbol: length}):
        length //= 2
    return length
