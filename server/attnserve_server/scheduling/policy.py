"""The batching policy: which of the waiting sequences go into the next run. Pure: no state, no clock, no loop.

The oldest always goes; mates are chosen so that as much as can be of the run's time is spent on their own positions,
and as little as can be on padding and on launching the run. The cost model says what each is worth: on a CPU, where a
run's overhead is worth some ten tokens, that makes small batches of near-equal lengths; where launches dominate, large
ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from attnserve_server.domain.values import Priority
from attnserve_server.engine.cost import CostModel

Floats = npt.NDArray[np.float64]

PADDING_SHARE: Final = 0.5
"""How much of a run's overhead may be spent on padding one mate. At 1 it would be as cheap to run the mate alone; but a
mate that is left finds others, nearer in length, that share its overhead."""
AGE_SHARE: Final = 0.25
"""How much of a run's overhead the oldest is worth more than a newcomer, though of no more than its own row takes:
elsewhere age would choose everybody where launches dominate. The longer a mate has waited, the sooner it must go with
whatever is there: a shorter tail of latency, for a few thousandths of processor time."""


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
    look_ahead: int = 128
    """How many sequences are looked at as mates for the oldest: those nearest to it in length, of all that wait."""
    run_overhead_tokens: float | None = None
    """What one run costs before its first token, in tokens; None: as measured."""
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
    """What to do now: run `indices` of the view, the oldest first (none if nothing waits), and give up `expired`.

    These are past their deadlines, or so near to them that even a run of their own would end too late.
    """

    indices: tuple[int, ...]
    expired: tuple[int, ...] = ()


def rank_s(arrived_s: float, priority: Priority, settings: SchedulingSettings) -> float:
    """The arrival that a sequence counts as having, for its place in line."""
    if priority is Priority.HIGH:
        return arrived_s - settings.high_head_start_s
    return arrived_s + (settings.low_delay_s if priority is Priority.LOW else 0.0)


def plan(view: Sequence[Waiting], now: float, settings: SchedulingSettings, cost: CostModel, pace: float = 0.0) -> Plan:
    """The next run.

    Since the oldest always goes, every sequence is the oldest after at most as many runs as there were sequences before
    it: nothing starves. Nothing is run that would end after its caller has left, unless there is nothing else to do:
    then it is tried, which is how an estimate that was too dark is corrected.

    Args:
        view: the oldest that waits and those that may be its mates, in any order.
        now: monotonic seconds; deadlines at or before it have passed.
        settings: the bounds. They never keep the oldest from going alone.
        cost: what a run costs.
        pace: seconds on the clock for each second of `cost`; 0: not known, and deadlines count once they have passed.
    """
    expired: list[int] = []
    late: list[int] = []
    in_time: list[int] = []
    for at, one in enumerate(view):
        if one.deadline_s is None:
            in_time.append(at)
        elif one.deadline_s <= now:
            expired.append(at)
        elif one.deadline_s < now + pace * cost.seconds(1, one.tokens):
            late.append(at)
        else:
            in_time.append(at)
    if not in_time:
        return Plan(tuple(sorted(late, key=lambda at: view[at].rank_s)[:1]), tuple(expired))
    given_up = (*expired, *late)
    oldest = min(in_time, key=lambda at: view[at].rank_s)
    mates = _mates(view, oldest, in_time, cost) if settings.max_batch_size > 1 else []
    if not mates:
        return Plan((oldest,), given_up)
    line = [oldest, *mates]
    chosen = _choose([view[at] for at in line], now, settings, cost, pace)
    return Plan(tuple(line[at] for at in chosen), given_up)


def _mates(view: Sequence[Waiting], oldest: int, among: Sequence[int], cost: CostModel) -> list[int]:
    """Those that are near enough in length to share the oldest's run, the older first."""
    first = view[oldest]
    alone_s, most_padding_s = cost.row_s(first.tokens), PADDING_SHARE * cost.run_s
    least, most = cost.row_tokens(alone_s - most_padding_s), cost.row_tokens(alone_s + most_padding_s)
    near = [at for at in among if least <= view[at].tokens <= most and at != oldest and view[at].rigid == first.rigid]
    return sorted(near, key=lambda at: (view[at].rank_s, at))


def _choose(
    line: Sequence[Waiting], now: float, settings: SchedulingSettings, cost: CostModel, pace: float
) -> list[int]:
    """Which of the line go: the first, which is the oldest, and the mates that make the most of the run.

    A run is as long, along each axis, as the longer of the oldest and one mate, its stretcher; whoever is no longer may
    join. For each stretcher the best company is found by taking in the worthiest first, as long as the run's worth over
    its seconds rises: at a fixed price of a row, no other set of as many is worth more.
    """
    lengths = np.array([one.lengths for one in line], np.float64)  # (N, axes)
    alone_s = cost.rows_s(lengths.sum(axis=1))
    # Left behind, each would have its part in launching another run: a small one where many wait to share it.
    age_s = AGE_SHARE * np.minimum(cost.run_s, alone_s) * _ages(line, now)
    worth = alone_s + cost.run_s / len(line) + age_s
    order = np.concatenate(([0], 1 + np.argsort(-worth[1:], kind="stable")))  # the oldest, then the worthiest first
    lengths, alone_s, worth = lengths[order], alone_s[order], worth[order]
    shapes = _different(np.maximum(lengths, lengths[0]))  # a row for each run that one stretches; row 0: the oldest's
    positions = shapes.sum(axis=1)
    row_s = cost.rows_s(positions)
    # joins[j, k]: whether k may be in the run of shape j.
    joins = (lengths[None, :, :] <= shapes[:, None, :]).all(axis=2)
    padding_s = row_s[:, None] - alone_s[None, :]
    joins &= padding_s <= PADDING_SHARE * cost.run_s
    joins[:, 0] = True
    size = _bytes([line[int(at)] for at in order], shapes)
    joins[:, 1:] &= (size[:, :1] + size[:, 1:]) <= settings.max_batch_bytes
    hurried = pace > 0 and any(one.deadline_s is not None for one in line)
    if hurried:
        left_s = np.array([math.inf if one.deadline_s is None else one.deadline_s - now for one in line])[order]
        joins[:, 1:] &= left_s[1:] >= pace * (cost.run_s + 2 * row_s[:, None])  # no time for any company
    members = joins.cumsum(axis=1)  # after each prefix of the line
    seconds = cost.run_s + members * row_s[:, None]
    score = (joins * worth).cumsum(axis=1) / seconds
    fits = members <= np.minimum(settings.max_batch_size, settings.max_batch_tokens // positions)[:, None]
    fits &= (joins * size).cumsum(axis=1) <= settings.max_batch_bytes
    fits &= (padding_s[:, 0] <= PADDING_SHARE * cost.run_s)[:, None]
    if hurried:
        fits &= pace * seconds <= np.minimum.accumulate(np.where(joins, left_s, math.inf), axis=1)
    fits[0, 0] = True
    stretcher, last = np.unravel_index(np.argmax(np.where(fits, score, -1.0)), score.shape)
    return [int(order[at]) for at in np.flatnonzero(joins[stretcher, : last + 1])]


def _different(shapes: Floats) -> Floats:
    """The rows without those that are there already, in the order in which they first come."""
    return np.array(list(dict.fromkeys(map(tuple, shapes.tolist()))))


def _ages(line: Sequence[Waiting], now: float) -> Floats:
    """How long each has waited, as a share of how long the first has."""
    waited_s = now - np.array([one.rank_s for one in line])
    return np.clip(waited_s / waited_s[0], 0.0, 1.0) if waited_s[0] > 0 else np.zeros(len(line))


def _bytes(line: Sequence[Waiting], shapes: Floats) -> Floats:
    """(shapes, line): bytes of tensors that each sequence brings into a run of each shape."""
    size = np.zeros((len(shapes), len(line)))
    for axes in dict.fromkeys(axes for one in line for axes in one.footprint):
        each = np.array([one.footprint.get(axes, 0) for one in line], np.float64)
        size += shapes[:, list(axes)].prod(axis=1)[:, None] * each
    return size
