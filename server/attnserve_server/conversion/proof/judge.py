"""Judge one probe: which answers a batch changed, whether padding or neighbours caused it, and a sentence about it.

A probe is a batch that an attack on the model tries. Differences that rounding explains do not count. A batch that
fails to run counts as changed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.probing.feeds import Lengths
from attnserve_server.conversion.proof.aim import Probe
from attnserve_server.conversion.proof.answers import Answer, Answers, Difference, compare
from attnserve_server.conversion.proof.contents import Draft
from attnserve_server.conversion.proof.noise import is_rounding, shaken
from attnserve_server.model.equality import WEIGHTS_PREFIX, Equality
from attnserve_server.model.manifest import BATCH

_SHAKES: Final = 3
_SUSPECTS: Final = 4
"""The number of rows of one batch that are examined, those with the greatest difference first."""


@dataclass(frozen=True, slots=True)
class Broken:
    """How a clause was broken.

    Args:
        error: The difference as a multiple of the allowed one.
        sentence: The sequence, its batch and the difference, in words.
    """

    error: float
    sentence: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of one probe.

    Args:
        tried: True if it compared anything.
        worst: The greatest error of the answers that count as equal, as a multiple of the allowed one.
        broken: The broken clauses by axis.
    """

    tried: bool
    worst: float = 0.0
    broken: Mapping[str, Broken] = field(default_factory=dict)


class Judge:
    """Runs probes and judges them. For use by one thread."""

    def __init__(self, answers: Answers, equality: Equality) -> None:
        self.answers = answers
        self._equality = equality

    def outcome(self, probe: Probe) -> Outcome:
        """Run a probe and compare each of its rows with its answer alone.

        Rows without an answer alone are skipped, and so are rows that the server would not pad.

        Raises:
            OutOfTime: The deadline is too near.
        """
        rows = [draft for draft in probe.rows if self._counts(draft, probe.to)]
        padded = any(draft.own != probe.to for draft in rows)
        if not rows or (len(rows) == 1 and not padded):
            return Outcome(tried=False)
        answers = self._run(rows, probe.to)
        differences = [self._difference(draft, answer) for draft, answer in zip(rows, answers, strict=True)]
        worst = max((each.error for each in differences if each.error <= 1), default=0.0)
        suspects = [at for at, difference in enumerate(differences) if difference.error > 1]
        for at in sorted(suspects, key=lambda at: -differences[at].error)[:_SUSPECTS]:
            if not self._is_rounding(rows[at], answers[at]):
                return Outcome(True, worst, self._broken(rows, at, probe.to, differences[at]))
        return Outcome(True, worst)

    def _counts(self, draft: Draft, padded: Lengths) -> bool:
        served = draft.own == padded or self.answers.may_pad(draft)
        return served and self.answers.alone(draft) is not None

    def _broken(self, rows: Sequence[Draft], at: int, padded: Lengths, seen: Difference) -> dict[str, Broken]:
        """Return the clauses that the row at `at` breaks. Its answer differs in the whole batch as `seen`."""
        draft = rows[at]
        if draft.own != padded:
            lone = self._changed([draft], 0, padded)
            if lone.error > 1:
                return self._broken_by_padding(draft, padded, lone)
        for other in dict.fromkeys([*rows[:at], *rows[at + 1 :]]):
            pair = self._changed([draft, other], 0, padded)
            if pair.error > 1:
                return {BATCH: Broken(pair.error, f"{_sequence(draft)}, beside {_sequence(other)}: {_words(pair)}")}
        beside = f"in row {at + 1} of {len(rows)}, of lengths {_lengths(padded)}"
        return {BATCH: Broken(seen.error, f"{_sequence(draft)}, {beside}: {_words(seen)}")}

    def _broken_by_padding(self, draft: Draft, padded: Lengths, lone: Difference) -> dict[str, Broken]:
        """Return the axes along which padding alone changes the answer. If only all of them together do, return all."""
        longer = {symbol: length for symbol, length in padded.items() if length != draft.own[symbol]}
        broken: dict[str, Broken] = {}
        for symbol, length in longer.items() if len(longer) > 1 else ():
            to = {**draft.own, symbol: length}
            difference = self._changed([draft], 0, to)
            if difference.error > 1:
                broken[symbol] = Broken(difference.error, _padding_words(draft, {symbol: length}, difference))
        return broken or dict.fromkeys(longer, Broken(lone.error, _padding_words(draft, longer, lone)))

    def _changed(self, rows: Sequence[Draft], at: int, padded: Lengths) -> Difference:
        """Return the difference of one row's answer in a batch. It is 0 where rounding explains it."""
        answer = self._run(rows, padded)[at]
        difference = self._difference(rows[at], answer)
        return Difference(0.0) if difference.error > 1 and self._is_rounding(rows[at], answer) else difference

    def _run(self, rows: Sequence[Draft], padded: Lengths) -> Sequence[Answer | str]:
        """Return the answers of a batch or, for each row, the reason why it does not run."""
        try:
            return self.answers.together(
                [self.answers.sequence(draft) for draft in rows], [row.own for row in rows], padded
            )
        except BuildRefused as fault:
            return [str(fault)] * len(rows)

    def _difference(self, draft: Draft, answer: Answer | str) -> Difference:
        if isinstance(answer, str):
            return Difference(math.inf, fault=answer)
        reference = self.answers.alone(draft)
        return compare(self._equality, answer, reference) if reference is not None else Difference(0.0)

    def _is_rounding(self, draft: Draft, answer: Answer | str) -> bool:
        reference = self.answers.alone(draft)
        if isinstance(answer, str) or reference is None:
            return False
        sequence = self.answers.sequence(draft)
        others: list[Answer] = []
        for seed in range(_SHAKES):
            changed = shaken(self.answers.target.sampler, sequence, seed)
            if changed is not None:
                others += self.answers.together([changed], [draft.own], draft.own)
        return is_rounding(answer, reference, self._equality, shaken=others, usual=self.answers.usual)


def _sequence(draft: Draft) -> str:
    lengths = f" with {_lengths(draft.own)}" if draft.own else ""
    return f"a sequence{lengths} ({draft.content})"


def _lengths(lengths: Lengths) -> str:
    return ", ".join(f"{symbol} {length}" for symbol, length in lengths.items())


def _padding_words(draft: Draft, padded: Lengths, difference: Difference) -> str:
    return f"{_sequence(draft)}, padded to {_lengths(padded)}: {_words(difference)}"


def _words(difference: Difference) -> str:
    if difference.fault:
        return difference.fault
    what = f"output {difference.name!r} differs"
    if difference.name.startswith(WEIGHTS_PREFIX):
        what = f"the weights of site {difference.name.removeprefix(WEIGHTS_PREFIX)} differ"
    if math.isinf(difference.error):
        return f"{what} without bound: in shape, or by values that are not finite"
    return f"{what} by {difference.by:.3g}, {difference.error:.3g} times the allowed difference"
