"""Whether a map shows what an output depends on: the texts to run without some words, and figures from their outputs.

Nothing here calls a server. Source: DeYoung et al. 2020, "ERASER", section 4.2, on comprehensiveness and sufficiency;
Jain and Wallace 2019, "Attention is not Explanation", section 4.1, on leave-one-out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from attnserve_client._map_data import MapData
from attnserve_client._tokens import Token
from attnserve_client.errors import InvalidRequest

RESAMPLES: Final = 2_000
"""Resamples of the bootstrap: enough for two digits of a 95 % interval."""
Vector = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with its 95 % interval: percentile bootstrap, 2,000 resamples. Source: Efron 1979.

    Attributes:
        mean: The mean.
        low: Its 2.5th percentile over the resamples.
        high: Its 97.5th percentile.
    """

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Faithfulness:
    """How the output of one text changes without words, chosen by attention and at random.

    All changes are drops of one number: the score of the label that the whole text gets or, without labels,
    the cosine of an output with that of the whole text.

    Attributes:
        measure: That number: `label NAME` or `cosine of OUTPUT`.
        words: The words that may be left out.
        weights: Weight of each word: the mean of its column of the map.
        leave_one_out: Drop without each single word.
        rank_agreement: Spearman's correlation of weights and leave-one-out; NaN if either is constant.
        comprehensiveness: Drop without the words of greatest weight, the mean over the shares: higher is better.
        sufficiency: Drop with these words alone, in the same way: lower is better.
        random_comprehensiveness: The same for random words, as the mean over the draws.
        random_sufficiency: The same.
        comprehensiveness_gain: Comprehensiveness less that of random words. An interval above 0: the words of greatest
            weight matter more to the output than random ones.
        sufficiency_gain: Sufficiency of random words less that of the map. An interval above 0 is better.
        shares: Shares of the words that were left out or kept.
    """

    measure: str
    words: tuple[str, ...]
    weights: tuple[float, ...]
    leave_one_out: tuple[float, ...]
    rank_agreement: float
    comprehensiveness: float
    sufficiency: float
    random_comprehensiveness: Interval
    random_sufficiency: Interval
    comprehensiveness_gain: Interval
    sufficiency_gain: Interval
    shares: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the figures in plain types for JSON; None for a correlation that is not a number."""
        plain = asdict(self)
        plain["rank_agreement"] = None if np.isnan(self.rank_agreement) else self.rank_agreement
        return plain


@dataclass(frozen=True, slots=True)
class Plan:
    """The texts to run, in this order: without each word; then, for the map and each draw, without and with its words.

    Attributes:
        words: The units of the text that may be left out.
        weights: float64 (N,), weight of each.
        shares: Shares of the words.
        draws: Number of random orders.
        texts: The N + (1 + draws) * shares * 2 texts.
    """

    words: tuple[Token, ...]
    weights: Vector
    shares: tuple[float, ...]
    draws: int
    texts: tuple[str, ...]


def plan(text: str, attention: MapData, shares: Sequence[float], draws: int, seed: int) -> Plan:
    """Plan the texts of one measurement.

    Args:
        text: The whole text.
        attention: Its map by word; the mean over its heads and rows is the weight of a word.
        shares: Shares of the words to leave out, above 0 and below 1.
        draws: Random orders of the words.
        seed: Of the random orders.

    Raises:
        InvalidRequest: The text has fewer than two words, a share is out of range, or `draws` is below 2.
        ValueError: The map holds scores.
    """
    if not shares or not all(0 < share < 1 for share in shares):
        raise InvalidRequest.of("shares", f"{tuple(shares)} are not all above 0 and below 1")
    if draws < 2:
        raise InvalidRequest.of("draws", f"{draws} is below 2, which an interval needs")
    places = [
        place for place, token in enumerate(attention.key_tokens) if not token.special and token.end > token.start
    ]
    if len(places) < 2:
        raise InvalidRequest.of("text", f"it has {len(places)} words; to leave some out, it needs at least 2")
    words = tuple(attention.key_tokens[place] for place in places)
    weights = attention.head_weights().astype(np.float64).mean(axis=0)[places]
    generator = np.random.default_rng(seed)
    orders = [np.argsort(-weights, kind="stable"), *(generator.permutation(len(words)) for _ in range(draws))]
    texts = [without(text, words, {place}) for place in range(len(words))]
    for order in orders:
        for share in shares:
            chosen = set(order[: count_of(share, len(words))].tolist())
            texts += [without(text, words, chosen), without(text, words, set(range(len(words))) - chosen)]
    return Plan(words, weights, tuple(shares), draws, tuple(texts))


def count_of(share: float, words: int) -> int:
    """Return how many words a share is: at least one, and not all."""
    return min(words - 1, max(1, round(share * words)))


def without(text: str, words: Sequence[Token], left_out: set[int]) -> str:
    """Return the text without some of its words; spaces around them become one."""
    pieces, at = [], 0
    for place in sorted(left_out):
        pieces.append(text[at : words[place].start])
        at = words[place].end
    pieces.append(text[at:])
    return " ".join("".join(pieces).split())


def judge(planned: Plan, whole: float, values: Sequence[float], measure: str, seed: int) -> Faithfulness:
    """Return the figures of a plan.

    Args:
        planned: The plan.
        whole: The measured number of the whole text.
        values: That of each text of the plan, in order.
        measure: Name of the number.
        seed: Of the bootstrap.

    Raises:
        ValueError: The number of values is another one than that of the texts.
    """
    if len(values) != len(planned.texts):
        raise ValueError(f"{len(values)} values for {len(planned.texts)} texts")
    count = len(planned.words)
    drops = whole - np.asarray(values, dtype=np.float64)
    # (1 + draws, 2): comprehensiveness and sufficiency of the map, then of each draw, as means over the shares.
    by_order = drops[count:].reshape(1 + planned.draws, len(planned.shares), 2).mean(axis=1)
    (comprehensiveness, sufficiency), random = by_order[0].tolist(), by_order[1:]
    generator = np.random.default_rng(seed)
    return Faithfulness(
        measure=measure,
        words=tuple(token.text for token in planned.words),
        weights=tuple(planned.weights.tolist()),
        leave_one_out=tuple(drops[:count].tolist()),
        rank_agreement=spearman(planned.weights, drops[:count]),
        comprehensiveness=comprehensiveness,
        sufficiency=sufficiency,
        random_comprehensiveness=bootstrap(random[:, 0], generator),
        random_sufficiency=bootstrap(random[:, 1], generator),
        comprehensiveness_gain=bootstrap(comprehensiveness - random[:, 0], generator),
        sufficiency_gain=bootstrap(random[:, 1] - sufficiency, generator),
        shares=planned.shares,
    )


def bootstrap(values: Vector, generator: np.random.Generator) -> Interval:
    """Return the mean of values (N,) with its 95 % percentile bootstrap interval."""
    means = values[generator.integers(len(values), size=(RESAMPLES, len(values)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(values.mean()), float(low), float(high))


def spearman(first: Vector, second: Vector) -> float:
    """Return the rank correlation of two vectors; equal values share their mean rank. NaN if one is constant."""
    ranks = [_ranks(each) for each in (first, second)]
    if any(np.ptp(each) == 0 for each in ranks):
        return float("nan")
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def _ranks(values: Vector) -> Vector:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last: Vector = np.cumsum(counts).astype(np.float64)
    mean_ranks: Vector = last - (counts - 1) / 2
    return mean_ranks[inverse]


def cosine(first: npt.NDArray[Any], second: npt.NDArray[Any]) -> float:
    """Return the cosine of two arrays of one shape, flattened; 0 if one is all zeros."""
    one, other = (each.astype(np.float64).ravel() for each in (first, second))
    length = float(np.linalg.norm(one) * np.linalg.norm(other))
    return float(one @ other) / length if length else 0.0
