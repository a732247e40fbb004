"""One request, one answer, through a real server over loopback.

Needs the fixtures of tests/contract/conftest.py: `server` and `channel` of the tiny model, and `gate`, which holds each
request until the test releases it.
"""

from __future__ import annotations

import asyncio
import gc
import logging

import grpc
import numpy as np
import pytest
import structlog
from attnserve.v1 import attention_pb2, model_pb2, tensor_pb2
from attnserve.v1 import inference_service_pb2 as pb
from attnserve.v1.inference_service_pb2_grpc import InferenceServiceStub
from attnserve_server.app import Application
from attnserve_server.domain.errors import InternalFault, ModelNotFound, Overloaded
from attnserve_server.transport import servicer
from attnserve_server.transport.servicer import log_failure
from attnserve_server.transport.wire import Received
from gated import Gate, until
from google.rpc import error_details_pb2, status_pb2
from tiny_bundle import HEADS, VOCABULARY, WIDTH

TEXTS = ("the cat sat on a mat", "a dog", "the dog looked at the cat and the mat")
METHODS = ("Infer", "ListModels", "GetModel")


@pytest.fixture
def stub(channel: grpc.aio.Channel) -> InferenceServiceStub:
    return InferenceServiceStub(channel)


def asking(*texts: str, **fields: object) -> pb.InferRequest:
    sequences = [pb.Sequence(text=pb.TextInput(text=text)) for text in texts]
    return pb.InferRequest(model="tiny", sequences=sequences, **fields)


def array(tensor: tensor_pb2.Tensor) -> np.ndarray:
    assert tensor.dtype == tensor_pb2.DATA_TYPE_FLOAT32
    return np.frombuffer(tensor.data, "<f4").reshape(tensor.shape)


def status_of(error: grpc.aio.AioRpcError) -> status_pb2.Status:
    (data,) = [value for key, value in error.trailing_metadata() if key == "grpc-status-details-bin"]
    return status_pb2.Status.FromString(data)


async def test_texts_are_answered_in_order(stub: InferenceServiceStub) -> None:
    answer = await stub.Infer(asking(*TEXTS, attention=attention_pb2.AttentionSelection()))
    assert len(answer.results) == len(TEXTS)
    for text, result in zip(TEXTS, answer.results, strict=True):
        hidden, embedding = map(array, result.outputs)
        assert hidden.shape == (len(text.split()) + 2, WIDTH)
        # The mean in float32 over at most eleven rows.
        np.testing.assert_allclose(hidden.mean(axis=0), embedding, atol=1e-5)
        assert [list(found.sites) for found in result.attention.maps] == [["layer0"], ["layer1"]]
        for found in result.attention.maps:
            weights = array(found.weights)
            assert weights.shape == (HEADS, len(hidden), len(hidden))
            np.testing.assert_allclose(weights.sum(axis=-1), 1, atol=1e-5)
        assert list(result.attention.axes[0].texts)[1:-1] == text.split()


async def test_tensors_and_their_text_have_the_same_answer(stub: InferenceServiceStub) -> None:
    ids = np.array([2, *(VOCABULARY.index(word) for word in TEXTS[0].split()), 3])
    tensor = tensor_pb2.Tensor(name="input_ids", dtype=tensor_pb2.DATA_TYPE_INT64, shape=ids.shape, data=ids.tobytes())
    by_ids = pb.InferRequest(model="tiny", sequences=[pb.Sequence(tensors=pb.TensorInput(tensors=[tensor]))])
    one, other = await asyncio.gather(stub.Infer(asking(TEXTS[0])), stub.Infer(by_ids))
    for left, right in zip(one.results[0].outputs, other.results[0].outputs, strict=True):
        np.testing.assert_allclose(array(left), array(right), atol=1e-6)


async def test_the_answer_holds_only_what_is_selected(stub: InferenceServiceStub) -> None:
    answer = await stub.Infer(asking(TEXTS[0], outputs=pb.OutputSelection(names=["embedding"])))
    assert [output.name for output in answer.results[0].outputs] == ["embedding"]
    assert not answer.results[0].HasField("attention")
    assert not answer.HasField("effective_attention")
    only_attention = asking(
        TEXTS[0], outputs=pb.OutputSelection(), attention=attention_pb2.AttentionSelection(layers=[-1], top_k=2)
    )
    answer = await stub.Infer(only_attention)
    assert not answer.results[0].outputs
    assert answer.results[0].attention.maps[0].WhichOneof("content") == "links"


async def test_validate_only_predicts_the_bytes_of_the_answer(stub: InferenceServiceStub, server: Application) -> None:
    selection = attention_pb2.AttentionSelection(layers=[0], dtype=tensor_pb2.DATA_TYPE_FLOAT16)
    dry = await stub.Infer(asking(*TEXTS, attention=selection, validate_only=True))
    assert not dry.results
    assert list(dry.effective_attention.sites) == ["layer0"]
    wet = await stub.Infer(asking(*TEXTS, attention=selection))
    tensors = [tensor for result in wet.results for tensor in result.outputs]
    tensors += [found.weights for result in wet.results for found in result.attention.maps]
    assert dry.predicted_bytes == wet.predicted_bytes == sum(len(tensor.data) for tensor in tensors)


async def test_features_are_those_of_the_weights_and_have_the_predicted_size(stub: InferenceServiceStub) -> None:
    """In one batch with requests that select maps or nothing."""
    features = attention_pb2.AttentionSelection(
        features=[attention_pb2.ATTENTION_FEATURE_ENTROPY, attention_pb2.ATTENTION_FEATURE_FIRST_TOKEN]
    )
    bare = pb.OutputSelection()
    dry = await stub.Infer(asking(*TEXTS, attention=features, outputs=bare, validate_only=True))
    made, maps, _ = await asyncio.gather(
        stub.Infer(asking(*TEXTS, attention=features, outputs=bare)),
        stub.Infer(asking(*TEXTS, attention=attention_pb2.AttentionSelection())),
        stub.Infer(asking(*TEXTS)),
    )
    assert made.effective_attention.features == features.features
    for found, weighed in zip(made.results, maps.results, strict=True):
        for one, other in zip(found.attention.maps, weighed.attention.maps, strict=True):
            weights = array(other.weights).astype(float)
            entropy, first = np.moveaxis(array(one.features), 2, 0)
            # Both round the same float32 weights; entropies are sums of at most ten terms in float64.
            np.testing.assert_allclose(entropy, -(weights * np.log(weights)).sum(axis=2), rtol=0, atol=1e-6)
            np.testing.assert_array_equal(first, array(other.weights)[:, :, 0])
    sizes = [len(found.features.data) for result in made.results for found in result.attention.maps]
    assert dry.predicted_bytes == made.predicted_bytes == sum(sizes)


async def test_features_of_joined_heads_are_refused_with_the_field(stub: InferenceServiceStub) -> None:
    selection = attention_pb2.AttentionSelection(features=[1], head_reduction=attention_pb2.HEAD_REDUCTION_MEAN)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stub.Infer(asking(TEXTS[0], attention=selection))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "attention.head_reduction: mean is for maps, and features are of each head" in refused.value.details()


async def test_a_bundle_of_an_earlier_release_refuses_scores_with_the_remedy(stub: InferenceServiceStub) -> None:
    described = (await stub.GetModel(pb.GetModelRequest(model="tiny"))).model
    reason = "its bundle was converted before scores were served; convert the model again"
    assert {site.scores_unavailable_reason for site in described.sites} == {reason}
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stub.Infer(asking(TEXTS[0], attention=attention_pb2.AttentionSelection(values=2)))
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert f"scores of site 'layer0': {reason}" in refused.value.details()


async def test_the_receipt_names_model_version_and_provider(stub: InferenceServiceStub) -> None:
    described = (await stub.GetModel(pb.GetModelRequest(model="tiny"))).model
    mine, unnamed = await asyncio.gather(
        stub.Infer(asking("a", request_id="mine")), stub.Infer(asking("a", version="1"))
    )
    assert mine.receipt.request_id == "mine"
    assert len(unnamed.receipt.request_id) == 32
    assert (mine.receipt.version, unnamed.receipt.version) == ("2", "1")
    assert mine.receipt.digest == described.digest
    assert mine.receipt.execution_provider == described.execution_provider == "CPUExecutionProvider"
    assert mine.results[0].run.computed_tokens >= mine.results[0].run.useful_tokens


async def test_the_receipt_has_the_timings_of_the_request(stub: InferenceServiceStub) -> None:
    attention = attention_pb2.AttentionSelection()
    plain, weighed, dry = await asyncio.gather(
        stub.Infer(asking("a")), stub.Infer(asking(*TEXTS, attention=attention)),
        stub.Infer(asking("a", validate_only=True)),
    )  # fmt: skip
    assert not dry.receipt.HasField("timings")
    for answer in (plain, weighed):
        timings, runs = answer.receipt.timings, [result.run for result in answer.results]
        assert timings.queue_seconds == max(run.queue_seconds for run in runs) > 0
        assert timings.compute_seconds == max(run.compute_seconds for run in runs) > 0
        assert timings.encode_seconds > 0
    assert plain.receipt.timings.attention_seconds == 0 < weighed.receipt.timings.attention_seconds


async def test_models_are_listed_by_name_and_version(stub: InferenceServiceStub) -> None:
    models = (await stub.ListModels(pb.ListModelsRequest())).models
    assert [(model.name, model.version) for model in models] == [("plain", "1"), ("tiny", "1"), ("tiny", "2")]
    assert [model.accepts_text for model in models] == [False, True, True]
    assert {model.state for model in models} == {model_pb2.MODEL_STATE_READY}
    assert models[0].max_response_bytes == 48 * 2**20


@pytest.mark.parametrize(
    ("request_of", "code", "reason"),
    [
        (asking(""), grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST"),
        (pb.InferRequest(), grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST"),
        (pb.InferRequest(model="../tiny"), grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST"),
        (asking("a", request_id="a\nb"), grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST"),
        (pb.InferRequest(model="nope"), grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND"),
        (pb.InferRequest(model="tiny", version="9"), grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND"),
        (
            pb.InferRequest(model="plain", sequences=asking("a").sequences),
            grpc.StatusCode.FAILED_PRECONDITION,
            "TEXT_UNAVAILABLE",
        ),
    ],
    ids=["empty text", "no model", "a path", "a line end", "unknown model", "unknown version", "no tokenizer"],
)
async def test_a_failure_carries_its_code_and_details(
    stub: InferenceServiceStub, request_of: pb.InferRequest, code: grpc.StatusCode, reason: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Infer(request_of)
    assert caught.value.code() is code
    status = status_of(caught.value)
    assert status.message == caught.value.details()
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert (info.reason, info.domain) == (reason, "attnserve")


async def test_a_failure_echoes_the_request_id(stub: InferenceServiceStub) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Infer(asking("", request_id="mine"))
    info = error_details_pb2.ErrorInfo()
    assert status_of(caught.value).details[0].Unpack(info)
    assert info.metadata["request_id"] == "mine"


async def test_an_internal_error_reports_only_the_request_id(stub: InferenceServiceStub, gate: Gate) -> None:
    for fault in (InternalFault(), ValueError("/home/secret")):
        call = stub.Infer(asking("a", request_id="mine"))
        await until(lambda: bool(gate.waiting))
        gate.release(error=fault)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() is grpc.StatusCode.INTERNAL
        assert caught.value.details() == "internal error; request id mine"


async def test_overload_is_reported_before_a_request_is_prepared(stub: InferenceServiceStub, gate: Gate) -> None:
    gate.full = Overloaded("queue_full", 2, 3, 0.5)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Infer(asking(""))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED, "the empty text would be found only by validation"
    assert gate.deadlines == []
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Infer(asking("", validate_only=True))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, "validation only needs no room in the queue"


@pytest.mark.parametrize(("level", "logged"), [(logging.INFO, 10), (logging.DEBUG, 50), (logging.WARNING, 0)])
async def test_refusals_of_one_reason_are_logged_as_a_sample(
    level: int, logged: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(level)
    loop = asyncio.get_running_loop()
    ended = loop.create_future()
    with structlog.testing.capture_logs() as lines:
        for number in range(50):
            log_failure(Overloaded("queue_full", 2, 3, 0.5), str(number), "Infer")
        log_failure(ModelNotFound("other", ""), "mine", "Infer")
        loop.call_later(1.1, ended.set_result, None)  # after the second of the sample
        await ended
    overloads = [line for line in lines if line.get("reason") == "OVERLOADED" and line["event"] == "request refused"]
    others = [line for line in lines if line.get("reason") == "MODEL_NOT_FOUND"]
    suppressed = [line["suppressed"] for line in lines if line["event"] == "refusals were not logged"]
    assert (len(overloads), len(others)) == (logged, int(logged > 0))
    assert suppressed == ([40] if logged == 10 else [])


async def test_a_request_is_submitted_with_the_bytes_of_its_message(stub: InferenceServiceStub, gate: Gate) -> None:
    gate.open()
    request = asking("the cat")
    await stub.Infer(request)
    assert gate.received_bytes == [request.ByteSize()]


@pytest.mark.parametrize("method", METHODS)
async def test_no_bytes_are_answered_with_unknown(channel: grpc.aio.Channel, method: str) -> None:
    random = np.random.default_rng(3)
    call = channel.unary_unary(f"/attnserve.v1.InferenceService/{method}")
    good = asking("the cat", request_id="x", attention=attention_pb2.AttentionSelection(layers=[0]))
    corpus = [random.bytes(int(size)) for size in random.integers(0, 60, 40)]
    for _ in range(60):
        mutated = bytearray(good.SerializeToString())
        mutated[random.integers(len(mutated))] = random.integers(256)
        corpus.append(bytes(mutated))
    answers = await asyncio.gather(*(call(data) for data in corpus), return_exceptions=True)
    codes = {answer.code() for answer in answers if isinstance(answer, grpc.aio.AioRpcError)}
    assert codes <= {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.FAILED_PRECONDITION,
    }
    assert all(isinstance(answer, bytes | grpc.aio.AioRpcError) for answer in answers)


async def test_broken_utf8_names_the_field(channel: grpc.aio.Channel) -> None:
    data = asking("MARK").SerializeToString().replace(b"MARK", b"MA\xffK")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await channel.unary_unary("/attnserve.v1.InferenceService/Infer")(data)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.details() == "sequences[0].text.text: not UTF-8: byte 2 is 0xff"


async def test_a_message_over_the_limit_is_resource_exhausted(stub: InferenceServiceStub) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Infer(asking("x" * (65 * 2**20)))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_megabyte_of_text_is_refused_before_it_is_tokenized(stub: InferenceServiceStub) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Infer(asking("x" * 2**20))
    assert caught.value.details() == "sequences[0].text.text: 1048576 bytes exceed 65536"


@pytest.mark.parametrize(
    "request_",
    [asking("x" * 2_000_000), asking("the cat " * 9_000), asking("", request_id="é")],
    ids=["long text", "many tokens", "no id"],
)
async def test_refused_message_is_freed_at_once(stub: InferenceServiceStub, request_: pb.InferRequest) -> None:
    assert await kept_messages(stub, request_) == 0


async def test_control_refused_messages_are_kept_until_the_garbage_collector_runs(
    stub: InferenceServiceStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servicer, "free_frames", lambda error: None)
    assert await kept_messages(stub, asking("x" * 2_000_000)) == 5


async def kept_messages(stub: InferenceServiceStub, request: pb.InferRequest) -> int:
    """The messages of five refused calls that are in memory afterwards, without the garbage collector."""
    gc.collect()
    before = _messages()
    gc.disable()
    try:
        for _ in range(5):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Infer(request)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        return _messages() - before
    finally:
        gc.enable()


def _messages() -> int:
    return sum(type(one) is Received for one in gc.get_objects())


async def test_a_large_request_is_prepared_in_a_thread_with_the_same_answer(stub: InferenceServiceStub) -> None:
    # Longer than what is tokenized on the event loop, by white space that gives no tokens.
    padded = TEXTS[0] + " " * 10_000
    small, large = await asyncio.gather(stub.Infer(asking(TEXTS[0])), stub.Infer(asking(padded)))
    for left, right in zip(small.results[0].outputs, large.results[0].outputs, strict=True):
        np.testing.assert_allclose(array(left), array(right), atol=1e-6)


async def test_a_deadline_reaches_the_scheduler_and_the_work_is_withdrawn(
    stub: InferenceServiceStub, gate: Gate, server: Application
) -> None:
    before = server.clock.now()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Infer(asking("a"), timeout=0.2)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await until(lambda: gate.withdrawn == 1)
    (deadline,) = gate.deadlines
    assert deadline is not None
    assert before < deadline < before + 0.25


async def test_a_call_without_a_deadline_has_that_of_the_server(
    stub: InferenceServiceStub, gate: Gate, server: Application
) -> None:
    gate.open()
    before = server.clock.now()
    await stub.Infer(asking("a"))
    (deadline,) = gate.deadlines
    assert deadline is not None
    assert 0 < deadline - before - server.settings.call_timeout_s < 1


async def test_a_cancelled_call_withdraws_its_request(stub: InferenceServiceStub, gate: Gate) -> None:
    call = stub.Infer(asking("a"))
    await until(lambda: bool(gate.waiting))
    call.cancel()
    await until(lambda: gate.withdrawn == 1)
