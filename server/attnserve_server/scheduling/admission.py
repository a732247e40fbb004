"""Admission: whether a request may join the queue now, how fast the queue drains, and what runs may hold and take.

A request that may not join gets an Overloaded error, which `refusal` returns and does not raise.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from attnserve_server.domain.errors import AttnserveError, Overloaded
from attnserve_server.domain.values import PreparedSequence
from attnserve_server.engine.cost import CostModel
from attnserve_server.model.manifest import Manifest
from attnserve_server.scheduling.policy import Candidate, SchedulingSettings

if TYPE_CHECKING:  # the engine imports the runtime, which a front process does without
    from attnserve_server.engine.executor import BatchExecutor, Outcome

_LEAST_RETRY_S: Final = 0.01
_MOST_RETRY_S: Final = 30.0
_UNKNOWN_RETRY_S: Final = 1.0
"""Retry delay before the first run, when the speed of the instances is unknown."""
_MEMORY: Final = 0.95
"""Weight that earlier runs keep after each run: about the last twenty count."""
_SHARE: Final = 8
"""A caller that has less than one in so many of a queue's sequences, or bytes, counts as a small one."""
_SEED_TOKENS: Final = 64.0
"""Weight of the warm-up's estimate, in tokens: a few real runs outweigh it."""


@dataclass(slots=True)
class Demand:
    """What a request needs: sequences, their useful tokens, and bytes of their tensors and answers. Not changed."""

    sequences: int
    tokens: int
    bytes: int


@dataclass(slots=True)
class Load:
    """What is ahead of a request; not changed once made.

    `running_tokens` are in runs, which are half done on average.
    """

    waiting: Demand
    running_tokens: int
    instances: int
    seconds_per_token: float | None
    """Seconds of one instance for a useful token; None if unknown."""
    own: Demand | None = None
    """Of `waiting`, what the request's own caller has; None: all of it."""
    callers: int = 1
    """Callers with waiting sequences, which take turns."""

    def wait_s(self, tokens: float) -> float:
        """Return how long the instances take for so many useful tokens."""
        return tokens * (self.seconds_per_token or 0.0) / self.instances

    def tokens_ahead(self, demand: Demand) -> float:
        """Return the useful tokens that run before a new request does.

        While it waits, each other caller gets at most as much as its own caller.
        """
        waiting = self.waiting.tokens
        if self.own is not None:
            own = self.own.tokens
            others = self.callers - (own > 0)
            waiting = own + min(waiting - own, others * (own + demand.tokens))
        return waiting + self.running_tokens / 2

    def limit(self, most: int, own: int) -> int:
        """Return how much of a bound a caller may use that has `own` of it.

        Callers that have less than an eighth find room above the bound, so that others cannot use all of it.
        """
        return most + most // _SHARE if self.own is not None and own * _SHARE < most else most


class Speed:
    """Running estimates of how fast one instance is, from recent runs. Event loop only."""

    def __init__(self, seconds_per_token: float | None = None) -> None:
        """Begin with the warm-up's estimate; None: unknown."""
        self._tokens = 0.0 if seconds_per_token is None else _SEED_TOKENS
        self._seconds = (seconds_per_token or 0.0) * self._tokens
        self._took_s = self._predicted_s = 0.0
        self.runs = 0
        """Runs so far."""

    @property
    def seconds_per_token(self) -> float | None:
        """Seconds per useful token, padding and overhead included; None while unknown."""
        return self._seconds / self._tokens if self._tokens else None

    @property
    def cost_s(self) -> float:
        """As `seconds_per_token`, once there was a run."""
        return self._seconds / self._tokens

    @property
    def pace(self) -> float:
        """Seconds that runs take for each second that the cost model predicts; 0 while unknown.

        The cost model counts an instance's own processor time. Other work on the same cores makes runs take longer.
        """
        return self._took_s / self._predicted_s if self._predicted_s else 0.0

    def add(self, seconds: float, tokens: int, predicted_s: float = 0.0) -> None:
        """Add one run. `predicted_s`: by the cost model; 0: there was none."""
        self.runs += 1
        self._seconds = self._seconds * _MEMORY + seconds
        self._tokens = self._tokens * _MEMORY + tokens
        if predicted_s:
            self._took_s = self._took_s * _MEMORY + seconds
            self._predicted_s = self._predicted_s * _MEMORY + predicted_s


class Pricing:
    """What runs of a model may hold and what they take: bounds, cost models, and the speed of late. Event loop only."""

    def __init__(self, executor: BatchExecutor, manifest: Manifest, settings: SchedulingSettings) -> None:
        self._executor = executor
        self._most_with_past = 0 if manifest.continuing is None else manifest.continuing.max_batch_size
        self.settings = settings
        self.speed = Speed()

    def begin(self) -> None:
        """Take the speed from the executor, which was warmed up."""
        cost = self._executor.cost
        if cost is not None:
            self.speed = Speed(cost.token_s)

    def isolate(self) -> None:
        """Let each sequence run alone from now on."""
        self.settings = replace(self.settings, max_batch_size=1)

    def terms(self, candidate: Candidate) -> tuple[SchedulingSettings, CostModel]:
        """Return the bounds and the cost of runs of the graph that runs a sequence."""
        settings, cost = self.settings, self._executor.cost
        if candidate.past and self._most_with_past:
            most = min(settings.max_batch_size, self._most_with_past)
            settings, cost = replace(settings, max_batch_size=most), self._executor.past_cost
        return settings, (cost or CostModel()).with_overhead(settings.run_overhead_tokens)

    @property
    def pace(self) -> float:
        """Seconds on the clock for each second of the cost model, with headroom; 0 if unknown.

        An overhead that is set by hand expresses what neighbours are worth, and not how long a run takes.
        """
        if self.settings.run_overhead_tokens is not None:
            return 0.0
        speed = self.speed
        # Before the first run, a run takes at least the processor time that the warm-up measured.
        return self.settings.wait_headroom * speed.pace if speed.runs else float(self._executor.cost is not None)

    def are_in_time(self, tokens: int, deadline: float | None, now: float) -> bool:
        """Return whether one instance alone runs so many tokens before a deadline, by its speed so far."""
        if deadline is None:
            return True
        speed = self.speed
        return speed.runs > 0 and tokens * speed.cost_s * self.settings.wait_headroom <= deadline - now

    def seconds_per_token(self, waiting: Demand, running_tokens: int) -> float | None:
        """Return the seconds of one instance for a useful token; None if unknown.

        Before the first run has ended, as the cost model predicts it for the fullest runs of what waits and runs.
        """
        cost = self._executor.cost
        if self.speed.runs or cost is None:
            return self.speed.seconds_per_token
        rows = min(self.settings.max_batch_size, waiting.sequences + 1)
        tokens = waiting.tokens / waiting.sequences if waiting.sequences else max(1.0, running_tokens)
        return cost.seconds(rows, tokens) / (rows * tokens)

    def rough_s(self, waiting: Demand) -> float | None:
        """Return about how long one run of all that waits would take, in seconds; None if unknown."""
        cost = self._executor.cost
        return None if cost is None else cost.run_s + waiting.tokens * cost.token_s

    def add(self, seconds: float, tokens: int, sequence: PreparedSequence, first: Outcome) -> None:
        """Add a run that has ended.

        Args:
            seconds: how long it took.
            tokens: useful tokens of its sequences.
            sequence: one of them.
            first: its outcome.
        """
        if not isinstance(first, AttnserveError) and first.run.wide:
            return  # no measure of the speed of an instance
        cost = self._executor.past_cost if sequence.past else self._executor.cost
        predicted_s = 0.0
        if cost is not None and not isinstance(first, AttnserveError):
            predicted_s = cost.seconds(first.run.batch_size, first.run.computed_tokens / first.run.batch_size)
        self.speed.add(seconds, tokens, predicted_s)


def refusal(demand: Demand, load: Load, remaining_s: float | None, settings: SchedulingSettings) -> Overloaded | None:
    """Return why a request may not join the queue now; None if it may.

    An empty queue takes any request, however large, because no retry could be accepted either. The retry delay is
    how long the instances need, at their recent speed, until the request would fit.

    Args:
        demand: the request.
        load: what waits and runs.
        remaining_s: seconds until the caller's deadline; None if there is none.
        settings: the bounds.
    """
    waiting = load.waiting
    if waiting.sequences:
        own = load.own or waiting
        excess = waiting.sequences + demand.sequences - load.limit(settings.max_queue_size, own.sequences)
        if excess > 0:
            share = excess / waiting.sequences
            return _full("queue_full", settings.max_queue_size, waiting.sequences + demand.sequences, share, load)
        excess = waiting.bytes + demand.bytes - load.limit(settings.max_queue_bytes, own.bytes)
        if excess > 0:
            share = excess / max(waiting.bytes, 1)
            return _full("queue_bytes", settings.max_queue_bytes, waiting.bytes + demand.bytes, share, load)
    if remaining_s is None:
        return None
    # The request's own sequences are spread over the instances, as those ahead of them are.
    ahead = load.tokens_ahead(demand)
    predicted_s = load.wait_s(ahead + demand.tokens) * settings.wait_headroom
    if predicted_s <= remaining_s or not ahead:
        return None
    over_s = min((predicted_s - remaining_s) / settings.wait_headroom, load.wait_s(ahead))
    return Overloaded("predicted_wait", remaining_s, predicted_s, _clamp(over_s))


def _full(cause: str, limit: float, value: float, share: float, load: Load) -> Overloaded:
    """Return the refusal of a request that fits once `share` of the queue has run."""
    if load.seconds_per_token is None:
        return Overloaded(cause, limit, value, _UNKNOWN_RETRY_S)
    return Overloaded(cause, limit, value, _clamp(load.wait_s(min(share, 1.0) * load.waiting.tokens)))


def _clamp(seconds: float) -> float:
    return min(max(seconds, _LEAST_RETRY_S), _MOST_RETRY_S)
