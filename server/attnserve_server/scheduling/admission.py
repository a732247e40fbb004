"""Admission: whether a request may join the queue now. Pure decisions; refusing costs nothing but this."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from attnserve_server.domain.errors import Overloaded
from attnserve_server.scheduling.policy import SchedulingSettings

_LEAST_RETRY_S: Final = 0.01
_MOST_RETRY_S: Final = 30.0
_UNKNOWN_RETRY_S: Final = 1.0
"""When nothing has run yet, so that nothing is known about how fast the queue drains."""


@dataclass(frozen=True, slots=True)
class Demand:
    """What a request asks for: sequences, their useful tokens, and bytes of their tensors and answers."""

    sequences: int
    tokens: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Load:
    """What is ahead of it. `running_tokens` belong to runs under way, which are half done on average."""

    waiting: Demand
    running_tokens: int
    instances: int
    seconds_per_token: float | None
    """What a useful token costs one instance; None as long as nothing has run."""

    def wait_s(self, tokens: float) -> float:
        """How long the instances take for so many useful tokens."""
        return tokens * (self.seconds_per_token or 0.0) / self.instances

    @property
    def tokens_ahead(self) -> float:
        """Useful tokens that run before a newcomer does."""
        return self.waiting.tokens + self.running_tokens / 2


def refusal(demand: Demand, load: Load, remaining_s: float | None, settings: SchedulingSettings) -> Overloaded | None:
    """Why a request may not join the queue now; None if it may.

    An empty queue takes any request, however large: refusing that one would refuse it for ever. The retry delay is how
    long the instances need until this request would fit, by what they did lately.

    Args:
        demand: the request.
        load: what waits and runs.
        remaining_s: seconds until the caller's deadline; None if there is none.
        settings: the bounds.
    """
    waiting = load.waiting
    if waiting.sequences:
        excess = waiting.sequences + demand.sequences - settings.max_queue_size
        if excess > 0:
            share = excess / waiting.sequences
            return _full("queue_full", settings.max_queue_size, waiting.sequences + demand.sequences, share, load)
        excess = waiting.bytes + demand.bytes - settings.max_queue_bytes
        if excess > 0:
            share = excess / max(waiting.bytes, 1)
            return _full("queue_bytes", settings.max_queue_bytes, waiting.bytes + demand.bytes, share, load)
    if remaining_s is None:
        return None
    # The request's own sequences spread over the instances; what is ahead of them does too.
    predicted_s = load.wait_s(load.tokens_ahead + demand.tokens) * settings.wait_headroom
    if predicted_s <= remaining_s or not load.tokens_ahead:
        return None
    over_s = min((predicted_s - remaining_s) / settings.wait_headroom, load.wait_s(load.tokens_ahead))
    return Overloaded("predicted_wait", remaining_s, predicted_s, _clamp(over_s))


def _full(cause: str, limit: float, value: float, share: float, load: Load) -> Overloaded:
    """A refusal by a bound of the queue; it fits once `share` of what waits has gone."""
    if load.seconds_per_token is None:
        return Overloaded(cause, limit, value, _UNKNOWN_RETRY_S)
    return Overloaded(cause, limit, value, _clamp(load.wait_s(min(share, 1.0) * load.waiting.tokens)))


def _clamp(seconds: float) -> float:
    return min(max(seconds, _LEAST_RETRY_S), _MOST_RETRY_S)
