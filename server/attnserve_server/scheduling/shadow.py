"""The decisions of the shadow check: which sequences of a batch are repeated alone, and when. `verifier` acts on them.

Served work always goes first:

- A repeat starts only where nothing waits, and only if another instance stays free, so that a newcomer starts at once.
  A model of one instance repeats on that one.
- A repeat is stopped at its next node when work waits and no instance is free.
- One repeat at a time, of a few samples that are kept; what has no room is dropped.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from attnserve_server.scheduling.policy import Waiting

Action = Literal["count", "isolate"]


@dataclass(frozen=True, slots=True)
class ShadowSettings:
    """How many sequences are repeated, what is kept for that, and what follows from a difference."""

    share: float
    """Of the sequences that run in a batch, from 0 to 1."""
    action: Action = "count"
    max_samples: int = 4
    """Most sequences kept, from the draw until the end of their repeat."""
    max_bytes: int = 64 * 2**20
    """Most bytes of tensors that they and their answers take together: over 400 tokens with every map of MiniLM."""
    rest_s: float = 0.005
    """How long an instance must have been idle, in seconds. Answers go out first, and a caller that sends its next
    request at once finds the instance free."""
    warn_every_s: float = 10.0
    """Least seconds between two warnings; the next one says how many differences were not logged."""


def has_room(samples: int, kept_bytes: int, size: int, settings: ShadowSettings) -> bool:
    """Whether one more sample of `size` bytes may be kept beside `samples` others of `kept_bytes` in all."""
    return samples < settings.max_samples and kept_bytes + size <= settings.max_bytes


def may_start(waiting: int, free: int, instances: int) -> bool:
    """Whether an idle instance may repeat a sample.

    Args:
        waiting: sequences in the queue.
        free: instances that run nothing, the idle one included.
        instances: how many there are.
    """
    return waiting == 0 and free >= min(2, instances)


def must_stop(waiting: int, free: int) -> bool:
    """Whether the repeat under way must make way: sequences wait, and no instance is free to take them."""
    return waiting > 0 and free == 0


def size_of(view: Waiting) -> int:
    """Bytes of one sequence alone: inputs, outputs and the wanted maps, with the copies that its run needs."""
    return sum(math.prod(view.lengths[at] for at in axes) * size for axes, size in view.footprint.items())


class Throttle:
    """Lets one event through in `every_s` seconds, and counts the others. Event loop only."""

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        self._next_s = -math.inf
        self._held_back = 0

    def passes(self, now: float) -> int | None:
        """How many events were held back since the last one that passed; None where this one is held back too."""
        if now < self._next_s:
            self._held_back += 1
            return None
        held_back, self._held_back = self._held_back, 0
        self._next_s = now + self._every_s
        return held_back
