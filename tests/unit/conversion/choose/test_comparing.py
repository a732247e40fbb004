"""When another graph is faster by enough to be kept, and the reason if it is not.

`timing_of` takes the seconds of each round, by workload, of two graphs. All times here are made by hand. Nothing runs,
and nothing raises.
"""

from __future__ import annotations

import pytest
from attnserve_server.conversion.choose.comparing import timing_of

ROUNDS = [1.0, 1.1, 0.9, 1.0, 1.05, 0.95, 1.0, 1.0, 1.0]


def times(factor: float) -> list[float]:
    """Return the times of the rounds, each times a factor."""
    return [factor * each for each in ROUNDS]


def test_clearly_faster_graph_pays() -> None:
    timing = timing_of([ROUNDS, ROUNDS], [times(0.9), times(0.96)])
    assert timing.pays
    assert timing.ratio == pytest.approx((0.9 * 0.96) ** 0.5, abs=1e-3)


@pytest.mark.parametrize(
    ("first", "second"),
    [(1.2, 1.2), (1.0, 1.0), (0.99, 0.99), (0.8, 1.03)],
    ids=["slower", "as fast", "within noise", "slower on one workload"],
)
def test_graph_that_is_not_clearly_faster_does_not_pay(first: float, second: float) -> None:
    assert not timing_of([ROUNDS, ROUNDS], [times(first), times(second)]).pays


@pytest.mark.parametrize(
    ("source_s", "other_s", "reason"),
    [
        ([[1.0] * 9], [[0.994] * 9], "it takes 0.994 of the time, more than the 0.98 at which another graph is kept"),
        (
            [[1.0] * 9] * 2,
            [[0.8] * 9, [1.03] * 9],
            "it takes 0.908 of the time over all, but 1.030 on one workload, where at most 1.02 is allowed",
        ),
        (
            [[1.0] * 9],
            [[0.941] * 5 + [1.3] * 4],
            "it takes 0.941 of the time at the median, but 1.300 or more in a quarter of the rounds, not below 1",
        ),
        ([[1.0] * 9], [[0.97] * 9], ""),
    ],
    ids=["median", "one workload", "spread", "none"],
)
def test_reason_names_the_bound_that_failed(
    source_s: list[list[float]], other_s: list[list[float]], reason: str
) -> None:
    assert timing_of(source_s, other_s).reason("the") == reason


@pytest.mark.parametrize("ratio", [0.9797, 0.9802, 0.9804, 0.9806])
def test_bounds_hold_for_the_numbers_that_the_report_shows(ratio: float) -> None:
    timing = timing_of([[1.0] * 9], [[ratio] * 9])
    assert timing.pays == (f"{timing.ratio:.3f}" <= "0.980")


def test_gain_that_only_some_rounds_show_does_not_pay() -> None:
    # The median is 0.97, and a third of the rounds were slower.
    fused = [0.97, 0.97, 0.97, 0.9, 0.9, 0.9, 1.3, 1.3, 1.3]
    assert not timing_of([[1.0] * 9], [fused]).pays
