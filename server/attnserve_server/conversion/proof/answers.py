"""Answers that an attack compares: of one sequence alone, and of its row in a batch. Bounds memory and time of runs.

An attack runs a graph on batches that are likely to change an answer. A run that may not end in time raises OutOfTime.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from attnserve_server.attention.bands import band_keys
from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.base.tolerances import max_abs
from attnserve_server.conversion.probing.feeds import Lengths, croppers
from attnserve_server.conversion.proof.contents import ORDINARY, Author, Draft
from attnserve_server.conversion.proof.target import Target
from attnserve_server.domain.clock import Clock
from attnserve_server.domain.values import Array
from attnserve_server.model.certificate import MaskNeed
from attnserve_server.model.equality import WEIGHTS_PREFIX, Equality
from attnserve_server.model.manifest import SiteSpec

MAX_RUN_BYTES: Final = 2 << 30
"""Runs with a greater estimate of memory are not tried."""
_KEPT_BYTES: Final = 256 << 20
"""The maximum size of the cached sequences and answers, which several probes compare with."""
_TOKEN_BYTES: Final = 64 << 10
"""Allowance for the hidden values of one position: a few rows of 4,096 floats."""
_UNKNOWN_HEADS: Final = 8
"""The assumed number of heads where the graph has attention without a known site. Its scores take memory too."""
_TOKEN_WORK: Final = 128
"""In the estimate of a run's time, one position costs as much as this many scores."""
_TELLING_S: Final = 0.05
"""In longer runs, most work grows with lengths and rows. In shorter ones it is overhead."""

Answer = Mapping[str, Array]
"""Outputs, and weights as `attention.<site>`, of one sequence: no batch axis, cropped to its own lengths."""


class OutOfTime(Exception):
    """A run would not end, or did not end, before the attack's time was over."""


@dataclass(frozen=True, slots=True)
class Difference:
    """The greatest difference between a sequence's answer in a batch and its answer alone.

    Args:
        error: The difference as a multiple of the allowed one. Above 1 the answers differ.
        name: The output, or `attention.<site>`.
        by: The absolute difference, in the unit of the answer.
        fault: Why the batch did not run, in the runtime's words. Empty where it ran.
    """

    error: float
    name: str = ""
    by: float = 0.0
    fault: str = ""


@dataclass(slots=True)
class _Kept:
    """A sequence, and its answer alone once it `ran`."""

    sequence: Mapping[str, Array]
    answer: Answer | None = None
    ran: bool = False


class Answers:
    """Runs a tapped graph, and caches the answers of sequences alone. For use by one thread."""

    def __init__(self, target: Target, masks: Sequence[MaskNeed], clock: Clock) -> None:
        self.target = target
        self.author = Author(target.sampler, masks, target.max_lengths, target.extreme_ids)
        self._clock = clock
        self._kept: OrderedDict[Draft, _Kept] = OrderedDict()
        self._kept_bytes = 0
        self._seconds, self._work = 0.0, 0.0
        self.usual: dict[str, float] = {}
        """The greatest finite value of each output, in the answers so far to sequences of ordinary values."""
        self.deadline = math.inf
        """Monotonic seconds. No run is started that would end later."""

    def now(self) -> float:
        """Return the time, in monotonic seconds."""
        return self._clock.now()

    def sequence(self, draft: Draft) -> Mapping[str, Array]:
        """Return the arrays of a draft, without the batch axis."""
        return self._of(draft).sequence

    def may_pad(self, draft: Draft) -> bool:
        """Return whether the server would pad the sequence."""
        return not self.author.masks or self.author.may_pad(self.sequence(draft))

    def alone(self, draft: Draft) -> Answer | None:
        """Return the sequence's answer alone, unpadded. None where the run fails or gives NaN.

        Raises:
            OutOfTime: The deadline is too near.
        """
        kept = self._of(draft)
        if not kept.ran:
            kept.answer, kept.ran = self._run_alone(draft), True
            self._kept_bytes += _size(kept.answer)
        return kept.answer

    def _run_alone(self, draft: Draft) -> Answer | None:
        try:
            answer = self.together([self.sequence(draft)], [draft.own], draft.own)[0]
        except BuildRefused:
            return None
        outputs = {spec.name: np.abs(answer[spec.name].astype(np.float64)) for spec in self.target.outputs}
        for name, sizes in outputs.items() if draft.content == ORDINARY else ():
            greatest = float(sizes[np.isfinite(sizes)].max(initial=0.0))
            self.usual[name] = max(self.usual.get(name, 0.0), greatest)
        return None if any(np.isnan(sizes).any() for sizes in outputs.values()) else answer

    def together(
        self, sequences: Sequence[Mapping[str, Array]], own: Sequence[Lengths], padded: Lengths
    ) -> list[Answer]:
        """Return the answers of sequences in one batch, each cropped to its own lengths.

        Args:
            sequences: Arrays by input, without the batch axis.
            own: The lengths of each.
            padded: The lengths that all are padded to.

        Raises:
            BuildRefused: The run failed.
            OutOfTime: The deadline is too near.
        """
        feeds = self.author.sampler.batch(sequences, padded)
        fetched = self._timed(feeds, self._work_of(len(sequences), padded))
        return [self._cropped(fetched, row, lengths) for row, lengths in enumerate(own)]

    def rows_that_fit(self, padded: Lengths) -> int:
        """Return how many rows of these lengths fit into one run. 0: not even one."""
        return int(MAX_RUN_BYTES // self._bytes_of(padded))

    def _timed(self, feeds: Mapping[str, Array], work: float) -> dict[str, Array]:
        """Return the fetched outputs of one run, by the names of an answer."""
        begun = self._clock.now()
        left = self.deadline - begun
        if left <= 0 or self._predicted_s(work) > left:
            raise OutOfTime
        runner, names = self.target.runner, self.target.fetched
        limit_s = min(left, runner.limit_s)
        try:
            outputs = runner.run(feeds, list(names.values()), limit_s=limit_s)
            return {name: outputs[output] for name, output in names.items()}
        except BuildRefused:
            if self._clock.now() - begun >= limit_s:
                raise OutOfTime from None
            raise
        finally:
            if work >= self._work:
                self._seconds, self._work = self._clock.now() - begun, work

    def _predicted_s(self, work: float) -> float:
        """Return how long a run may take, by the run of the most work so far.

        Small runs predict nothing about larger ones.
        """
        grows = self._seconds > _TELLING_S
        return self._seconds * max(work / self._work, 1.0) if grows else self._seconds

    def _cropped(self, fetched: Mapping[str, Array], row: int, own: Lengths) -> Answer:
        axes = {site.name: site.weight_axes for site in self.target.available}
        crops = croppers(self.target.outputs, axes, own, self.target.derived)
        answer = {name: crop(fetched[name][row]) for name, crop in crops.items()}
        for site in self.target.available:
            name = WEIGHTS_PREFIX + site.name
            answer[name] = _of_own_keys(site, answer[name], self._lengths(own))
        # Views would keep the whole batch in memory.
        return {name: array.copy() for name, array in answer.items()}

    def _lengths(self, own: Lengths) -> dict[str, int]:
        return {**own, **{symbol: form.length_at(own) for symbol, form in self.target.derived.items()}}

    def _of(self, draft: Draft) -> _Kept:
        """Return the cache entry of a draft. The least recently used drafts are dropped to make room."""
        kept = self._kept.get(draft)
        if kept is not None:
            self._kept.move_to_end(draft)
            return kept
        while self._kept_bytes > _KEPT_BYTES and self._kept:
            _, dropped = self._kept.popitem(last=False)
            self._kept_bytes -= _size(dropped.sequence) + _size(dropped.answer)
        kept = self._kept[draft] = _Kept(self.author.sequence(draft))
        self._kept_bytes += _size(kept.sequence)
        return kept

    def _bytes_of(self, padded: Lengths) -> float:
        """Return the memory of one row: weights of every site and their copies, hidden values, one site's scores."""
        lengths = self._lengths(padded)
        positions = max(lengths.values(), default=1)
        scores = [_scores(site, lengths) for site in self.target.available]
        under_way = max(scores, default=_UNKNOWN_HEADS * positions**2)
        return 4.0 * (2 * sum(scores) + 2 * under_way) + _TOKEN_BYTES * (sum(padded.values()) + 1)

    def _work_of(self, rows: int, padded: Lengths) -> float:
        return rows * sum(length * (length + _TOKEN_WORK) for length in padded.values()) + 1.0


def compare(equality: Equality, found: Answer, reference: Answer) -> Difference:
    """Return the greatest difference of an answer in a batch from the answer alone, whose outputs both must have."""
    worst = Difference(0.0)
    for name, array in reference.items():
        error = equality.error(name, found[name], array)
        if error > worst.error:
            worst = Difference(error, name, max_abs(found[name], array))
    return worst


def _of_own_keys(site: SiteSpec, weights: Array, lengths: Lengths) -> Array:
    """Return weights with zeros in the columns of a band that represent no key of the sequence."""
    keys = lengths.get(site.key_axis)
    if site.band is None or site.whole_rows or keys is None:
        return weights
    return np.where(band_keys(site.band, weights.shape[1], keys) >= 0, weights, 0)


def _scores(site: SiteSpec, lengths: Lengths) -> int:
    columns = site.columns if isinstance(site.columns, int) else lengths.get(site.columns, 1)
    return site.heads * lengths.get(site.query_axis, 1) * columns


def _size(arrays: Mapping[str, Array] | None) -> int:
    return sum(array.nbytes for array in arrays.values()) if arrays is not None else 0
