"""When to send a request again: the policy, its budget, and the attempts of one call. Nothing here sends or waits."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Lock
from typing import Final

from attnserve_client._lanes import Lanes, Turn
from attnserve_client._status import is_retryable
from attnserve_client.errors import AttnserveError

DEFAULT_TIMEOUT_S: Final = 30.0
READY_TIMEOUT_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often requests are retried, and after which wait.

    The wait after failed attempt n is the server's retry delay, if it gave one, plus a random time from 0 to
    `initial_backoff_s * multiplier ** (n - 1)` or `max_backoff_s`, whichever is less (full jitter). Each client has one
    budget. A retryable failure takes 1 token from it, a success returns `budget_return`. No request is retried while at
    most half of `budget_tokens` is left, which limits attempts per call to about 1 + `budget_return` when a server
    keeps failing.

    Source: Brooker 2015, "Exponential Backoff And Jitter"; gRPC proposal A6, "gRPC Retry Design", on throttling.

    Attributes:
        max_attempts: Most attempts of one request, at least 1; 1 turns retries off.
        initial_backoff_s: Greatest random wait after the first attempt, in seconds.
        multiplier: Factor by which it grows with each attempt, at least 1.
        max_backoff_s: Greatest random wait after any attempt, in seconds.
        budget_tokens: Size of the budget, which starts full.
        budget_return: Tokens that a success returns.

    Raises:
        ValueError: A value is out of range.
    """

    max_attempts: int = 4
    initial_backoff_s: float = 0.1
    multiplier: float = 2.0
    max_backoff_s: float = 5.0
    budget_tokens: float = 10.0
    budget_return: float = 0.1

    def __post_init__(self) -> None:
        if self.max_attempts < 1:
            raise ValueError(f"max_attempts is {self.max_attempts}; it must be at least 1, which turns retries off")
        for name in ("initial_backoff_s", "max_backoff_s", "budget_tokens", "budget_return"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 0")
        if self.multiplier < 1:
            raise ValueError(f"multiplier is {self.multiplier}; it must be at least 1, which keeps waits constant")

    def backoff_s(self, attempt: int, retry_delay_s: float | None, jitter: float) -> float:
        """Return the wait after a failed attempt, in seconds.

        Args:
            attempt: Number of the failed attempt, from 1.
            retry_delay_s: The server's retry delay in seconds; None if it gave none.
            jitter: A random number from 0 to 1.
        """
        # The exponent is bounded, because a policy with many attempts would overflow a float.
        ceiling_s = min(self.max_backoff_s, self.initial_backoff_s * self.multiplier ** min(attempt - 1, 64))
        # Added, not the maximum: callers that received the same delay must not retry at the same time.
        return (retry_delay_s or 0.0) + jitter * ceiling_s


class RetryBudget:
    """A token bucket that all calls of one client share. Any thread may use it."""

    def __init__(self, policy: RetryPolicy) -> None:
        self._policy = policy
        self._tokens = policy.budget_tokens  # guarded by _lock
        self._lock = Lock()

    @property
    def tokens(self) -> float:
        """Tokens left."""
        return self._tokens

    def succeeded(self) -> None:
        """Return tokens for a success."""
        with self._lock:
            self._tokens = min(self._policy.budget_tokens, self._tokens + self._policy.budget_return)

    def failed(self) -> bool:
        """Take the token of a failure. Return whether a retry is allowed."""
        with self._lock:
            self._tokens = max(0.0, self._tokens - 1.0)
            return self._tokens > self._policy.budget_tokens / 2


@dataclass(frozen=True, slots=True)
class Retrying:
    """A policy with its budget, a clock in seconds, and a source of random numbers from 0 to 1."""

    policy: RetryPolicy
    budget: RetryBudget
    clock: Callable[[], float] = time.monotonic
    jitter: Callable[[], float] = random.random

    @classmethod
    def of(cls, policy: RetryPolicy) -> Retrying:
        """Return a policy with a full budget, the system's monotonic clock and Python's random numbers."""
        return cls(policy, RetryBudget(policy))

    def deadline(self, timeout_s: float | None) -> float | None:
        """Return the time on this clock at which a timeout that starts now ends; None for no timeout."""
        return None if timeout_s is None else self.clock() + timeout_s

    def attempts(self, lanes: Lanes, deadline: float | None) -> Attempts:
        """Return the attempts of one call that ends at `deadline`."""
        return Attempts(self, lanes, deadline)


@dataclass(slots=True)
class Attempts:
    """The attempts of one call, made by one thread or task: decides where and when to make them, and how many."""

    retrying: Retrying
    lanes: Lanes
    deadline: float | None
    tried: list[Turn] = field(default_factory=list)

    @property
    def made(self) -> int:
        """Number of attempts so far."""
        return len(self.tried)

    def begin(self) -> Turn:
        """Begin the next attempt, on a connection that the call has not tried where there is one."""
        turn = self.lanes.take(self.tried)
        self.tried.append(turn)
        return turn

    def remaining_s(self) -> float | None:
        """Return the seconds left for the next attempt, at least 0; None without a deadline."""
        return None if self.deadline is None else max(0.0, self.deadline - self.retrying.clock())

    def succeeded(self, turn: Turn) -> None:
        """Record that an attempt, and so the call, succeeded."""
        self.lanes.answered(turn)
        self.retrying.budget.succeeded()

    def wait_after(self, turn: Turn, error: AttnserveError) -> float | None:
        """Record a failed attempt. Return the seconds to wait before the next one, or None if `error` is final."""
        self.lanes.failed(turn, error)
        if not is_retryable(error):
            return None
        allowed = self.retrying.budget.failed()
        if not allowed or self.made >= self.retrying.policy.max_attempts:
            return None
        wait_s = self.retrying.policy.backoff_s(self.made, error.retry_delay_s, self.retrying.jitter())
        remaining_s = self.remaining_s()
        # A wait past the deadline leaves no time for an attempt: raise the cause now, not DeadlineExpired later.
        return None if remaining_s is not None and wait_s >= remaining_s else wait_s
