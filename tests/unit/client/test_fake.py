"""The guarantees of `FakeServer`, which answers as a server does, without a model.

Answers depend on the text alone, rows of weights sum to 1, and invalid requests are refused with their field.
"""

from __future__ import annotations

import numpy as np
import pytest
from attnserve.v1 import inference_service_pb2 as wire
from attnserve_client import AttentionSelection, Client, InvalidRequest, NotServing, RetryPolicy
from attnserve_client.data_types import Timings
from attnserve_client.errors import ModelFailed, Unsupported
from attnserve_client.testing import FakeServer

# float32 sums of rows of a few weights.
SUM_TOLERANCE = 1e-5


def test_answers_depend_on_the_text_alone() -> None:
    with FakeServer() as one, FakeServer() as other, Client(one.target) as first, Client(other.target) as second:
        left, right = first.infer("fake", "a text", attention=True), second.infer("fake", "a text", attention=True)
        np.testing.assert_array_equal(left.outputs["embedding"], right.outputs["embedding"])
        np.testing.assert_array_equal(left.attention[0].weights, right.attention[0].weights)
        different = first.infer("fake", "another text")
    assert not np.array_equal(left.outputs["embedding"], different.outputs["embedding"])


def test_receipts_have_timings_of_requests_that_ran() -> None:
    with FakeServer() as server, Client(server.target) as client:
        ran, dry = client.infer("fake", "a"), client.infer("fake", "a", validate_only=True)
    assert ran.receipt.timings == Timings(compute_s=0.001)
    assert dry.receipt.timings == Timings()


@pytest.mark.parametrize("heads", ["each", "mean"])
@pytest.mark.parametrize("layers", ["each", "mean", "rollout"])
@pytest.mark.parametrize("unit", ["token", "word"])
@pytest.mark.parametrize("special", ["keep", "drop"])
def test_rows_sum_to_one_after_every_reduction(
    shared_server: FakeServer, heads: str, layers: str, unit: str, special: str
) -> None:
    selection = AttentionSelection(
        head_reduction=heads if layers != "rollout" else None,  # type: ignore[arg-type]
        layer_reduction=layers,  # type: ignore[arg-type]
        unit=unit,  # type: ignore[arg-type]
        special_tokens=special,  # type: ignore[arg-type]
    )
    with Client(shared_server.target) as client:
        result = client.infer("fake", "some wonderful texts", attention=selection)
    for found in result.attention:
        np.testing.assert_allclose(found.weights.sum(axis=-1), 1.0, rtol=0, atol=SUM_TOLERANCE)
    effective = result.effective_attention
    assert effective is not None
    assert (effective.layer_reduction, effective.unit, effective.special_tokens) == (layers, unit, special)


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (wire.InferRequest(model="fake"), "sequences"),
        (wire.InferRequest(model="fake", sequences=[wire.Sequence()]), "sequences[0]"),
        (
            wire.InferRequest(model="fake", sequences=[wire.Sequence(tensors=wire.TensorInput())]),
            "sequences[0].tensors.tensors",
        ),
        (
            wire.InferRequest(
                model="fake",
                outputs=wire.OutputSelection(names=["other"]),
                sequences=[wire.Sequence(text=wire.TextInput(text="a"))],
            ),
            "outputs.names[0]",
        ),
        (
            wire.InferRequest(model="fake", sequences=[wire.Sequence(text=wire.TextInput(text="a " * 300))]),
            "sequences[0].text.text",
        ),
    ],
    ids=["nothing", "no text", "no tensors", "output", "long"],
)
def test_invalid_requests_list_their_field(request_: wire.InferRequest, field: str) -> None:
    with FakeServer() as server, pytest.raises(InvalidRequest) as caught:
        server.answer(request_)
    assert caught.value.violations[0].field == field


@pytest.mark.parametrize(
    "selection",
    [
        AttentionSelection(sites=["other"]),
        AttentionSelection(queries=[99]),
        AttentionSelection(heads="each", layer_reduction="rollout"),
    ],
)
def test_invalid_selections_are_refused(shared_server: FakeServer, selection: AttentionSelection) -> None:
    with Client(shared_server.target) as client, pytest.raises(InvalidRequest):
        client.infer("fake", "text", attention=selection)


def test_sites_may_be_selected_by_name(shared_server: FakeServer) -> None:
    with Client(shared_server.target) as client:
        (found,) = client.infer("fake", "text", attention=AttentionSelection(sites=["layer.1"])).attention
    assert found.sites == ("layer.1",)


def test_requests_fail_unless_the_state_is_ready(server: FakeServer) -> None:
    with Client(server.target, retry=RetryPolicy(max_attempts=1)) as client:
        server.state = "draining"
        with pytest.raises(NotServing) as caught:
            client.infer("fake", "text")
        assert caught.value.state == "draining"
        server.state = "failed"
        with pytest.raises(ModelFailed) as failed:
            client.infer("fake", "text")
        assert (failed.value.version, failed.value.retry_delay_s) == ("1", None)
        server.state = "ready"
        client.infer("fake", "text")


def test_wait_for_requests_times_out(server: FakeServer) -> None:
    with pytest.raises(TimeoutError, match="0 of 1 requests"):
        server.wait_for_requests(1, timeout_s=0.01)


def test_tokenizer_is_the_file_that_was_set() -> None:
    with FakeServer() as server, Client(server.target) as client:
        with pytest.raises(Unsupported):
            client.tokenizer(server.model)
        server.tokenizer_file = b'{"version": "1.0"}'
        found = client.tokenizer(server.model)
    assert (found.content, found.model, found.max_tokens) == (server.tokenizer_file, server.model, 256)
