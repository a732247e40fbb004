"""`FakeServer` refuses what a server refuses: the same status, reason, fields and words, for each faulty request.

The server serves a tiny bundle; the fake model has as many layers, heads and tokens. Only the names differ that their
models give to sites, inputs and outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from attnserve.v1 import attention_pb2, inference_service_pb2_grpc, labels_pb2
from attnserve.v1 import inference_service_pb2 as wire
from attnserve_client.testing import FakeServer, _checks
from attnserve_server.attention.resolve import MAX_NAMES_SHOWN
from attnserve_server.transport.validation import MAX_REQUEST_ID
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from serving import serve
from tiny_bundle import HEADS, LAYERS, MAX_LENGTH

Stub = inference_service_pb2_grpc.InferenceServiceStub
NAMES = {
    "layer0, layer1": "layer.0, layer.1",
    "'layer0'": "'layer.0'",
    "hidden, embedding": "embedding, last_hidden_state",
    "input_ids, attention_mask": "input_ids",
}
"""What the two models call their sites, outputs and inputs."""


def of_texts(*texts: str, change: Callable[[Any], None] | None = None, **fields: Any) -> wire.InferRequest:
    made = wire.InferRequest(**{"model": "tiny", **fields})
    for text in texts or ("the cat",):
        made.sequences.add().text.text = text
    if change is not None:
        change(made)
    return made


def selected(**fields: Any) -> wire.InferRequest:
    return of_texts(attention=attention_pb2.AttentionSelection(**fields))


def with_past(request: wire.InferRequest) -> None:
    request.sequences[0].past_tokens.append("x")


def with_tensor(request: wire.InferRequest) -> None:
    request.sequences[0].text.tensors.add(name="nope", dtype=3, shape=[1], data=bytes(8))


def with_both(request: wire.InferRequest) -> None:
    with_past(request)
    with_tensor(request)


EACH, ROLLOUT = attention_pb2.HEAD_REDUCTION_EACH, attention_pb2.LAYER_REDUCTION_ROLLOUT
SCORES, WORD = attention_pb2.ATTENTION_VALUE_SCORES, attention_pb2.ATTENTION_UNIT_WORD
FAULTY = {
    "no sequences": wire.InferRequest(model="tiny"),
    "no model": of_texts(model=""),
    "another model": of_texts(model="other"),
    "another version": of_texts(version="9"),
    "no text": of_texts(""),
    "no input": wire.InferRequest(model="tiny", sequences=[wire.Sequence()]),
    "too long": of_texts(" ".join(["the"] * 60)),
    "the second is too long": of_texts("the cat", " ".join(["the"] * 60)),
    "an unknown output": of_texts(outputs=wire.OutputSelection(names=["embedding", "nope"])),
    "labels": of_texts(labels=labels_pb2.LabelSelection()),
    "a prompt": of_texts(prompt_name="p"),
    "labels of a past": of_texts(change=with_past),
    "an unknown tensor": of_texts(change=with_tensor),
    "labels of a past and an unknown tensor": of_texts(change=with_both),
    "a long id": of_texts(request_id="a" * 300),
    "an id of two lines": of_texts(request_id="a\nb"),
    "a priority": of_texts(priority=9),  # type: ignore[arg-type]
    "several": of_texts(
        "", priority=9, prompt_name="p", attention=attention_pb2.AttentionSelection(layers=[9], min_weight=2)
    ),
    "a layer": selected(layers=[0, 7]),
    "a layer from the end": selected(layers=[-9]),
    "a head": selected(heads=[5]),
    "a head again": selected(heads=[1, -1]),
    "a long site beyond ASCII": selected(sites=["é" + "s" * 70]),
    "an output beyond ASCII": of_texts(outputs=wire.OutputSelection(names=["é"])),
    "a prompt beyond ASCII": of_texts(prompt_name="é" + "p" * 70),
    "sites": selected(sites=["nope", "none"]),
    "a query": selected(queries=[0, 40]),
    "a query again": selected(queries=[1, 1]),
    "a row again": selected(queries=[1, -3]),
    "a word": selected(queries=[9], unit=WORD),
    "a weight of 2": selected(min_weight=2),
    "a weight below 0": selected(min_weight=-1),
    "no number": selected(min_weight=float("nan")),
    "a reduction of heads": selected(head_reduction=9),
    "a reduction of layers": selected(layer_reduction=9),
    "a unit": selected(unit=9),
    "special tokens": selected(special_tokens=9),
    "values": selected(values=9),
    "a data type": selected(dtype=99),
    "int64 weights": selected(dtype=3),
    "two enums": selected(unit=9, dtype=99),
    "no feature": selected(features=[0]),
    "a feature": selected(features=[1, 99]),
    "a feature again": selected(features=[1, 1]),
    "links of features": selected(features=[1], top_k=2, min_weight=0.5),
    "uint8 features": selected(features=[1], dtype=6),
    "features of a mean": selected(features=[1], head_reduction=attention_pb2.HEAD_REDUCTION_MEAN),
    "rollout of each head": selected(head_reduction=EACH, layer_reduction=ROLLOUT),
    "rollout of scores": selected(values=SCORES, layer_reduction=ROLLOUT),
    "links of scores": selected(values=SCORES, top_k=3),
    "scores of words": selected(values=SCORES, unit=WORD),
    "features of scores": selected(values=SCORES, features=[1]),
}


@pytest.fixture(scope="module")
def stubs(tiny_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any]]:
    with (
        serve(tiny_repository, tmp_path_factory.mktemp("server")) as server,
        FakeServer(model="tiny", layers=LAYERS, heads=HEADS, max_length=MAX_LENGTH) as fake,
        grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as real_channel,
        grpc.insecure_channel(fake.target) as fake_channel,
    ):
        yield Stub(real_channel), Stub(fake_channel)


def outcome(stub: Any, request: wire.InferRequest) -> dict[str, Any]:
    """Return how a request was refused: status, message, and every detail but the id that the server gave it."""
    with pytest.raises(grpc.RpcError) as caught:
        stub.Infer(request, timeout=30)
    status = rpc_status.from_call(caught.value)
    assert status is not None
    found: dict[str, Any] = {"code": caught.value.code(), "message": status.message}
    for detail in status.details:
        for kind in (error_details_pb2.ErrorInfo, error_details_pb2.BadRequest, error_details_pb2.RetryInfo):
            if detail.Is(kind.DESCRIPTOR):
                detail.Unpack(message := kind())
                found[kind.__name__] = message
    info = found.pop("ErrorInfo")
    facts = dict(info.metadata)
    assert facts.pop("request_id"), "every refusal has an id"
    found["reason"], found["domain"], found["facts"] = info.reason, info.domain, facts
    violations = found.pop("BadRequest", error_details_pb2.BadRequest()).field_violations
    found["violations"] = [(one.field, one.description) for one in violations]
    return found


def renamed(found: Any) -> Any:
    """Return an outcome with the names of the fake model."""
    text = repr(found)
    for ours, theirs in NAMES.items():
        text = text.replace(ours, theirs)
    return text


@pytest.mark.parametrize("name", FAULTY)
def test_fake_server_refuses_as_a_server_does(stubs: tuple[Any, Any], name: str) -> None:
    real, fake = (outcome(stub, FAULTY[name]) for stub in stubs)
    assert repr(fake) == renamed(real)


def test_fake_server_answers_what_a_server_answers(stubs: tuple[Any, Any]) -> None:
    for stub in stubs:
        assert stub.Infer(selected(layers=[-1], heads=[0], queries=[-1], top_k=2), timeout=30).results


def test_limits_without_a_request_are_those_of_the_server() -> None:
    assert (_checks.MAX_NAMES, _checks.MAX_REQUEST_ID) == (MAX_NAMES_SHOWN, MAX_REQUEST_ID)
