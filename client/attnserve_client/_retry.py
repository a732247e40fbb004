"""When to send a request again: the policy, its budget, and the attempts of one call. Nothing here sends or waits."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Lock
from typing import Final

from attnserve_client._lanes import Lanes, Turn
from attnserve_client._status import is_retryable, may_start
from attnserve_client.errors import AttnserveError, NotServing

DEFAULT_TIMEOUT_S: Final = 30.0
READY_TIMEOUT_S: Final = 5.0
LOAD_TIMEOUT_S: Final = 600.0
"""Twice what a server gives a bundle to load by default."""
_LONGEST_START_WAIT_S: Final = 1.0
"""Greatest random wait between two attempts to reach a server that has not answered yet."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often requests are retried, and after which wait.

    The wait after failed attempt n is a random time from 0 to `initial_backoff_s * multiplier ** (n - 1)` or
    `max_backoff_s`, whichever is less (full jitter). The server's retry delay, if it gave one, is added, except where
    it does not serve and another address works. Each client has one budget. A retryable failure takes 1 token from it,
    a success returns `budget_return`. No request is retried while at most half of `budget_tokens` is left, which
    limits attempts per call to about 1 + `budget_return` when a server keeps failing. The loss of a connection is one
    failure, however many calls it ends.

    Source: Brooker 2015, "Exponential Backoff And Jitter"; gRPC proposal A6, "gRPC Retry Design", on throttling.

    Attributes:
        max_attempts: Most attempts of one request, at least 1; 1 turns retries off.
        initial_backoff_s: Greatest random wait after the first attempt, in seconds.
        multiplier: Factor by which it grows with each attempt, at least 1.
        max_backoff_s: Greatest random wait after any attempt, in seconds.
        budget_tokens: Size of the budget, which starts full.
        budget_return: Tokens that a success returns.
        attempt_timeout_s: Seconds after which an attempt without an answer is cancelled, and the call is tried at
            another replica; None for no limit. Where policy or budget allow no further attempt, the last one continues
            until the call's timeout.
        hedge_after_s: Seconds after which an attempt without an answer gets a second one beside it at another replica.
            The first answer counts, and the other attempt is cancelled. Each takes 1 token. None for none.
        wait_for_ready: Whether calls wait, up to their timeout, for a server that cannot be reached yet: until one has
            answered this client for the first time. These attempts count neither in `max_attempts` nor in the budget.
            After that, and with `max_attempts` 1, a server that cannot be reached is a failure like any other.

    Raises:
        ValueError: A value is out of range.
    """

    max_attempts: int = 4
    initial_backoff_s: float = 0.1
    multiplier: float = 2.0
    max_backoff_s: float = 5.0
    budget_tokens: float = 10.0
    budget_return: float = 0.1
    attempt_timeout_s: float | None = None
    hedge_after_s: float | None = None
    wait_for_ready: bool = True

    def __post_init__(self) -> None:
        if self.max_attempts < 1:
            raise ValueError(f"max_attempts is {self.max_attempts}; it must be at least 1, which turns retries off")
        for name in ("initial_backoff_s", "max_backoff_s", "budget_tokens", "budget_return"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 0")
        if self.multiplier < 1:
            raise ValueError(f"multiplier is {self.multiplier}; it must be at least 1, which keeps waits constant")
        for name in ("attempt_timeout_s", "hedge_after_s"):
            given = getattr(self, name)
            if given is not None and not 0 < given < math.inf:
                raise ValueError(f"{name} is {given}; it must be above 0 and finite, or None, which turns it off")

    @property
    def watches(self) -> bool:
        """Whether attempts are watched while they run."""
        return self.attempt_timeout_s is not None or self.hedge_after_s is not None

    @property
    def waits(self) -> bool:
        """Whether calls wait for a server that has never answered."""
        return self.wait_for_ready and self.max_attempts > 1

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

    def failed(self, tokens: float = 1.0) -> bool:
        """Take the tokens of a failure. Return whether a retry is allowed."""
        with self._lock:
            self._tokens = max(0.0, self._tokens - tokens)
            return self._tokens > self._policy.budget_tokens / 2

    def hedged(self) -> bool:
        """Take the token of a second attempt beside one that runs. Return False, and take nothing, if none is left."""
        with self._lock:
            allowed = self._tokens - 1.0 >= self._policy.budget_tokens / 2
            self._tokens -= allowed
            return allowed


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
    _begun: dict[Turn, float] = field(default_factory=dict)
    """The time at which each attempt that runs began, oldest first."""
    waited: int = 0
    """Number of attempts that waited for a server to start."""
    _final: bool = False
    """Whether no further attempt is allowed while one runs."""

    @property
    def made(self) -> int:
        """Number of attempts so far, without those that waited for a server to start."""
        return len(self.tried) - self.waited

    def begin(self) -> Turn:
        """Begin the next attempt, on a connection that the call has not tried where there is one."""
        turn = self.lanes.take(self.tried)
        self.tried.append(turn)
        self._begun[turn] = self.retrying.clock()
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
        self._begun.pop(turn, None)
        tokens = self.lanes.failed(turn, error)
        if not is_retryable(error):
            return None
        if self.retrying.policy.waits and not self.lanes.reached and may_start(error):
            self.waited += 1
            ceiling_s = min(_LONGEST_START_WAIT_S, self.retrying.policy.backoff_s(self.waited, None, 1.0))
            return self._within_deadline(self.retrying.jitter() * ceiling_s)
        allowed = self.retrying.budget.failed(tokens)
        if not allowed or self.made >= self.retrying.policy.max_attempts:
            return None
        # The delay is that of one server. Another one can take the call at once.
        elsewhere = isinstance(error, NotServing) and self.lanes.others_work(turn)
        delay_s = None if elsewhere else error.retry_delay_s
        return self._within_deadline(self.retrying.policy.backoff_s(self.made, delay_s, self.retrying.jitter()))

    def _within_deadline(self, wait_s: float) -> float | None:
        """Return a wait, or None where it leaves no time for an attempt: the cause is raised, not DeadlineExpired."""
        remaining_s = self.remaining_s()
        return None if remaining_s is not None and wait_s >= remaining_s else wait_s

    def patience_s(self) -> float | None:
        """Return the seconds until a running attempt is overdue, at least 0; None if none will be."""
        due_s = self._due_s()
        return None if due_s is None else max(0.0, due_s - self.retrying.clock())

    def overdue(self) -> tuple[Turn | None, bool]:
        """Return what to do about an overdue attempt: the attempt to cancel, if any, and whether to begin another."""
        due_s, now, policy = self._due_s(), self.retrying.clock(), self.retrying.policy
        if due_s is None or now < due_s:
            return None, False
        turn, begun_s = next(iter(self._begun.items()))
        limit_s, budget = policy.attempt_timeout_s, self.retrying.budget
        more = self.made < policy.max_attempts
        if limit_s is None or now < begun_s + limit_s:  # it is time for a hedge
            self._final = not (more and budget.hedged())
            return None, not self._final
        beside = len(self._begun) > 1
        if not budget.failed(self.lanes.stalled(turn)) or not (more or beside):
            self._final = True
            return None, False
        del self._begun[turn]
        return turn, not beside

    def _due_s(self) -> float | None:
        """Return the time at which the oldest running attempt is overdue; None if it never is."""
        if self._final or not self._begun:
            return None
        policy, begun_s = self.retrying.policy, next(iter(self._begun.values()))
        waits_s = [
            wait_s
            for wait_s in (policy.attempt_timeout_s, policy.hedge_after_s if len(self._begun) == 1 else None)
            if wait_s is not None
        ]
        return begun_s + min(waits_s) if waits_s else None
