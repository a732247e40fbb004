"""When to send a request again: a policy of values, a budget, and one loop's worth of decisions for both clients."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Lock
from typing import Final

from attnserve_client._status import is_retryable
from attnserve_client.errors import AttnserveError

DEFAULT_TIMEOUT_S: Final = 30.0
READY_TIMEOUT_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often and how long to wait. The same values decide for `Client` and `AsyncClient`.

    The wait before attempt n + 1 is drawn evenly from 0 to `initial_backoff_s * multiplier ** (n - 1)`, at most
    `max_backoff_s` (full jitter), and never less than what the server asked for. A failure that may be retried costs
    the budget 1, a success gives `budget_return` back; at half of `budget_tokens` and below nothing is retried, which
    holds attempts per call near 1 + `budget_return` when a server keeps failing.

    Source: Brooker 2015, "Exponential Backoff And Jitter"; gRPC proposal A6, "gRPC Retry Design", on throttling.

    Attributes:
        max_attempts: Most times that one request is sent; 1 never retries.
        initial_backoff_s: Upper end of the first wait, in seconds.
        multiplier: What each further wait's upper end grows by.
        max_backoff_s: Greatest upper end, in seconds.
        budget_tokens: Size of the budget, full at the start. It is kept by client, not by process.
        budget_return: What a success gives back.
    """

    max_attempts: int = 4
    initial_backoff_s: float = 0.1
    multiplier: float = 2.0
    max_backoff_s: float = 5.0
    budget_tokens: float = 10.0
    budget_return: float = 0.1

    def __post_init__(self) -> None:
        if self.max_attempts < 1:
            raise ValueError(f"max_attempts {self.max_attempts} is below 1")
        if min(self.initial_backoff_s, self.max_backoff_s, self.budget_tokens, self.budget_return) < 0:
            raise ValueError("backoffs and budgets must not be negative")
        if self.multiplier < 1:
            raise ValueError(f"multiplier {self.multiplier} is below 1")

    def backoff_s(self, attempt: int, retry_delay_s: float | None, jitter: float) -> float:
        """The wait after failed attempt number `attempt` (from 1), in seconds.

        Args:
            attempt: How many attempts have failed.
            retry_delay_s: The server's lower bound, if it gave one.
            jitter: A number from 0 to 1.
        """
        # The exponent is bounded so that a policy with many attempts cannot overflow a float.
        ceiling_s = min(self.max_backoff_s, self.initial_backoff_s * self.multiplier ** min(attempt - 1, 64))
        # Added and not maximised: callers that were told the same delay must not come back at the same moment.
        return (retry_delay_s or 0.0) + jitter * ceiling_s


class RetryBudget:
    """A token bucket that all calls of one client share. Any thread may use it."""

    def __init__(self, policy: RetryPolicy) -> None:
        self._policy = policy
        self._tokens = policy.budget_tokens  # guarded by _lock
        self._lock = Lock()

    @property
    def tokens(self) -> float:
        """What is left."""
        return self._tokens

    def succeeded(self) -> None:
        """Gives a little back."""
        with self._lock:
            self._tokens = min(self._policy.budget_tokens, self._tokens + self._policy.budget_return)

    def failed(self) -> bool:
        """Takes the cost of a failure, and says whether a retry is still allowed."""
        with self._lock:
            self._tokens = max(0.0, self._tokens - 1.0)
            return self._tokens > self._policy.budget_tokens / 2


@dataclass(frozen=True, slots=True)
class Retrying:
    """A policy, its budget, and where time and chance come from."""

    policy: RetryPolicy
    budget: RetryBudget
    clock: Callable[[], float] = time.monotonic
    jitter: Callable[[], float] = random.random

    @classmethod
    def of(cls, policy: RetryPolicy) -> Retrying:
        """With a full budget, the system's monotonic clock and its own source of chance."""
        return cls(policy, RetryBudget(policy))

    def deadline(self, timeout_s: float | None) -> float | None:
        """Return the time on this clock at which a timeout that starts now ends; None for no timeout."""
        return None if timeout_s is None else self.clock() + timeout_s

    def attempts(self, deadline: float | None) -> Attempts:
        """Return the attempts of one call that ends at `deadline`."""
        return Attempts(self, deadline)


@dataclass(slots=True)
class Attempts:
    """One call's attempts. It decides; the caller sends and waits."""

    retrying: Retrying
    deadline: float | None
    made: int = field(default=0)

    def remaining_s(self) -> float | None:
        """What is left for the next attempt, in seconds, at least 0; None without a deadline."""
        return None if self.deadline is None else max(0.0, self.deadline - self.retrying.clock())

    def succeeded(self) -> None:
        """The call is over and went well."""
        self.retrying.budget.succeeded()

    def wait_after(self, error: AttnserveError) -> float | None:
        """Seconds to wait before the next attempt, or None where `error` is final."""
        self.made += 1
        if not is_retryable(error):
            return None
        allowed = self.retrying.budget.failed()
        if not allowed or self.made >= self.retrying.policy.max_attempts:
            return None
        wait_s = self.retrying.policy.backoff_s(self.made, error.retry_delay_s, self.retrying.jitter())
        remaining_s = self.remaining_s()
        # A wait that ends past the deadline leaves nothing to try in: the real cause now is worth more than a
        # DeadlineExpired later.
        return None if remaining_s is not None and wait_s >= remaining_s else wait_s
