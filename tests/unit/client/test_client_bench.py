"""The load test: what it sends, when, what it makes of the answers, and when it does not believe itself."""

from __future__ import annotations

import asyncio
import heapq
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attnserve_client import Client, InvalidRequest, ModelNotFound
from attnserve_client.bench.lengths import DEFAULT, Lengths
from attnserve_client.bench.load import PAUSE_AFTER_ERROR_S, Clock, Outcome, Sample, closed_loop, open_loop, poisson
from attnserve_client.bench.report import Effort, report_of, spread
from attnserve_client.bench.run import Plan, run
from attnserve_client.bench.workload import RequestOptions, Workload, of_lengths, of_texts
from attnserve_client.cli._app import app
from attnserve_client.cli._bench_show import Display
from attnserve_client.testing import FakeServer
from rich.console import Console
from typer.testing import CliRunner


class FakeTime:
    """A clock that jumps to the next sleeper's end when nobody has anything else to do."""

    def __init__(self) -> None:
        self.now = 100.0
        self._sleepers: list[tuple[float, int, asyncio.Event]] = []
        self._count = 0

    async def sleep(self, seconds: float) -> None:
        event = asyncio.Event()
        self._count += 1
        heapq.heappush(self._sleepers, (self.now + seconds, self._count, event))
        await event.wait()

    async def drive(self, work: Any) -> None:
        task = asyncio.create_task(work)
        while not task.done():
            for _ in range(5):
                await asyncio.sleep(0)
            if self._sleepers and not task.done():
                until, _, event = heapq.heappop(self._sleepers)
                self.now = max(self.now, until)
                event.set()
        await task

    @property
    def clock(self) -> Clock:
        return Clock(now=lambda: self.now, sleep=self.sleep)


@pytest.fixture
def info(shared_server: FakeServer) -> Any:
    with Client(shared_server.target) as client:
        return client.model("fake")


# -- lengths


@pytest.mark.parametrize("text", ["128", "uniform:4,256", "lognormal:32,0.8,4,256"])
def test_lengths_say_what_they_were_read_from(text: str) -> None:
    assert str(Lengths.parse(text)) == text


@pytest.mark.parametrize(
    "text", ["", "abc", "0", "uniform:3", "uniform:9,3", "lognormal:32,0.8", "lognormal:0,1,4,8", "normal:1,2", "1,2"]
)
def test_what_is_no_distribution_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"length|median"):
        Lengths.parse(text)


def test_drawn_lengths_keep_their_bounds_and_their_median() -> None:
    random = np.random.default_rng(0)
    assert set(Lengths.parse("7").draw(5, random)) == {7}
    assert set(Lengths.parse("uniform:2,4").draw(500, random)) == {2, 3, 4}
    drawn = DEFAULT.draw(20_000, random)
    assert drawn.min() >= 4
    assert drawn.max() <= 256
    # The median of 20,000 draws is off by about 1% of it.
    assert abs(np.median(drawn) - 32) <= 1


# -- workload


def test_share_of_requests_that_ask_is_spread_evenly() -> None:
    asked = RequestOptions(share=0.25)
    assert [asked.with_attention(index) for index in range(8)] == [False, False, False, True] * 2
    assert not any(RequestOptions(share=0).with_attention(index) for index in range(100))
    assert all(RequestOptions(share=1).with_attention(index) for index in range(100))
    assert sum(RequestOptions(share=0.1).with_attention(index) for index in range(1000)) == 100


def test_random_requests_are_the_same_for_the_same_seed(info: Any) -> None:
    first, again, other = (
        of_lengths(info, DEFAULT, RequestOptions(sequences=2), seed=seed, kinds=5) for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other
    assert [len(request.sequences) for request in first.requests] == [2] * 5
    lengths = [sum(each.tensors.tensors[0].shape[0] for each in request.sequences) for request in first.requests]
    assert list(first.tokens or ()) == lengths
    assert first.tokens_of(7) == lengths[2]


def test_lengths_beyond_the_model_are_refused_before_anything_is_sent(info: Any) -> None:
    with pytest.raises(InvalidRequest, match="100000 exceeds the 256 positions"):
        of_lengths(info, Lengths.parse("100000"), RequestOptions(), seed=0)


def test_texts_come_in_turns(info: Any) -> None:
    workload = of_texts(info, ["one", "two", "three"], RequestOptions(sequences=2))
    told = [[each.text.text for each in request.sequences] for request in workload.requests]
    assert told == [["one", "two"], ["three", "one"]]
    assert workload.request(3) is workload.requests[1]
    assert workload.tokens_of(0) == 0


# -- loops


async def test_callers_of_a_closed_loop_wait_for_their_answers() -> None:
    time, samples, at_once = FakeTime(), list[Sample](), 0

    async def send(index: int) -> Outcome:
        nonlocal at_once
        at_once += 1
        assert at_once <= 3
        await time.sleep(1.0)
        at_once -= 1
        return Outcome()

    await time.drive(closed_loop(send, samples.append, callers=3, duration_s=10.0, clock=time.clock))
    assert sorted(sample.index for sample in samples) == list(range(30))
    assert {sample.latency_s for sample in samples} == {1.0}


async def test_closed_loop_stops_after_its_requests() -> None:
    time, samples = FakeTime(), list[Sample]()

    async def send(index: int) -> Outcome:
        await time.sleep(1.0)
        return Outcome()

    await time.drive(closed_loop(send, samples.append, callers=4, duration_s=1e9, requests=10, clock=time.clock))
    assert sorted(sample.index for sample in samples) == list(range(10))


async def test_refused_caller_waits_before_it_tries_again() -> None:
    time, samples = FakeTime(), list[Sample]()

    async def send(index: int) -> Outcome:
        return Outcome(error="OVERLOADED")

    await time.drive(
        closed_loop(send, samples.append, callers=1, duration_s=9.5 * PAUSE_AFTER_ERROR_S, clock=time.clock)
    )
    assert len(samples) == 10


async def test_open_loop_counts_from_when_requests_were_due() -> None:
    time, samples = FakeTime(), list[Sample]()

    async def send(index: int) -> Outcome:
        if index == 1:
            time.now += 3.0  # the whole client stands still: what is due meanwhile is sent late
        await time.sleep(0.5)
        return Outcome()

    await time.drive(open_loop(send, samples.append, gaps=iter([1.0] * 9), duration_s=6.5, clock=time.clock))
    samples.sort(key=lambda sample: sample.index)
    assert [sample.due_s - 100 for sample in samples] == [1, 2, 3, 4, 5, 6]
    assert [sample.sent_s - sample.due_s for sample in samples] == [0, 0, 2, 1, 0, 0]
    # Not 0.5 for those that stood in a queue inside the client.
    assert [sample.latency_s for sample in samples] == [0.5, 3.5, 2.5, 1.5, 0.5, 0.5]


async def test_open_loop_waits_for_nobody() -> None:
    time, samples = FakeTime(), list[Sample]()

    async def send(index: int) -> Outcome:
        await time.sleep(100.0)
        return Outcome()

    await time.drive(open_loop(send, samples.append, gaps=iter([0.125] * 99), duration_s=5.0, clock=time.clock))
    assert len(samples) == 39
    assert max(sample.sent_s - sample.due_s for sample in samples) < 1e-9


def test_poisson_gaps_have_their_mean_and_spread() -> None:
    gaps: Iterator[float] = poisson(50.0, np.random.default_rng(0))
    drawn = np.array([next(gaps) for _ in range(20_000)])
    # Mean and deviation of an exponential are equal; of 20,000 draws each is off by about 1%.
    assert drawn.mean() == pytest.approx(1 / 50, rel=0.05)
    assert drawn.std() == pytest.approx(1 / 50, rel=0.05)


# -- report


def sample(index: int, due: float, took: float, *, late: float = 0.0, error: str = "", **run: Any) -> Sample:
    return Sample(index, due, due + late, due + took, Outcome(error=error, **run))


IDLE = Effort(begun_s=0.0, window_s=10.0, wall_s=10.0, cpu_s=1.0, loop_cpu_s=1.0)
PLAIN = Workload(requests=(), sequences=2, tokens=None)


def test_percentiles_are_values_that_were_seen() -> None:
    values = [float(number) for number in range(1, 1001)]
    assert spread(values) == {"mean": 500.5, "p50": 500, "p95": 950, "p99": 990, "p99.9": 999, "max": 1000}
    assert spread([]) == {}


def test_percentiles_that_too_few_values_reach_are_left_out() -> None:
    assert list(spread([1.0] * 99)) == ["mean", "p50", "p95", "max"]
    assert list(spread([1.0] * 100)) == ["mean", "p50", "p95", "p99", "max"]
    assert list(spread([1.0])) == ["mean", "p50", "max"]


def test_refusals_count_for_nothing_but_themselves() -> None:
    answers = [sample(index, float(index), 0.5) for index in range(9)]
    refusals = [sample(9, 1.0, 0.001, error="OVERLOADED"), sample(10, 1.0, 0.001, error="OVERLOADED")]
    report = report_of([*answers, *refusals], IDLE, PLAIN)
    assert (report.requests, report.answered, report.errors) == (11, 9, {"OVERLOADED": 2})
    assert report.requests_per_s == pytest.approx(0.9)
    assert report.sequences_per_s == pytest.approx(1.8)
    assert report.latency_s["max"] == 0.5
    assert report.error_latency_s["max"] == pytest.approx(0.001)
    assert report.invalid == ()


def test_answers_after_the_window_raise_no_rate() -> None:
    report = report_of([sample(0, 9.0, 0.5), sample(1, 9.0, 2.0)], IDLE, PLAIN)
    assert report.requests_per_s == pytest.approx(0.1)
    assert report.latency_s["max"] == 2.0


def test_runs_count_once_however_many_shared_them() -> None:
    shared = {"batch_size": 4, "useful_tokens": 100, "computed_tokens": 120}
    alone = {"batch_size": 1, "useful_tokens": 50, "computed_tokens": 50}
    samples = [sample(index, 0.0, 0.1, **shared) for index in range(4)] + [sample(4, 0.0, 0.1, **alone)]
    report = report_of(samples, IDLE, PLAIN)
    assert report.batch_size == pytest.approx(2.5)
    assert report.computed_over_useful == pytest.approx(170 / 150)


@pytest.mark.parametrize(
    ("effort", "samples", "said"),
    [
        (Effort(0.0, 10.0, 10.0, 9.6, 9.5), [sample(0, 0.0, 0.1)], "event loop was busy for 95%"),
        (IDLE, [sample(index, 0.0, 0.1, late=0.05) for index in range(20)], "ms late (95th"),
        (IDLE, [sample(0, 0.0, 0.1, error="OVERLOADED")], "no request was answered"),
    ],
)
def test_run_that_tells_of_the_client_is_invalid(effort: Effort, samples: list[Sample], said: str) -> None:
    (doubt,) = report_of(samples, effort, PLAIN).invalid
    assert said in doubt


# -- against a server


@pytest.mark.parametrize("stream", [False, True])
def test_every_request_is_answered_once(server: FakeServer, info: Any, stream: bool) -> None:
    workload = of_lengths(info, Lengths.parse("uniform:3,9"), RequestOptions(share=0.5), seed=0, kinds=8)
    plan = Plan(callers=4, requests=40, warm_up_s=0.0, connections=2, stream=stream)
    phases = list[str]()
    report = run(server.target, workload, plan, lambda phase, one: phases.append(phase))
    assert (report.requests, report.answered, report.errors) == (40, 40, {})
    assert phases == ["measuring"] * 40
    # One more of each kind goes before, to fail early.
    assert len(server.requests) == 42
    assert sum(request.HasField("attention") for request in server.requests) == 21


@pytest.mark.parametrize("stream", [False, True])
def test_refusals_are_told_by_their_reason(server: FakeServer, info: Any, stream: bool) -> None:
    workload = of_lengths(info, Lengths.parse("4"), RequestOptions(), seed=0, kinds=1)
    plan = Plan(callers=1, requests=5, warm_up_s=0.0, stream=stream)
    failed = list[int]()

    def fail_later(phase: str, one: Sample) -> None:
        if not failed:
            failed.append(1)
            server.fail_next(server.overloaded(), times=2)

    report = run(server.target, workload, plan, fail_later)
    assert report.answered == 3
    assert report.errors == {"OVERLOADED": 2}


def test_stream_that_breaks_is_opened_anew(raw_server: Any, info: Any) -> None:
    from attnserve.v1 import inference_service_pb2 as wire  # noqa: PLC0415

    opened = list[int]()

    def answers(requests: Iterator[Any], context: Any) -> Iterator[Any]:
        opened.append(1)
        for request in requests:
            yield wire.StreamInferResponse(
                request_id=request.request.request_id, response=wire.InferResponse(results=[wire.SequenceResult()])
            )
            return  # the stream ends after each answer

    def unary(request: Any, context: Any) -> Any:
        return wire.InferResponse(results=[wire.SequenceResult()])

    workload = of_lengths(info, Lengths.parse("4"), RequestOptions(), seed=0, kinds=1)
    with raw_server(StreamInfer=answers, Infer=unary) as server:
        report = run(server.target, workload, Plan(callers=1, requests=4, warm_up_s=0.0, stream=True), lambda *_: None)
    assert report.requests == 4
    assert report.answered >= 2
    assert len(opened) >= 2


def test_model_that_refuses_such_requests_ends_the_run_at_once(server: FakeServer, info: Any) -> None:
    workload = of_lengths(info, Lengths.parse("4"), RequestOptions(), seed=0, kinds=1)
    workload.requests[0].model = "nope"
    with pytest.raises(ModelNotFound):
        run(server.target, workload, Plan(), lambda *_: None)


# -- the command


@pytest.fixture
def attnserve(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("ATTNSERVE_SERVER", server.target)
    monkeypatch.setenv("COLUMNS", "100")
    return lambda *line: CliRunner().invoke(app, ["bench", *line])


QUICK = ("--requests", "30", "--warm-up", "0", "--callers", "3", "--lengths", "uniform:3,9")


def test_command_shows_rates_latencies_and_batches(attnserve: Any) -> None:
    result = attnserve("fake", *QUICK)
    assert result.exit_code in (0, 12), result.output  # a busy machine may make the client the bottleneck
    for word in ("requests/s", "tokens/s", "p95", "queue in the server", "client, loop busy"):
        assert word in result.stdout


def test_command_prints_json(attnserve: Any, tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("one two\n\nthree\n", encoding="utf-8")
    result = attnserve("fake", *QUICK, "--texts", str(texts), "--json", "--attention-share", "0.5")
    told = json.loads(result.stdout)
    assert told["model"] == "fake"
    assert told["texts"] == 2
    assert told["plan"]["callers"] == 3
    assert told["report"]["answered"] == 30
    assert told["report"]["tokens_per_s"] is None


def test_run_to_be_doubted_has_an_exit_code_of_its_own(attnserve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnserve_client.bench.report.BUSY_LIMIT", -1.0)
    result = attnserve("fake", *QUICK)
    assert result.exit_code == 12
    assert "INVALID: the client's event loop was busy" in " ".join(result.stdout.split())


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        (("fake", "--lengths", "abc"), 2, "are not of the form"),
        (("fake", "--texts", "/nowhere/texts"), 2, "cannot read"),
        (("fake", "--rate", "5", "--requests", "5"), 2, "an open loop (--rate) has no"),
        (("nope",), 4, "nope"),
        (("fake", "--sequences", "1000000"), 3, "exceeds the model's"),
        (("fake", "--lengths", "100000"), 3, "exceeds the"),
    ],
)
def test_wrong_line_is_told(attnserve: Any, line: tuple[str, ...], code: int, said: str) -> None:
    result = attnserve(*line)
    assert result.exit_code == code, result.output
    assert said in " ".join(result.output.replace("│", " ").split())


def test_empty_and_binary_files_of_texts_are_refused(attnserve: Any, tmp_path: Path) -> None:
    for name, content, said in (("empty", b"\n \n", "has no text"), ("binary", b"\xff\xfe\xfa", "not UTF-8 text")):
        (tmp_path / name).write_bytes(content)
        result = attnserve("fake", "--texts", str(tmp_path / name))
        assert result.exit_code == 2
        assert said in " ".join(result.output.replace("│", " ").split())


def test_live_display_draws_on_a_terminal_and_nowhere_else() -> None:
    for terminal in (True, False):
        now = [0.0]
        console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
        with Display(Plan(requests=100), console, clock=lambda now=now: now[0]) as display:
            for index in range(20):
                now[0] += 0.1
                phase = "warm-up" if index < 10 else "measuring"
                display.add(phase, sample(index, 0.0, 0.02, error="OVERLOADED" if index == 15 else ""))
        drawn = console.file.getvalue()
        assert ("measuring" in drawn and "p50 20.0 ms" in drawn and "1 refused" in drawn) is terminal
