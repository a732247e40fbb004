"""Answers of an attack: what is cached, and how runs are bounded in memory and time.

An attack runs a model on batches, and compares each row with the sequence's answer alone; a `Draft` describes one
sequence. `Slow` and `ManualClock` replace the time of runs. A run that would end past the deadline raises OutOfTime; a
sequence that the model refuses has the answer None.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import batch_graphs as graphs
import numpy as np
import pytest
from attacked import SOME, target_of
from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.probing.runtime import GraphRunner
from attnserve_server.conversion.proof import answers as answers_module
from attnserve_server.conversion.proof.answers import MAX_RUN_BYTES, Answers, OutOfTime
from attnserve_server.conversion.proof.contents import Draft
from attnserve_server.conversion.proof.target import Target
from attnserve_server.domain.clock import MonotonicClock

SHORT, OTHER = Draft((("t", 3),)), Draft((("t", 3),), number=1)


class ManualClock:
    def __init__(self) -> None:
        self.time = 0.0

    def now(self) -> float:
        return self.time


class Slow:
    """A runner whose runs take `takes` seconds, and fail where they would exceed their limit."""

    limit_s = 600.0

    def __init__(self, runner: GraphRunner, clock: ManualClock, takes: float) -> None:
        self._runner, self._clock, self.takes = runner, clock, takes
        self.runs = 0

    def run(self, feeds: Mapping[str, Any], fetches: Collection[str], *, limit_s: float) -> dict[str, Any]:
        self.runs += 1
        self._clock.time += min(self.takes, limit_s)
        if self.takes > limit_s:
            raise BuildRefused("one run took too long")
        return self._runner.run(feeds, fetches)


def slow(target: Target, takes: float) -> tuple[Answers, Slow, ManualClock]:
    clock = ManualClock()
    runner = Slow(target.runner, clock, takes)
    return Answers(replace(target, runner=cast("GraphRunner", runner)), (), clock), runner, clock


def test_answer_alone_runs_once(tmp_path: Path) -> None:
    answers, runner, _ = slow(target_of(graphs.pointwise(), tmp_path), 1.0)
    first = answers.alone(SHORT)
    assert answers.alone(SHORT) is first
    assert runner.runs == 1


def test_least_recently_used_drafts_are_dropped_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers_module, "_KEPT_BYTES", 300)  # a sequence and its answer are 96 bytes each
    answers, runner, _ = slow(target_of(graphs.pointwise(), tmp_path), 1.0)
    for draft in (SHORT, OTHER, Draft((("t", 3),), number=2), SHORT):
        answers.alone(draft)
    assert runner.runs == 4
    answers.alone(SHORT)
    assert runner.runs == 4


def test_run_predicted_to_end_after_the_deadline_is_not_started(tmp_path: Path) -> None:
    answers, runner, clock = slow(target_of(graphs.pointwise(), tmp_path), 2.0)
    answers.alone(SHORT)
    answers.deadline = clock.time + 1
    with pytest.raises(OutOfTime):
        answers.alone(OTHER)
    assert runner.runs == 1


def test_run_stopped_at_the_deadline_does_not_count_as_a_failure_of_the_model(tmp_path: Path) -> None:
    answers, _, _ = slow(target_of(graphs.pointwise(), tmp_path), 5.0)
    answers.deadline = 2.0
    with pytest.raises(OutOfTime):
        answers.alone(SHORT)


def test_sequence_that_the_model_refuses_has_no_answer(tmp_path: Path) -> None:
    """The graph takes lengths up to 39: a length of 40 is outside its table."""
    nodes = "length = Shape<start=1, end=2>(x) more = Gather(table, length) y = Mul(x, more)"
    target = target_of(graphs.on_floats(nodes, table=np.ones(40, np.float32)), tmp_path)
    answers = Answers(target, (), MonotonicClock())
    assert answers.alone(SHORT) is not None
    assert answers.alone(Draft((("t", 40),))) is None


def test_answer_with_nan_is_none_and_infinities_are_kept(tmp_path: Path) -> None:
    draft = Draft((("t", 3),), "an empty mask")
    target = target_of(graphs.masked_attention(), tmp_path)
    assert Answers(target, (SOME,), MonotonicClock()).alone(draft) is None
    endless = target_of(graphs.on_floats("y = Mul(x, many)", many=float("inf")), tmp_path)
    answer = Answers(endless, (), MonotonicClock()).alone(SHORT)
    assert answer is not None
    assert np.isinf(answer["y"]).all()


def test_rows_of_a_run_are_bounded_by_the_memory_of_its_scores(tmp_path: Path) -> None:
    answers = Answers(target_of(graphs.pointwise(), tmp_path), (), MonotonicClock())
    rows = answers.rows_that_fit({"t": 512})
    assert 8 <= rows <= MAX_RUN_BYTES // (4 * 512 * 512)
    assert answers.rows_that_fit({"t": 1024}) <= rows / 2
    assert answers.rows_that_fit({"t": 1 << 20}) == 0
