"""The batching policy: which waiting sequences go into the next run. Pure: no state, no clock, no loop.

The oldest sequence always runs. Batch neighbours are chosen for the most useful work in each second of the run: padding
and the run's overhead are what it spends in vain. The cost model gives the price of both. On a CPU, where a run's
overhead costs about as much as ten tokens, batches come out small and of near-equal lengths; on devices where the
overhead dominates, they come out large.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from attnserve_server.domain.values import PreparedSequence, Priority
from attnserve_server.engine.cost import CostModel, Footprint
from attnserve_server.model.manifest import Manifest

Floats = npt.NDArray[np.float64]

PADDING_SHARE: Final = 0.5
"""Most time that padding one neighbour may cost, as a share of a run's overhead. At 1, a separate run would cost the
same; but a sequence that is left in the queue meets others, nearer in length, that share its overhead."""
AGE_SHARE: Final = 0.25
"""Value of age: a sequence that has waited as long as the oldest is worth this share of a run's overhead, or of its
row if that is less, more than a new one. It shortens the tail of latency for a few thousandths of processor time. The
limit by its own row keeps age from outweighing length where the overhead dominates."""


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
    """Most sequences considered as neighbours of the oldest: the nearest to it in length of all that wait."""
    run_overhead_tokens: float | None = None
    """Cost of a run before its first token, in tokens; None: as measured."""
    wait_headroom: float = 1.25
    """Refuse a request if the predicted wait times this exceeds the time to its deadline: predictions err by about a
    fifth, and an immediate refusal serves a caller better than an expiry after the wait."""
    high_head_start_s: float = 0.25
    """Seconds by which the arrival of priority HIGH counts as earlier."""
    low_delay_s: float = 1.0
    """Seconds by which the arrival of priority LOW counts as later: it waits longer, but does not starve."""


@dataclass(slots=True)
class Candidate:
    """One waiting sequence, as the policy needs it. Not changed once made.

    It is not frozen, because to make one of each sequence would then take three times as long.
    `lengths` are along the model's axes in their order. `rigid` are those along axes that do not pad: neighbours must
    have the same. `footprint` gives its bytes in a run: for each tuple of axis indices, bytes for each position of the
    product of those axes' lengths. `past`: positions of its past; 0: it has none.
    """

    adjusted_arrival_s: float
    """Arrival on the monotonic clock, moved by priority: the least is the oldest."""
    lengths: tuple[int, ...]
    deadline_s: float | None = None
    rigid: tuple[int, ...] = ()
    footprint: Mapping[tuple[int, ...], int] = field(default_factory=dict)
    past: int = 0
    tokens: int = field(init=False)
    """Positions that carry data."""

    def __post_init__(self) -> None:
        self.tokens = sum(self.lengths)


class Layout:
    """Lays out the sequences of one graph as candidates."""

    def __init__(self, manifest: Manifest) -> None:
        self.max_batch_size = manifest.max_batch_size
        self._footprint = Footprint(manifest)
        self._symbols = tuple(axis.symbol for axis in manifest.axes)
        self._rigid = tuple(at for at, axis in enumerate(manifest.axes) if not axis.paddable)

    def candidate(
        self, sequence: PreparedSequence, adjusted_arrival_s: float, deadline_s: float | None = None
    ) -> Candidate:
        """Return the candidate of one sequence, which has arrived at that time."""
        # A model without axes has sequences of one position: with none, no batch would be worth its run.
        known = sequence.lengths
        lengths = tuple([known.get(symbol, 0) for symbol in self._symbols]) or (1,)
        # All lengths differ in number from the rigid ones of a model that pads, so that the two never share a run.
        rigid = lengths if sequence.unpadded else tuple([lengths[at] for at in self._rigid])
        # No length is negative, so that sequences with a past share runs only with those of the same past's length.
        rigid = (-sequence.past, *rigid) if sequence.past else rigid
        footprint = self._footprint.of(sequence)
        return Candidate(adjusted_arrival_s, lengths, deadline_s, rigid, footprint, sequence.past)


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do now: run the candidates at `indices`, the oldest first, and drop those at `expired`.

    Expired are those past their deadlines, and those for which even a separate run would end too late.
    """

    indices: tuple[int, ...]
    expired: tuple[int, ...] = ()


def adjusted_arrival(arrived_s: float, priority: Priority, settings: SchedulingSettings) -> float:
    """Return the arrival that decides a sequence's place in the queue."""
    if priority is Priority.HIGH:
        return arrived_s - settings.high_head_start_s
    return arrived_s + (settings.low_delay_s if priority is Priority.LOW else 0.0)


def plan(
    candidates: Sequence[Candidate],
    now: float,
    settings: SchedulingSettings,
    cost: CostModel,
    pace: float = 0.0,
    first: int | None = None,
) -> Plan:
    """Plan the next run.

    Since the first one always runs, a sequence runs after at most as many runs as there were before it: none starves.
    Sequences whose run would end past their deadlines are dropped, unless nothing else waits: then one of them
    runs, and its time corrects an estimate that was too high.

    Args:
        candidates: the oldest waiting sequence and those that may be its neighbours, in any order; none: no run.
        now: monotonic seconds; deadlines at or before it have passed.
        settings: the bounds. They never keep the oldest from running alone.
        cost: what a run costs.
        pace: seconds on the clock for each second of `cost`; 0: unknown, and deadlines count once they have passed.
        first: index of the one whose turn it is, and which runs unless it is dropped; None: the oldest.
    """
    expired: list[int] = []
    late: list[int] = []
    in_time: list[int] = []
    for at, one in enumerate(candidates):
        if one.deadline_s is None:
            in_time.append(at)
        elif one.deadline_s <= now:
            expired.append(at)
        elif one.deadline_s < now + pace * cost.seconds(1, one.tokens):
            late.append(at)
        else:
            in_time.append(at)
    if not in_time:
        return Plan(tuple(sorted(late, key=lambda at: candidates[at].adjusted_arrival_s)[:1]), tuple(expired))
    dropped = (*expired, *late)
    if first is not None and first in in_time:
        oldest = first
    else:
        oldest = min(in_time, key=lambda at: candidates[at].adjusted_arrival_s)
    neighbours = _neighbours(candidates, oldest, in_time, cost) if settings.max_batch_size > 1 else []
    if not neighbours:
        return Plan((oldest,), dropped)
    line = [oldest, *neighbours]
    members = [candidates[at] for at in line]
    head = members[0]
    if all(one.lengths == head.lengths and one.footprint == head.footprint for one in members):
        latest_end_s = now + pace * cost.seconds(len(line), head.tokens)
        if all(one.deadline_s is None or one.deadline_s >= latest_end_s for one in members):
            return Plan(tuple(line[: _alike(members, now, settings, cost)]), dropped)
    chosen = _choose(members, now, settings, cost, pace)
    return Plan(tuple(line[at] for at in chosen), dropped)


def _neighbours(candidates: Sequence[Candidate], oldest: int, among: Sequence[int], cost: CostModel) -> list[int]:
    """Return those that are near enough in length to share the oldest's run, oldest first."""
    first = candidates[oldest]
    alone_s, most_padding_s = cost.row_s(first.tokens), PADDING_SHARE * cost.run_s
    least, most = cost.row_tokens(alone_s - most_padding_s), cost.row_tokens(alone_s + most_padding_s)
    near = [
        at
        for at in among
        if least <= candidates[at].tokens <= most and at != oldest and candidates[at].rigid == first.rigid
    ]
    return sorted(near, key=lambda at: (candidates[at].adjusted_arrival_s, at))


def _alike(line: Sequence[Candidate], now: float, settings: SchedulingSettings, cost: CostModel) -> int:
    """Return how many of the line, oldest first, run together, where all have one shape, and no deadline is near.

    The same as `_choose`, without its arrays: there is one shape, and the order by value is that by age.
    """
    first = line[0]
    bytes_each = sum(math.prod(first.lengths[at] for at in axes) * size for axes, size in first.footprint.items())
    most = min(settings.max_batch_size, settings.max_batch_tokens // first.tokens, len(line))
    if bytes_each:
        most = min(most, settings.max_batch_bytes // bytes_each)
    row_s = cost.row_s(first.tokens)
    common_s, age_s = row_s + cost.run_s / len(line), AGE_SHARE * min(cost.run_s, row_s)
    waited_s = now - first.adjusted_arrival_s
    value_s, seconds, size = common_s + (age_s if waited_s > 0 else 0.0), cost.run_s + row_s, 1
    while size < most:
        age = (now - line[size].adjusted_arrival_s) / waited_s if waited_s > 0 else 0.0
        more_s = common_s + age_s * min(max(age, 0.0), 1.0)
        # Values fall with age, and each row costs the same: once the value of a second falls, it stays below.
        if (value_s + more_s) * seconds <= value_s * (seconds + row_s):
            break
        value_s, seconds, size = value_s + more_s, seconds + row_s, size + 1
    return size


def _choose(
    line: Sequence[Candidate], now: float, settings: SchedulingSettings, cost: CostModel, pace: float
) -> list[int]:
    """Return which of the line run together: the first, which is the oldest, and the best neighbours.

    A run is padded, along each axis, to the longer of the oldest and one neighbour: each neighbour gives one candidate
    shape. Any sequence no longer than the shape is eligible. For each shape, sequences are added by value, greatest
    first, as long as the value per second of the run rises: each row costs the same, so no other set of as many
    sequences has a greater value.
    """
    lengths = np.array([one.lengths for one in line], np.float64)  # (N, axes)
    alone_s = cost.rows_s(lengths.sum(axis=1))
    # A sequence that stays in the queue shares another run's overhead; its share is small where many wait.
    age_s = AGE_SHARE * np.minimum(cost.run_s, alone_s) * _ages(line, now)
    value = alone_s + cost.run_s / len(line) + age_s
    order = np.concatenate(([0], 1 + np.argsort(-value[1:], kind="stable")))  # the oldest, then by value
    lengths, alone_s, value = lengths[order], alone_s[order], value[order]
    shapes = _distinct(np.maximum(lengths, lengths[0]))  # a row for each candidate shape; row 0: the oldest's lengths
    positions = shapes.sum(axis=1)
    row_s = cost.rows_s(positions)
    # eligible[j, k]: whether sequence k may be in a run of shape j.
    eligible = (lengths[None, :, :] <= shapes[:, None, :]).all(axis=2)
    padding_s = row_s[:, None] - alone_s[None, :]
    eligible &= padding_s <= PADDING_SHARE * cost.run_s
    eligible[:, 0] = True
    size = _bytes([line[int(at)] for at in order], shapes)
    eligible[:, 1:] &= (size[:, :1] + size[:, 1:]) <= settings.max_batch_bytes
    deadlines = pace > 0 and any(one.deadline_s is not None for one in line)
    if deadlines:
        left_s = np.array([math.inf if one.deadline_s is None else one.deadline_s - now for one in line])[order]
        eligible[:, 1:] &= left_s[1:] >= pace * (cost.run_s + 2 * row_s[:, None])  # a batch has two rows or more
    members = eligible.cumsum(axis=1)  # after each prefix of the line
    seconds = cost.run_s + members * row_s[:, None]
    score = (eligible * value).cumsum(axis=1) / seconds
    fits = members <= np.minimum(settings.max_batch_size, settings.max_batch_tokens // positions)[:, None]
    fits &= (eligible * size).cumsum(axis=1) <= settings.max_batch_bytes
    fits &= (padding_s[:, 0] <= PADDING_SHARE * cost.run_s)[:, None]
    if deadlines:
        fits &= pace * seconds <= np.minimum.accumulate(np.where(eligible, left_s, math.inf), axis=1)
    fits[0, 0] = True
    shape, last = np.unravel_index(np.argmax(np.where(fits, score, -1.0)), score.shape)
    return [int(order[at]) for at in np.flatnonzero(eligible[shape, : last + 1])]


def _distinct(shapes: Floats) -> Floats:
    """Return the distinct rows, in the order of their first appearance."""
    return np.array(list(dict.fromkeys(map(tuple, shapes.tolist()))))


def _ages(line: Sequence[Candidate], now: float) -> Floats:
    """Return how long each has waited, as a share of how long the first has."""
    waited_s = now - np.array([one.adjusted_arrival_s for one in line])
    return np.clip(waited_s / waited_s[0], 0.0, 1.0) if waited_s[0] > 0 else np.zeros(len(line))


def _bytes(line: Sequence[Candidate], shapes: Floats) -> Floats:
    """Return the bytes of tensors, (shapes, line), that each sequence needs in a run of each shape."""
    size = np.zeros((len(shapes), len(line)))
    for axes in dict.fromkeys(axes for one in line for axes in one.footprint):
        each = np.array([one.footprint.get(axes, 0) for one in line], np.float64)
        size += shapes[:, list(axes)].prod(axis=1)[:, None] * each
    return size
