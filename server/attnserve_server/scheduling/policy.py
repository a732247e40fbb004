"""The batching policy: which of the waiting sequences go into the next run. Pure: no state, no clock, no loop.

The oldest always goes; the rest is chosen for the most useful tokens per unit of work. A run's work is its overhead, in
tokens, plus every position that it computes, padding included. On a CPU, where the overhead is worth nine tokens or so,
that makes small batches of near-equal lengths; where launches dominate, the same rule makes large ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from attnserve_server.domain.values import Priority

DEFAULT_RUN_OVERHEAD_TOKENS: Final = 9.0
"""What joining two runs saves on a CPU, in tokens of padding (measured: 2.2 ms a run, 0.23 ms a token)."""


@dataclass(frozen=True, slots=True)
class SchedulingSettings:
    """Bounds of runs and of the queue."""

    max_batch_size: int = 32
    """Most sequences in a run."""
    max_batch_tokens: int = 16_384
    """Most positions in a run, padding included; a longer sequence runs alone."""
    max_batch_bytes: int = 2**30
    """Most bytes of tensors in a run, attention maps included; a sequence that needs more runs alone."""
    max_queue_size: int = 4096
    """Most sequences waiting."""
    max_queue_bytes: int = 512 * 2**20
    """Most bytes that waiting sequences and their answers need."""
    look_ahead: int = 64
    """How many of the oldest are looked at for a run: more find better mates, and let a run's mates overtake more."""
    run_overhead_tokens: float | None = None
    """What one run costs before its first token, in tokens; None: as measured at warm-up."""
    wait_headroom: float = 1.25
    """Refuse when the predicted wait times this exceeds what the deadline leaves: predictions err by a fifth or so, and
    a refusal at once serves a caller better than an expiry after the wait."""
    high_head_start_s: float = 0.25
    """HIGH counts as having come this much earlier."""
    low_delay_s: float = 1.0
    """LOW counts as having come this much later: it waits longer, and never for ever."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """One waiting sequence, as the policy sees it.

    `lengths` are along the model's axes in their order. `rigid` are those along axes that do not pad: mates must agree.
    `footprint` gives its bytes in a run: for each tuple of axis indices, bytes for each position of their product.
    """

    rank_s: float
    """Arrival on the monotonic clock, moved by priority: the least is the oldest."""
    lengths: tuple[int, ...]
    deadline_s: float | None = None
    rigid: tuple[int, ...] = ()
    footprint: Mapping[tuple[int, ...], int] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Positions that carry data."""
        return sum(self.lengths)


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do now: run `indices` of the view, the oldest first (none if nothing waits), and give up `expired`."""

    indices: tuple[int, ...]
    expired: tuple[int, ...] = ()


def rank_s(arrived_s: float, priority: Priority, settings: SchedulingSettings) -> float:
    """The arrival that a sequence counts as having, for its place in line."""
    if priority is Priority.HIGH:
        return arrived_s - settings.high_head_start_s
    return arrived_s + (settings.low_delay_s if priority is Priority.LOW else 0.0)


def plan(view: Sequence[Waiting], now: float, settings: SchedulingSettings) -> Plan:
    """The next run.

    From the oldest outward in order of length, the better of the next shorter and the next longer sequence joins while
    useful tokens per (run overhead + padded tokens) rise and the bounds allow it. Since the oldest always goes,
    every sequence is the oldest after at most as many runs as there were sequences before it: nothing starves.

    Args:
        view: what waits, in any order.
        now: monotonic seconds; deadlines at or before it have passed.
        settings: the bounds. They never keep the oldest from going alone.
    """
    expired = tuple(at for at, one in enumerate(view) if one.deadline_s is not None and one.deadline_s <= now)
    gone = set(expired)
    line = sorted((at for at in range(len(view)) if at not in gone), key=lambda at: (view[at].rank_s, at))
    if not line:
        return Plan((), expired)
    oldest, *rest = line[: settings.look_ahead]
    mates = [at for at in rest if view[at].rigid == view[oldest].rigid]
    return Plan(_fill(view, oldest, mates, settings), expired)


@dataclass(slots=True)
class _Run:
    """A run being put together; lives within one call of `plan`."""

    members: list[int]
    useful: int
    padded: tuple[int, ...]
    footprint: dict[tuple[int, ...], int]

    def score_with(self, one: Waiting, overhead: float, max_tokens: int) -> float:
        """Useful tokens per unit of work if `one` joined; 0 if the run would then hold too many tokens."""
        tokens = (len(self.members) + 1) * sum(map(max, self.padded, one.lengths))
        return (self.useful + one.tokens) / (overhead + tokens) if tokens <= max_tokens else 0.0

    def bytes_with(self, one: Waiting) -> int:
        """Bytes of tensors if `one` joined."""
        padded = tuple(map(max, self.padded, one.lengths))
        total = 0
        for axes in self.footprint.keys() | one.footprint.keys():
            size = self.footprint.get(axes, 0) + one.footprint.get(axes, 0)
            for axis in axes:
                size *= padded[axis]
            total += size
        return total

    def add(self, at: int, one: Waiting) -> None:
        """Lets `one` join."""
        self.members.append(at)
        self.useful += one.tokens
        self.padded = tuple(map(max, self.padded, one.lengths))
        for axes, size in one.footprint.items():
            self.footprint[axes] = self.footprint.get(axes, 0) + size


def _fill(view: Sequence[Waiting], oldest: int, mates: Sequence[int], settings: SchedulingSettings) -> tuple[int, ...]:
    first = view[oldest]
    overhead = DEFAULT_RUN_OVERHEAD_TOKENS if settings.run_overhead_tokens is None else settings.run_overhead_tokens
    run = _Run([oldest], first.tokens, first.lengths, dict(first.footprint))
    # Each side is a stack with the nearest length on top. `mates` come oldest first, and sorts are stable: backwards,
    # they leave the older of equal lengths on top.
    younger_first = mates[::-1]
    shorter = sorted((at for at in younger_first if view[at].tokens < first.tokens), key=lambda at: view[at].tokens)
    longer = sorted((at for at in younger_first if view[at].tokens >= first.tokens), key=lambda at: -view[at].tokens)
    score = first.tokens / (overhead + first.tokens)
    while len(run.members) < settings.max_batch_size:
        best, side = max(
            (
                (run.score_with(view[side[-1]], overhead, settings.max_batch_tokens), side)
                for side in (shorter, longer)
                if side
            ),
            key=lambda pair: pair[0],
            default=(0.0, []),
        )
        if best <= score:
            if len(first.lengths) == 1 or not side:
                break  # along one axis, what lies further out than a mate that does not pay pays even less
            side.pop()  # along several, the next may still fit: equal totals can hide unlike lengths
            continue
        at = side.pop()
        if run.bytes_with(view[at]) <= settings.max_batch_bytes:
            run.add(at, view[at])
            score = best
    return tuple(run.members)
