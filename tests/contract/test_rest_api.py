"""Inference, models, embeddings and rerank over HTTP, each compared with gRPC's answer to the same request."""

from __future__ import annotations

import asyncio
import base64
import json
import math
import socket
import struct
from collections.abc import AsyncIterator, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import grpc
import msgspec
import numpy as np
import pytest
from attnserve.v1 import attention_pb2
from attnserve.v1 import inference_service_pb2 as pb
from attnserve.v1.inference_service_pb2_grpc import InferenceServiceStub
from attnserve_server.transport.rest import native, openai, rerank
from http_calls import Answer, call
from ranking_bundle import write_ranking_repository
from serving import RunningServer, serve

TEXTS = ["the cat sat on a mat", "a dog looked", "the mat"]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ranking_repository(tmp_path_factory.mktemp("ranking"), tmp_path_factory.mktemp("files"))


FLAGS = ("--isolation", "none", "--instances", "1", "--max-stream-in-flight", "4")


@pytest.fixture(scope="module")
def server(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with serve(repository, tmp_path_factory.mktemp("server"), *FLAGS) as running:
        yield running


@pytest.fixture
async def stub(server: RunningServer) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        yield InferenceServiceStub(channel)


def texts(*given: str, model: str = "tiny", **fields: Any) -> pb.InferRequest:
    return pb.InferRequest(model=model, sequences=[pb.Sequence(text=pb.TextInput(text=one)) for one in given], **fields)


async def infer(server: RunningServer, body: object, model: str = "tiny", **headers: str) -> Answer:
    return await call(server.rest_port, "POST", f"/v1/models/{model}:infer", body, headers)


def array(tensor: dict[str, Any]) -> np.ndarray:
    return np.array(tensor["data"], tensor["dtype"]).reshape(tensor["shape"])


@pytest.mark.parametrize("encoding", ["values", "base64"])
async def test_inference_equals_grpc_bit_for_bit(server: RunningServer, stub: Any, encoding: str) -> None:
    for text in TEXTS:
        mean = attention_pb2.HEAD_REDUCTION_MEAN
        selection = attention_pb2.AttentionSelection(layers=[-1], head_reduction=mean)
        wanted = await stub.Infer(texts(text, attention=selection))
        selected = {"layers": [-1], "head_reduction": "mean"}
        body = {"sequences": [text], "attention": selected, "tensor_encoding": encoding}
        answer = await infer(server, body, **{"x-request-id": "me"})
        assert answer.status == 200
        assert answer.json["receipt"]["request_id"] == "me"
        msgspec.convert(answer.json, native.InferResponse)
        [result] = answer.json["results"]
        for found, own in zip(result["outputs"], wanted.results[0].outputs, strict=True):
            data = base64.b64decode(found["data"]) if encoding == "base64" else array(found).tobytes()
            assert (found["name"], found["shape"], data) == (own.name, list(own.shape), own.data)
        found = result["attention"]["maps"][0]
        own = wanted.results[0].attention.maps[0]
        data = found["weights"]["data"]
        assert (
            base64.b64decode(data) if encoding == "base64" else array(found["weights"]).tobytes()
        ) == own.weights.data
        assert (found["kind"], found["form"], found["sites"]) == ("self", "dense", list(own.sites))
        assert answer.json["effective_attention"]["head_reduction"] == "mean"


@pytest.mark.parametrize(
    "tensor",
    [
        {"data": [2, 4, 5, 3]},
        {"data": [2, 4, 5, 3], "shape": [4], "dtype": "int64"},
        {"data": base64.b64encode(struct.pack("<4q", 2, 4, 5, 3)).decode(), "shape": [4]},
    ],
)
async def test_tensors_are_lists_or_base64(server: RunningServer, stub: Any, tensor: dict[str, Any]) -> None:
    wanted = await stub.Infer(texts("the cat"))
    body = {"sequences": [{"tensors": [{"name": "input_ids", **tensor}]}], "outputs": ["embedding"]}
    [result] = (await infer(server, body)).json["results"]
    assert array(result["outputs"][0]).tobytes() == wanted.results[0].outputs[1].data


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"sequences": []}, "sequences"),
        ({"sequences": ["a"], "x": 1}, "x"),
        ({"sequences": [{"text": "a", "tensor": []}]}, "tensor"),
        ({"sequences": [{"text_pair": "a"}]}, "sequences[0].text_pair"),
        ({"sequences": [{"tensors": [{"name": "input_ids", "data": [[1], [2, 3]]}]}]}, "sequences[0].tensors[0].data"),
        ({"sequences": [{"tensors": [{"name": "input_ids", "data": [0.5]}]}]}, "sequences[0].tensors[0].data"),
        ({"sequences": [{"tensors": [{"name": "input_ids", "data": [2**64]}]}]}, "sequences[0].tensors[0].data"),
        ({"sequences": [{"tensors": [{"name": "input_ids", "data": {"a": 1}}]}]}, "sequences[0].tensors[0].data"),
        ({"sequences": [{"tensors": [{"name": "input_ids", "data": ["x" * 9, 1]}]}]}, ".tensors[0].data[0]"),
        ({"sequences": [{"tensors": [{"name": "x", "data": [1e39]}]}]}, ".tensors[0].data: a number is out"),
        ({"sequences": [{"tensors": [{"name": "x", "data": [[1], [[[2]]]]}]}]}, "sequences[0].tensors[0].data[1][0]"),
        ({"sequences": [{"tensors": [{"name": "x", "data": "*", "shape": [1]}]}]}, "sequences[0].tensors[0].data"),
        ({"sequences": [{"tensors": [{"name": "input_ids", "data": "AAAA"}]}]}, "sequences[0].tensors[0].shape"),
        ({"sequences": [{"tensors": [{"name": "x", "data": [1], "shape": [2]}]}]}, "sequences[0].tensors[0].shape"),
        ({"sequences": ["a"], "attention": {"layers": [9]}}, "attention.layers"),
        ({"sequences": ["a"], "attention": {"layer": [0]}}, "layer"),
        ({"sequences": ["a"], "attention": {"head_reduction": "sum"}}, "attention.head_reduction"),
        ({"sequences": ["a"], "outputs": ["x"]}, "outputs"),
        ({"sequences": ["a"], "prompt_name": "x"}, "prompt_name"),
        ({"sequences": ["a"], "timeout": -1}, "timeout"),
        ({"sequences": [""]}, "sequences"),
    ],
)  # fmt: skip
async def test_invalid_fields_are_named(server: RunningServer, body: object, field: str) -> None:
    answer = await infer(server, body)
    assert (answer.status, answer.json["reason"]) == (400, "INVALID_REQUEST")
    assert field in answer.json["detail"]


async def test_half_of_a_pair_is_no_text(server: RunningServer) -> None:
    answer = await infer(server, b'{"sequences": ["\\ud800"]}')
    assert answer.status == 400


@pytest.mark.parametrize("path", ["nothing", "tiny/versions/9", "tiny/versions/x", "%F0%9F%98%80"])
async def test_unknown_models_are_refused(server: RunningServer, path: str) -> None:
    answer = await infer(server, {"sequences": ["a"]}, path)
    assert answer.status == (404 if path in {"nothing", "tiny/versions/9"} else 400)


async def test_a_version_is_chosen_by_the_path(server: RunningServer) -> None:
    for version in ("1", "2"):
        answer = await infer(server, {"sequences": ["a"]}, f"tiny/versions/{version}")
        assert answer.json["receipt"]["version"] == version


async def test_labels_and_validation_alone_are_served(server: RunningServer) -> None:
    answer = await infer(server, {"sequences": [{"text": "the cat", "text_pair": "a mat"}]}, "ranker")
    [label] = answer.json["results"][0]["labels"]["labels"]
    assert label["text"] == "score"
    checked = await infer(server, {"sequences": ["the cat"], "validate_only": True, "attention": {}})
    assert "results" not in checked.json
    assert checked.json["predicted_bytes"] > 0


async def test_many_inputs_are_a_stream_of_events(server: RunningServer) -> None:
    many = [f"the cat {'sat ' * (n % 5)}" for n in range(20)] + [""]
    answer = await infer(server, {"sequences": many, "outputs": ["embedding"]}, accept="text/event-stream")
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [
        dict(line.split(": ", 1) for line in event.split("\n")) for event in answer.body.decode().split("\n\n")[:-1]
    ]
    assert events[-1] == {"event": "done", "data": '{"sequences":21}'}
    by_index = {json.loads(one["data"])["index"]: one for one in events[:-1]}
    assert sorted(by_index) == list(range(21))
    assert [at for at, one in by_index.items() if one["event"] == "error"] == [20]
    assert json.loads(by_index[20]["data"])["reason"] == "INVALID_REQUEST"
    one = (await infer(server, {"sequences": [many[3]], "outputs": ["embedding"]})).json["results"][0]
    streamed = json.loads(by_index[3]["data"])["results"][0]
    assert np.allclose(array(one["outputs"][0]), array(streamed["outputs"][0]), atol=1e-5)
    assert server.metric("attnserve_unread_bytes") == 0


async def test_models_are_listed_and_described(server: RunningServer) -> None:
    listed = (await call(server.rest_port, "GET", "/v1/models")).json
    msgspec.convert(listed, native.ModelList)
    assert [one["id"] for one in listed["data"]] == ["plain", "ranker", "tiny"]
    assert [one["version"] for one in listed["data"][2]["versions"]] == ["1", "2"]
    assert listed["data"][0]["created"] == 1767225600
    tiny = (await call(server.rest_port, "GET", "/v1/models/tiny")).json
    msgspec.convert(tiny, native.ModelDetails)
    assert (tiny["id"], tiny["version"], tiny["object"], tiny["state"]) == ("tiny", "2", "model", "ready")
    assert [one["name"] for one in tiny["sites"]] == ["layer0", "layer1"]
    assert (await call(server.rest_port, "GET", "/v1/models/tiny/versions/1")).json["version"] == "1"
    missing = await call(server.rest_port, "GET", "/v1/models/none")
    assert (missing.status, missing.json["error"]["code"]) == (404, "MODEL_NOT_FOUND")


async def embed(server: RunningServer, **body: object) -> Answer:
    return await call(server.rest_port, "POST", "/v1/embeddings", {"model": "tiny", **body})


async def test_embeddings_equal_grpc_bit_for_bit(server: RunningServer, stub: Any) -> None:
    for text in TEXTS:
        wanted = await stub.Infer(texts(text, outputs=pb.OutputSelection(names=["embedding"])))
        answer = await embed(server, input=text, encoding_format="base64")
        msgspec.convert(answer.json, openai.Embeddings)
        [found] = answer.json["data"]
        assert base64.b64decode(found["embedding"]) == wanted.results[0].outputs[0].data
        numbers = (await embed(server, input=[text])).json["data"][0]["embedding"]
        assert np.array(numbers, np.float32).tobytes() == wanted.results[0].outputs[0].data
        assert answer.json["usage"] == dict.fromkeys(("prompt_tokens", "total_tokens"), len(text.split()) + 2)


async def test_up_to_2048_inputs_are_split(server: RunningServer) -> None:
    many = [f"the {'cat ' * (n % 20)}" for n in range(2048)]
    answer = await embed(server, input=many)
    assert [one["index"] for one in answer.json["data"]] == list(range(2048))
    for at in (0, 7, 2047):
        alone = (await embed(server, input=many[at])).json["data"][0]["embedding"]
        assert np.allclose(alone, answer.json["data"][at]["embedding"], atol=1e-5)
    refused = await embed(server, input=[*many, "one more"])
    assert (refused.status, refused.json["error"]["param"]) == (400, "input")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"input": []}, "input"),
        ({"input": [""]}, "text"),
        ({"input": ["a", 3]}, "one kind"),
        ({"input": [3, "a"]}, "one kind"),
        ({"input": [[3], "a"]}, "one kind"),
        ({"input": [2, 4, 3]}, "check_embedding_ctx_length=False"),
        ({"input": [[2, 4, 3]]}, "--openai-token-ids"),
        ({"input": "a", "dimensions": 4}, "dimensions"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ({"input": "a", "model": "ranker2"}, "ranker2"),
        ({"input": "a", "unknown": 1}, "unknown"),
        ({"input": "cat " * 40}, "tokens"),
    ],
)
async def test_embeddings_refuse_by_name(server: RunningServer, body: dict[str, object], said: str) -> None:
    answer = await embed(server, **body)
    assert answer.status in {400, 404}
    assert said in answer.json["error"]["message"]
    assert answer.json["error"]["type"] in {"invalid_request_error", "not_found_error"}


async def test_the_size_of_the_model_is_a_valid_dimension(server: RunningServer) -> None:
    assert (await embed(server, input="cat", dimensions=8)).status == 200


async def test_token_ids_are_served_where_the_operator_allows_them(repository: Path, tmp_path: Path) -> None:
    with serve(repository, tmp_path, *FLAGS, "--openai-token-ids") as application:
        wanted = (await embed(application, input="the cat", encoding_format="base64")).json["data"][0]["embedding"]
        for ids in ([2, 4, 5, 3], [[2, 4, 5, 3]]):
            answer = await embed(application, input=ids, encoding_format="base64")
            assert [one["embedding"] for one in answer.json["data"]] == [wanted]
        assert (await embed(application, input=[[]])).status == 400
        assert (await embed(application, input=[99])).status == 400


async def scores(stub: Any, query: str, documents: list[str]) -> list[float]:
    found = []
    for document in documents:
        pair = pb.Sequence(text=pb.TextInput(text=query, text_pair=document))
        asked = pb.InferRequest(model="ranker", sequences=[pair], outputs=pb.OutputSelection(names=["logits"]))
        answer = await stub.Infer(asked)
        found += struct.unpack("<f", answer.results[0].outputs[0].data)
    return found


async def test_rerank_answers_in_both_forms(server: RunningServer, stub: Any) -> None:
    raw = await scores(stub, "the cat", TEXTS)
    order = sorted(range(3), key=lambda at: -raw[at])
    tei = await call(server.rest_port, "POST", "/rerank", {"query": "the cat", "texts": TEXTS, "return_text": True})
    msgspec.convert(tei.json, list[rerank.Rank])
    assert [one["index"] for one in tei.json] == order
    assert [one["text"] for one in tei.json] == [TEXTS[at] for at in order]
    for one in tei.json:  # float32 sums in batches of other sizes differ by rounding
        assert math.isclose(one["score"], 1 / (1 + math.exp(-raw[one["index"]])), abs_tol=1e-5)
    plain = await call(server.rest_port, "POST", "/rerank", {"query": "the cat", "texts": TEXTS, "raw_scores": True})
    assert [one["score"] for one in plain.json] == pytest.approx([raw[at] for at in order], abs=1e-4)
    for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
        body = {
            "query": "the cat",
            "documents": [TEXTS[0], {"text": TEXTS[1]}, TEXTS[2]],
            "model": "ranker",
            "top_n": 2,
        }
        cohere = await call(server.rest_port, "POST", path, body | {"return_documents": True})
        msgspec.convert(cohere.json, rerank.Relevances)
        assert [one["index"] for one in cohere.json["results"]] == order[:2]
        assert cohere.json["results"][0]["document"]["text"] == TEXTS[order[0]]


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/rerank", {"query": "a"}, "texts"),
        ("/rerank", {"query": "a", "texts": ["b"], "documents": ["b"]}, "one of them"),
        ("/rerank", {"query": "a", "texts": []}, "texts"),
        ("/rerank", {"query": "a", "texts": [""]}, "texts[0]"),
        ("/rerank", {"query": "a", "texts": ["b"], "truncate": True}, "truncate"),
        ("/rerank", {"query": "a", "texts": ["b"], "model": "tiny"}, "ranker"),
        ("/v2/rerank", {"query": "a", "documents": ["b"], "model": "nothing"}, "nothing"),
        ("/v2/rerank", {"query": "", "documents": ["b"], "model": "ranker"}, "text"),
    ],
)
async def test_rerank_refuses_by_name(server: RunningServer, path: str, body: object, said: str) -> None:
    answer = await call(server.rest_port, "POST", path, body)
    assert answer.status in {400, 404}
    assert said in answer.json["message"]


async def test_equal_requests_together_get_equal_answers(server: RunningServer) -> None:
    asked = {"input": TEXTS, "encoding_format": "float"}
    answers = await asyncio.gather(*(embed(server, **asked) for _ in range(20)))
    first = np.array([one["embedding"] for one in answers[0].json["data"]])
    for answer in answers:
        assert np.allclose([one["embedding"] for one in answer.json["data"]], first, atol=1e-5)


class Loaded(HTMLParser):
    """Collects what a page loads."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [str(value) for key, value in attrs if key in {"src", "srcset", "data", "action", "poster"}]
        self.found += [tag] if tag in {"script", "link", "iframe", "img", "object"} else []


async def test_the_document_has_every_endpoint_and_its_page_loads_nothing(server: RunningServer) -> None:
    document = (await call(server.rest_port, "GET", "/openapi.json")).json
    assert document["openapi"] == "3.1.0"
    assert {"/v1/models/{name}:infer", "/v1/embeddings", "/rerank", "/v2/rerank", "/v1/models"} <= document[
        "paths"
    ].keys()
    text = json.dumps(document)
    for reference in {part.split('"')[0] for part in text.split('"$ref": "#/components/schemas/')[1:]}:
        assert reference in document["components"]["schemas"]
    page = await call(server.rest_port, "GET", "/openapi")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    loaded = Loaded()
    loaded.feed(page.body.decode())
    assert loaded.found == []
    assert "/v1/embeddings" in page.body.decode()


@pytest.mark.slow
async def test_every_front_serves_the_pages_of_a_merged_port(tiny_repository: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    flags = ["--isolation", "process", "--fronts", "2", "--rest-port", str(port), "--http-port", str(port)]
    with serve(tiny_repository, tmp_path, *flags) as running:
        assert (running.rest_port, running.http_port) == (port, port)
        answers = [await infer(running, {"sequences": ["the cat"]}) for _ in range(16)]  # a connection each
        assert {answer.status for answer in answers} == {200}
        ready = await asyncio.gather(*(call(port, "GET", "/readyz") for _ in range(16)))
        assert {answer.json["status"] for answer in ready} == {"ready"}
        for _ in range(4):  # the sum over both fronts, whichever answers
            counted = await asyncio.to_thread(running.metric, "attnserve_requests_total", model="tiny", code="OK")
            assert counted == 16
