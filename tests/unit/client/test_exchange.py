"""The state of one stream: chunks, inconsistent messages, stalls, and timeouts.

`Exchange` matches the messages of one StreamInfer call with its requests. It raises BadAnswer for messages that are
inconsistent. Messages are made by hand; no server runs.
"""

from __future__ import annotations

import pytest
from attnserve.v1 import inference_service_pb2 as wire
from attnserve_client._exchange import Exchange
from attnserve_client.errors import BadAnswer


def test_timeout_is_sent_with_each_request_as_at_least_1_ms() -> None:
    request = wire.InferRequest(model="m")
    assert Exchange(2.5, validate_only=False).open(request).timeout_ms == 2500
    assert Exchange(0.0001, validate_only=False).open(request).timeout_ms == 1
    assert Exchange(None, validate_only=False).open(request).timeout_ms == 0
    assert Exchange(1e9, validate_only=False).open(request).timeout_ms == 2**32 - 1


def response(name: str) -> wire.InferResponse:
    return wire.InferResponse(results=[wire.SequenceResult()], receipt=wire.Receipt(request_id=name))


def opened(count: int) -> tuple[Exchange, list[str]]:
    exchange = Exchange(None, validate_only=False)
    return exchange, [
        exchange.open(wire.InferRequest(sequences=[wire.Sequence()])).request.request_id for _ in range(count)
    ]


def pieces(name: str, count: int) -> list[wire.StreamInferResponse]:
    data = response(name).SerializeToString()
    cuts = [len(data) * part // count for part in range(count + 1)]
    return [
        wire.StreamInferResponse(
            request_id=name, chunk=wire.ResponseChunk(index=part, count=count, data=data[cuts[part] : cuts[part + 1]])
        )
        for part in range(count)
    ]


def test_chunks_of_different_responses_may_interleave() -> None:
    exchange, (one, other) = opened(2)
    first, second = pieces(one, 3), pieces(other, 2)
    order = [first[0], second[0], first[1], second[1], first[2]]
    received = [answer.index for message in order for answer in exchange.take(message)]
    assert received == [1, 0]
    exchange.check_done()


@pytest.mark.parametrize("broken", ["order", "unknown id", "twice", "empty", "garbage", "count"])
def test_inconsistent_messages_are_bad_answers(broken: str) -> None:
    exchange, (one,) = opened(1)
    first, second = pieces(one, 2)
    messages = {
        "order": [second],
        "unknown id": [wire.StreamInferResponse(request_id="other", response=response("other"))],
        "twice": [wire.StreamInferResponse(request_id=one, response=response(one))] * 2,
        "empty": [wire.StreamInferResponse(request_id=one)],
        "garbage": [
            first,
            wire.StreamInferResponse(request_id=one, chunk=wire.ResponseChunk(index=1, count=2, data=b"\xff\xff")),
        ],
        "count": [wire.StreamInferResponse(request_id=one, chunk=wire.ResponseChunk(index=0, count=0))],
    }[broken]
    *fine, last = messages
    for message in fine:
        exchange.take(message)
    with pytest.raises(BadAnswer):
        exchange.take(last)


def test_stream_that_ends_with_requests_in_flight_is_a_bad_answer() -> None:
    exchange, _ = opened(2)
    assert exchange.pending == 2
    with pytest.raises(BadAnswer, match="2 requests unanswered"):
        exchange.check_done()


def test_stall_counts_only_while_the_reader_waits_with_requests_in_flight() -> None:
    now = [100.0]
    exchange = Exchange(1.0, validate_only=False, clock=lambda: now[0])
    assert exchange.patience_s == 1.25
    exchange.reading()
    now[0] += 60.0
    assert exchange.stalled_in_s(1.25) == 1.25, "no request is in flight"
    request_id = exchange.open(wire.InferRequest(sequences=[wire.Sequence()])).request.request_id
    exchange.open(wire.InferRequest(sequences=[wire.Sequence()]))
    now[0] += 1.0
    assert exchange.stalled_in_s(1.25) == pytest.approx(0.25)
    exchange.take(wire.StreamInferResponse(request_id=request_id, response=response(request_id)))
    now[0] += 60.0
    assert exchange.stalled_in_s(1.25) == 1.25, "the reader is not waiting"
    exchange.reading()
    now[0] += 2.0
    assert exchange.stalled_in_s(1.25) < 0
