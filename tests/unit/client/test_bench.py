"""The load test: its workload, its requests against a server, and its command.

`server` and `shared_server` are fake servers, and `raw_server` is one with methods of the test; all are fixtures of
conftest.py. Malformed lengths raise ValueError, and lengths above the model's maximum InvalidRequest. Refused requests
are counted by reason; if all are refused, the error is raised. A load test that is not valid exits with 12.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attnserve_client import Client, InvalidRequest, ModelNotFound
from attnserve_client.bench.lengths import DEFAULT, Lengths
from attnserve_client.bench.load import Outcome, Sample
from attnserve_client.bench.run import Plan, run
from attnserve_client.bench.workload import RequestOptions, of_lengths, of_texts
from attnserve_client.cli._app import app
from attnserve_client.cli._bench_show import Display
from attnserve_client.testing import FakeServer
from rich.console import Console
from typer.testing import CliRunner


@pytest.fixture
def info(shared_server: FakeServer) -> Any:
    with Client(shared_server.target) as client:
        return client.model("fake")


@pytest.mark.parametrize("text", ["128", "uniform:4,256", "lognormal:32,0.8,4,256"])
def test_lengths_print_as_they_are_written(text: str) -> None:
    assert str(Lengths.parse(text)) == text


@pytest.mark.parametrize(
    "text", ["", "abc", "0", "uniform:3", "uniform:9,3", "lognormal:32,0.8", "lognormal:0,1,4,8", "normal:1,2", "1,2"]
)
def test_malformed_lengths_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"length|median"):
        Lengths.parse(text)


def test_drawn_lengths_have_their_bounds_and_median() -> None:
    random = np.random.default_rng(0)
    assert set(Lengths.parse("7").draw(5, random)) == {7}
    assert set(Lengths.parse("uniform:2,4").draw(500, random)) == {2, 3, 4}
    drawn = DEFAULT.draw(20_000, random)
    assert drawn.min() >= 4
    assert drawn.max() <= 256
    # The median of 20,000 draws is off by about 1% of it.
    assert abs(np.median(drawn) - 32) <= 1


# -- workload


def test_share_of_requests_with_attention_is_spread_evenly() -> None:
    options = RequestOptions(share=0.25)
    assert [options.with_attention(index) for index in range(8)] == [False, False, False, True] * 2
    assert not any(RequestOptions(share=0).with_attention(index) for index in range(100))
    assert all(RequestOptions(share=1).with_attention(index) for index in range(100))
    assert sum(RequestOptions(share=0.1).with_attention(index) for index in range(1000)) == 100


def test_equal_seeds_give_equal_requests(info: Any) -> None:
    first, again, other = (
        of_lengths(info, DEFAULT, RequestOptions(sequences=2), seed=seed, kinds=5) for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other
    assert [len(request.sequences) for request in first.requests] == [2] * 5
    lengths = [sum(each.tensors.tensors[0].shape[0] for each in request.sequences) for request in first.requests]
    assert list(first.tokens or ()) == lengths
    assert first.tokens_of(7) == lengths[2]


def test_lengths_above_the_models_maximum_are_refused_before_sending(info: Any) -> None:
    with pytest.raises(InvalidRequest, match="100000 exceeds the 256 positions"):
        of_lengths(info, Lengths.parse("100000"), RequestOptions(), seed=0)


def test_texts_are_sent_in_turn(info: Any) -> None:
    workload = of_texts(info, ["one", "two", "three"], RequestOptions(sequences=2))
    sent = [[each.text.text for each in request.sequences] for request in workload.requests]
    assert sent == [["one", "two"], ["three", "one"]]
    assert workload.request(3) is workload.requests[1]
    assert workload.tokens_of(0) == 0


# -- against a server


@pytest.mark.parametrize("stream", [False, True])
def test_every_request_is_answered_once(server: FakeServer, info: Any, stream: bool) -> None:
    workload = of_lengths(info, Lengths.parse("uniform:3,9"), RequestOptions(share=0.5), seed=0, kinds=8)
    plan = Plan(callers=4, requests=40, warm_up_s=0.0, connections=2, stream=stream)
    phases = list[str]()
    report = run(server.target, workload, plan, lambda phase, one: phases.append(phase))
    assert (report.requests, report.answered, report.errors) == (40, 40, {})
    assert phases == ["measuring"] * 40
    # The load test sends one request of each kind before, to fail early.
    assert len(server.requests) == 42
    assert sum(request.HasField("attention") for request in server.requests) == 21


@pytest.mark.parametrize("stream", [False, True])
def test_refusals_are_counted_by_reason(server: FakeServer, info: Any, stream: bool) -> None:
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


def test_broken_stream_is_opened_again(raw_server: Any, info: Any) -> None:
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


def test_model_that_refuses_all_requests_ends_the_load_test(server: FakeServer, info: Any) -> None:
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


def test_command_prints_rates_latencies_and_batches(attnserve: Any) -> None:
    result = attnserve("fake", *QUICK)
    assert result.exit_code in (0, 12), result.output  # a busy machine may make the client the bottleneck
    for word in ("requests/s", "tokens/s", "p95", "queue in the server", "client, loop busy"):
        assert word in result.stdout


def test_command_prints_json(attnserve: Any, tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("one two\n\nthree\n", encoding="utf-8")
    result = attnserve("fake", *QUICK, "--texts", str(texts), "--json", "--attention-share", "0.5")
    printed = json.loads(result.stdout)
    assert printed["model"] == "fake"
    assert printed["texts"] == 2
    assert printed["plan"]["callers"] == 3
    assert printed["report"]["answered"] == 30
    assert printed["report"]["tokens_per_s"] is None


def test_invalid_load_test_exits_with_12(attnserve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnserve_client.bench.report.BUSY_LIMIT", -1.0)
    result = attnserve("fake", *QUICK)
    assert result.exit_code == 12
    assert "INVALID: the client's event loop was busy" in " ".join(result.stdout.split())


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        (("fake", "--lengths", "abc"), 2, "are not of the form"),
        (("fake", "--texts", "/nowhere/texts"), 2, "cannot read"),
        (("fake", "--rate", "5", "--requests", "5"), 2, "an open loop (--rate) has no"),
        (("fake", "--connections", "513"), 2, "less than or equal to 512"),
        (("nope",), 4, "nope"),
        (("fake", "--sequences", "1000000"), 3, "exceeds the model's"),
        (("fake", "--lengths", "100000"), 3, "exceeds the"),
    ],
)
def test_wrong_command_line_exits_with_the_reason(attnserve: Any, line: tuple[str, ...], code: int, words: str) -> None:
    result = attnserve(*line)
    assert result.exit_code == code, result.output
    assert words in " ".join(result.output.replace("│", " ").split())


def test_empty_and_binary_files_of_texts_are_refused(attnserve: Any, tmp_path: Path) -> None:
    for name, content, words in (("empty", b"\n \n", "has no text"), ("binary", b"\xff\xfe\xfa", "not UTF-8 text")):
        (tmp_path / name).write_bytes(content)
        result = attnserve("fake", "--texts", str(tmp_path / name))
        assert result.exit_code == 2
        assert words in " ".join(result.output.replace("│", " ").split())


def test_live_display_draws_on_a_terminal_only() -> None:
    for terminal in (True, False):
        now = [0.0]
        console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
        with Display(Plan(requests=100), console, clock=lambda now=now: now[0]) as display:
            for index in range(20):
                now[0] += 0.1
                phase = "warm-up" if index < 10 else "measuring"
                outcome = Outcome(error="OVERLOADED" if index == 15 else "")
                display.add(phase, Sample(index, due_s=0.0, sent_s=0.0, done_s=0.02, outcome=outcome))
        drawn = console.file.getvalue()
        assert ("measuring" in drawn and "p50 20.0 ms" in drawn and "1 refused" in drawn) is terminal
