"""The timings of a request, from the results of its sequences, and their form on the wire."""

from __future__ import annotations

from attnserve.v1 import inference_service_pb2
from attnserve_server.domain.values import RunFacts, SequenceResult
from attnserve_server.transport.timings import Timings, timings_of


def result(queue_s: float, compute_s: float, attention_s: float) -> SequenceResult:
    return SequenceResult({}, None, RunFacts(1, 1, 1, compute_s, 0), queue_s, attention_s=attention_s)


def test_timings_of_one_sequence_are_its_own() -> None:
    assert timings_of([result(1.0, 2.0, 3.0)], 4.0) == Timings(1.0, 2.0, 3.0, 4.0)


def test_the_longest_wait_and_run_count_and_reductions_add_up() -> None:
    results = [result(1.0, 5.0, 0.5), result(3.0, 2.0, 0.25)]
    assert timings_of(results, 4.0) == Timings(3.0, 5.0, 0.75, 4.0)


def test_the_serialized_field_is_the_contracts() -> None:
    receipt = inference_service_pb2.Receipt.FromString(Timings(1.0, 2.0, 3.0, 4.0).field())
    expected = inference_service_pb2.Timings(
        queue_seconds=1.0, compute_seconds=2.0, attention_seconds=3.0, encode_seconds=4.0
    )
    assert receipt == inference_service_pb2.Receipt(timings=expected)
