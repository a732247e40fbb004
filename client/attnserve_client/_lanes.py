"""Which connection takes an attempt or a stream, and what its failure means: counts and times only, no input or output.

A *peer* is one address of the target, a *lane* is one connection to it, and a *turn* is one attempt or stream on a
lane. The lane with the fewest turns is next. A lane that failed is avoided for a while, because its failures come
quickly: without that, the lane with the fewest turns would be the broken one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Final

from attnserve_client._status import is_lost_connection
from attnserve_client.errors import AttnserveError, NotServing, ServerUnreachable

FIRST_AVOIDANCE_S: Final = 1.0
LONGEST_AVOIDANCE_S: Final = 2.0
"""Seconds for which a failed lane is avoided: 1, and then 2, as long as gRPC waits before it connects again. After
each, one attempt tries the lane."""


@dataclass(eq=False, slots=True)
class Peer:
    """One address. Guarded by the lock of its `Lanes`.

    Attributes:
        losses: How often its connections were lost. All turns that run at a loss are part of it.
        proven: Whether it answered a turn that began after the last loss; True before the first one.
    """

    losses: int = 0
    proven: bool = True


@dataclass(eq=False, slots=True)
class Lane:
    """One connection. Guarded by the lock of its `Lanes`.

    Attributes:
        number: Its place among all lanes.
        peer: Its address.
        turns: Attempts and streams that run on it.
        streams: The streams among them.
        misses: 1 and the attempts that tried it again in vain, since its last answer; 0 for a lane that works.
        failures: All that `misses` ever counted.
        missed_at: The time of its last miss; on the clock of its `Lanes`, in seconds.
        avoided_until: The time at which one attempt may try it again, on the same clock.
    """

    number: int
    peer: Peer
    turns: int = 0
    streams: int = 0
    misses: int = 0
    failures: int = 0
    missed_at: float = 0.0
    avoided_until: float = 0.0


@dataclass(frozen=True, eq=False, slots=True)
class Turn:
    """One attempt or stream on a lane.

    Attributes:
        lane: The lane.
        stream: Whether it is a stream.
        probe: Whether it tries a failed lane again.
        losses: The losses of the lane's peer when it began.
        failures: The failures of the lane when it began.
    """

    lane: Lane
    stream: bool
    probe: bool
    losses: int
    failures: int


class Lanes:
    """The lanes of one client. Any thread may use them.

    Args:
        peers: Number of addresses.
        connections: Lanes of each address. Lane number n is to address n modulo `peers`.
        clock: Monotonic clock in seconds.
    """

    def __init__(self, peers: int, connections: int, clock: Callable[[], float] = time.monotonic) -> None:
        addresses = [Peer() for _ in range(peers)]
        self.peers = peers
        self.reached = False
        """Whether a server ever answered."""
        self._lanes = [Lane(number, peer) for number, peer in enumerate(addresses * connections)]
        self._next = 0
        self._failing = 0  # lanes with misses
        self._clock = clock
        self._lock = Lock()

    def take(self, tried: Sequence[Turn] = (), *, stream: bool = False) -> Turn:
        """Begin a turn on the best lane.

        Lanes that are not avoided come first, then those of addresses, and those lanes, that the call has not `tried`,
        then those with the fewest streams for a stream, then those with the fewest turns. Equal lanes take turns.
        """
        with self._lock:
            if self._failing or tried or stream:
                best, probe = self._best(tried, stream=stream)
            else:
                turns = [lane.turns for lane in self._lanes]
                least = min(turns)
                start = self._next if least in turns[self._next :] else 0
                best, probe = self._lanes[turns.index(least, start)], False
            self._next = (best.number + 1) % len(self._lanes)
            best.turns += 1
            best.streams += stream
            return Turn(best, stream, probe, best.peer.losses, best.failures)

    def _best(self, tried: Sequence[Turn], *, stream: bool) -> tuple[Lane, bool]:
        """Return the best lane, by all criteria, and whether the turn tries a failed lane again."""
        lanes, now = self._lanes, self._clock()
        tried_peers, tried_lanes = [turn.lane.peer for turn in tried], [turn.lane for turn in tried]

        def badness(lane: Lane) -> tuple[bool, bool, bool, int, int]:
            # The first attempt of a call tries a failed lane again; a second one must not fail for that.
            avoided = lane.misses > 0 and (bool(tried) or now < lane.avoided_until)
            streams = lane.streams if stream else 0
            return avoided, lane.peer in tried_peers, lane in tried_lanes, streams, lane.turns

        best = min((*lanes[self._next :], *lanes[: self._next]), key=badness)
        probe = best.misses > 0 and not badness(best)[0]
        if probe:
            best.avoided_until = now + _avoidance_s(best.misses)
        return best, probe

    def leave(self, turn: Turn) -> None:
        """End a turn, however it ended."""
        with self._lock:
            turn.lane.turns -= 1
            turn.lane.streams -= turn.stream

    def answered(self, turn: Turn) -> None:
        """Record that the server answered on the lane. Answers to turns that began before a failure have no effect."""
        lane, self.reached = turn.lane, True
        with self._lock:
            if lane.misses and turn.failures == lane.failures:
                lane.misses = 0
                self._failing -= 1
            lane.peer.proven = lane.peer.proven or turn.losses == lane.peer.losses

    def failed(self, turn: Turn, error: AttnserveError) -> float:
        """Record what a failure means for the lane. Return the tokens that it takes from the budget of retries.

        If no server answered, or it drains, attempts avoid the lane for a while. The loss of a connection is one
        failure, of 1 token, however many turns it ends: those that ran at the loss take nothing more. So is the drain
        of a server, while another address works, or may again because it last failed a while ago.
        """
        if isinstance(error, ServerUnreachable):
            return self._missed(turn, lost=is_lost_connection(error))
        if isinstance(error, NotServing) and error.state == "draining":
            return self._missed(turn, lost=self._others_may_work(turn))
        if error.reason:  # a server of attnserve sent it
            self.answered(turn)
        return 1.0

    def others_work(self, turn: Turn) -> bool:
        """Return whether another address has a lane that is not avoided."""
        return any(lane.peer is not turn.lane.peer and not lane.misses for lane in self._lanes)

    def _others_may_work(self, turn: Turn) -> bool:
        """Return whether another address works, or last failed so long ago that its server may have returned."""
        before = self._clock() - FIRST_AVOIDANCE_S
        return any(
            lane.peer is not turn.lane.peer and (not lane.misses or lane.missed_at < before) for lane in self._lanes
        )

    def stalled(self, turn: Turn) -> float:
        """Record that a turn had no answer for too long, as `failed` does for a lost connection."""
        return self._missed(turn, lost=True)

    def _missed(self, turn: Turn, *, lost: bool) -> float:
        lane, peer = turn.lane, turn.lane.peer
        with self._lock:
            if turn.probe or not lane.misses:  # turns that fail together are one miss
                self._failing += not lane.misses
                lane.misses += 1
                lane.failures += 1
                lane.missed_at = self._clock()
                lane.avoided_until = lane.missed_at + _avoidance_s(lane.misses)
            if not lost:
                return 1.0
            if turn.probe or turn.losses < peer.losses:
                return 0.0  # a probe is limited by time, a turn of an earlier loss by the turns that ran then
            if peer.proven:
                peer.losses += 1
                peer.proven = False
            return 1.0


def _avoidance_s(misses: int) -> float:
    return min(LONGEST_AVOIDANCE_S, FIRST_AVOIDANCE_S * 2.0 ** min(misses - 1, 8))
