"""Who may call: every method and path with every kind of credential on both ports, in one process and in several.

Servers run as processes with TLS, of certificates that the tests make, and a tokens file. Needs the fixture
`tiny_repository` of tests/contract/conftest.py.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import grpc
import pytest
from attnserve.oip import open_inference_pb2 as oip
from attnserve.v1 import attention_pb2
from attnserve.v1 import inference_service_pb2 as pb
from attnserve.v1 import model_service_pb2 as admin
from attnserve_client import AsyncClient, Client, ServerUnreachable
from attnserve_client.data_types import Tls, TokenFile
from attnserve_client.errors import PermissionDenied, Unauthenticated
from attnserve_server.config import Settings
from attnserve_server.observability import probe
from attnserve_server.transport.admin import METHODS
from attnserve_server.transport.admin import SERVICE as MODEL_SERVICE
from attnserve_server.transport.oip.servicer import METHODS as OIP_METHODS
from attnserve_server.transport.oip.servicer import SERVICE as OIP
from attnserve_server.transport.reflection import CHANNELZ_METHODS
from attnserve_server.transport.rest.explorer import explorer_endpoints
from attnserve_server.transport.rest.server import endpoints
from attnserve_server.transport.servicer import SERVICE
from attnserve_server.transport.who import SCOPE_OF, path_of
from credentials import Files, Tokens, bearer, expired, swap
from google.rpc import status_pb2
from grpc_health.v1 import health_pb2
from prometheus_client.parser import text_string_to_metric_families
from serving import RunningServer, serve

UNAUTHENTICATED, DENIED = "UNAUTHENTICATED", "PERMISSION_DENIED"
UNKNOWN_TOKEN = "attn_" + "A" * 43


@dataclass
class Secured:
    """A server with TLS and tokens."""

    server: RunningServer
    files: Files
    tokens: Tokens
    isolation: str = ""

    def channel(self, client=None) -> grpc.Channel:
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
        return grpc.secure_channel(
            f"localhost:{self.server.grpc_port}", self.files.channel_credentials(client), options
        )

    @cached_property
    def shared(self) -> grpc.Channel:
        """One channel for all tests that need no new connection."""
        return self.channel()

    def get(self, path: str, authorization: str = "", client=None) -> tuple[int, dict[str, str], str]:
        """Answer of the HTTP port: status, headers and body."""
        context = self.files.context(client)
        connection = http.client.HTTPSConnection("localhost", self.server.http_port, context=context, timeout=10)
        connection.request("GET", path, headers={"authorization": authorization} if authorization else {})
        answer = connection.getresponse()
        found = answer.status, {key.lower(): value for key, value in answer.getheaders()}, answer.read().decode()
        connection.close()
        return found

    def rest(self, method: str, path: str, body: object, authorization: str = "") -> tuple[int, dict[str, str], str]:
        """Answer of the REST port to JSON: status, headers and body."""
        context = self.files.context(None)
        connection = http.client.HTTPSConnection("localhost", self.server.rest_port, context=context, timeout=20)
        sent = {"authorization": authorization} if authorization else {}
        data = None if body is None else json.dumps(body)
        connection.request(method, path, data, sent | ({"content-type": "application/json"} if data else {}))
        answer = connection.getresponse()
        found = answer.status, {key.lower(): value for key, value in answer.getheaders()}, answer.read().decode()
        connection.close()
        return found

    def metric(self, name: str, client=None, **labels: str) -> float:
        status, _, page = self.get("/metrics", f"Bearer {self.tokens.secrets['all']}" if self.tokens else "", client)
        assert status == 200
        return sum(
            sample.value
            for family in text_string_to_metric_families(page)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def lines(self, event: str) -> list[dict]:
        """The log's lines of one event. Every line is JSON."""
        found = [json.loads(line) for line in self.server.log.read_text().splitlines()]
        return [line for line in found if line["event"] == event]


SCOPES = {
    "all": "infer,attention,metrics,admin",
    "infer": "infer",
    "attention": "infer,attention",
    "metrics": "metrics",
    "admin": "admin",
}


@pytest.fixture(scope="module", params=["none", "process"])
def secured(
    request: pytest.FixtureRequest, tiny_repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Secured]:
    """A server of one process, and one of several, for tests that leave it as it was."""
    folder = tmp_path_factory.mktemp("secured")
    files, tokens = Files(folder), Tokens(folder / "tokens.txt")
    for name, scopes in SCOPES.items():
        tokens.add(name, scopes)
    tokens.add("expired", "infer,attention", expires="2020-01-01")
    flags = ["--isolation", request.param, "--fronts", "1", "--admin", "--reflection"]
    with started(tiny_repository, folder, files, tokens, *flags) as running:
        running.isolation = request.param
        for name in SCOPES:  # in use, so that the tests of wrong tokens from the same address do not hold them back
            with running.channel() as channel:
                code_of(channel, f"/{SERVICE}/ListModels", b"", bearer(tokens.secrets[name]))
            running.get("/nothing", f"Bearer {tokens.secrets[name]}")
        yield running
        running.shared.close()


class started:  # noqa: N801 - used as a context manager
    """Run a server with these files. `tokens`: None for none."""

    def __init__(self, repository: Path, folder: Path, files: Files, tokens: Tokens | None, *flags: str) -> None:
        line = ["--tls-cert", str(files.cert), "--tls-key", str(files.key), *flags]
        line += ["--tokens-file", str(tokens.path)] if tokens else []
        self._serving = serve(repository, folder, *line)
        self._parts = files, tokens

    def __enter__(self) -> Secured:
        return Secured(self._serving.__enter__(), *self._parts)

    def __exit__(self, *error: object) -> None:
        self._serving.__exit__(*error)


def text(**fields: object) -> pb.InferRequest:
    return pb.InferRequest(model="tiny", sequences=[pb.Sequence(text=pb.TextInput(text="the cat"))], **fields)


def code_of(channel: grpc.Channel, method: str, data: bytes, metadata=()) -> str:
    """The code with which a call of raw bytes ends; on a stream, of the request."""
    try:
        if method.endswith("ServerReflectionInfo"):
            next(channel.stream_stream(method)(iter([data]), timeout=10, metadata=metadata))
            return "OK"
        if method.endswith("StreamInfer"):
            answer = next(channel.stream_stream(method)(iter([data]), timeout=10, metadata=metadata))
            if method.startswith(f"/{OIP}/"):
                failed = oip.ModelStreamInferResponse.FromString(answer)
                return failed.infer_response.parameters["code"].string_param if failed.error_message else "OK"
            return code_within(answer)
        if method.endswith("Watch"):
            next(channel.unary_stream(method)(data, timeout=10, metadata=metadata))
            return "OK"
        channel.unary_unary(method)(data, timeout=10, metadata=metadata)
    except grpc.RpcError as error:
        return error.code().name
    return "OK"


def code_within(answer: bytes) -> str:
    """The code with which a request of a stream ends."""
    number = status_pb2.Status.FromString(pb.StreamInferResponse.FromString(answer).status).code
    return next(code.name for code in grpc.StatusCode if code.value[0] == number)


named_tiny = {"model_name": "tiny"}
oip_text = oip.ModelInferRequest.InferInputTensor(
    name="text", datatype="BYTES", shape=[1], contents=oip.InferTensorContents(bytes_contents=[b"the cat"])
)
oip_plain = oip.ModelInferRequest(model_name="tiny", inputs=[oip_text])
oip_selected = oip.ModelInferRequest(model_name="tiny", inputs=[oip_text], outputs=[{"name": "attention:0"}])
tiny_9 = admin.UnloadModelRequest(model="tiny", version="9")
plain, selected = text(), text(attention=attention_pb2.AttentionSelection())


def streamed(request: pb.InferRequest) -> bytes:
    named = pb.InferRequest()
    named.CopyFrom(request)
    named.request_id = "a"
    return pb.StreamInferRequest(request=named).SerializeToString()


GRPC: dict[str, tuple[str, bytes, str]] = {
    "Infer": (f"/{SERVICE}/Infer", plain.SerializeToString(), "infer"),
    "Infer with attention": (f"/{SERVICE}/Infer", selected.SerializeToString(), "attention"),
    "StreamInfer": (f"/{SERVICE}/StreamInfer", streamed(plain), "infer"),
    "StreamInfer with attention": (f"/{SERVICE}/StreamInfer", streamed(selected), "attention"),
    "ListModels": (f"/{SERVICE}/ListModels", b"", "infer"),
    "GetModel": (f"/{SERVICE}/GetModel", pb.GetModelRequest(model="tiny").SerializeToString(), "infer"),
    "GetLoad": (f"/{SERVICE}/GetLoad", b"", "infer"),
    "GetTokenizer": (f"/{SERVICE}/GetTokenizer", pb.GetTokenizerRequest(model="tiny").SerializeToString(), "infer"),
    "LoadModel": (f"/{MODEL_SERVICE}/LoadModel", admin.LoadModelRequest(model="tiny").SerializeToString(), "admin"),
    "UnloadModel": (f"/{MODEL_SERVICE}/UnloadModel", tiny_9.SerializeToString(), "admin"),
    "ReloadRepository": (f"/{MODEL_SERVICE}/ReloadRepository", b"", "admin"),
    "Check": ("/grpc.health.v1.Health/Check", b"", "free"),
    "Watch": ("/grpc.health.v1.Health/Watch", b"", "free"),
    "an unknown method": (f"/{SERVICE}/Nothing", b"", "none"),
    "an unknown service": ("/inference.ModelService/LoadModel", b"", "none"),
    "ServerLive": (f"/{OIP}/ServerLive", b"", "free"),
    "ServerReady": (f"/{OIP}/ServerReady", b"", "free"),
    "ServerMetadata": (f"/{OIP}/ServerMetadata", b"", "infer"),
    "ModelReady": (f"/{OIP}/ModelReady", oip.ModelReadyRequest(name="tiny").SerializeToString(), "infer"),
    "ModelMetadata": (f"/{OIP}/ModelMetadata", oip.ModelMetadataRequest(name="tiny").SerializeToString(), "infer"),
    "ModelConfig": (f"/{OIP}/ModelConfig", oip.ModelConfigRequest(name="tiny").SerializeToString(), "infer"),
    "ModelStatistics": (f"/{OIP}/ModelStatistics", b"", "infer"),
    "RepositoryIndex": (f"/{OIP}/RepositoryIndex", b"", "infer"),
    "ModelInfer": (f"/{OIP}/ModelInfer", oip_plain.SerializeToString(), "infer"),
    "ModelInfer with attention": (f"/{OIP}/ModelInfer", oip_selected.SerializeToString(), "attention"),
    "ModelStreamInfer": (f"/{OIP}/ModelStreamInfer", oip_plain.SerializeToString(), "infer"),
    "ModelStreamInfer with attention": (f"/{OIP}/ModelStreamInfer", oip_selected.SerializeToString(), "attention"),
    "RepositoryModelLoad": (
        f"/{OIP}/RepositoryModelLoad",
        oip.RepositoryModelLoadRequest(**named_tiny).SerializeToString(),
        "admin",
    ),
    "RepositoryModelUnload": (
        f"/{OIP}/RepositoryModelUnload",
        oip.RepositoryModelUnloadRequest(model_name="none").SerializeToString(),
        "admin",
    ),
    "reflection": ("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", b"", "admin"),
    "older reflection": ("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", b"", "admin"),
    "channelz": ("/grpc.channelz.v1.Channelz/GetServers", b"", "admin"),
    "a path without a slash": (f"{SERVICE}.Infer", plain.SerializeToString(), "none"),
    "a path of a method alone": ("/Infer", plain.SerializeToString(), "none"),
    "a path with another case": (f"/{SERVICE}/infer", plain.SerializeToString(), "none"),
    "a path with two slashes": (f"//{SERVICE}/Infer", plain.SerializeToString(), "none"),
    "a path of the other port": ("/metrics", b"", "none"),
}
HTTP: dict[str, tuple[str, str]] = {
    "/livez": ("/livez", "free"),
    "/readyz": ("/readyz", "free"),
    "/metrics": ("/metrics", "metrics"),
    "/metrics with a query": ("/metrics?name=x", "metrics"),
    "/metrics/": ("/metrics/", "none"),
    "//metrics": ("//metrics", "none"),
    "/METRICS": ("/METRICS", "none"),
    "/v1": ("/v1", "none"),
    "/docs": ("/docs", "none"),
    "/livez/../metrics": ("/livez/../metrics", "none"),
    "a method of the other port": (f"/{SERVICE}/Infer", "none"),
}
RANKED = {"model": "tiny", "query": "the cat", "documents": ["the dog"]}
"""`tiny` is no cross-encoder, so that an admitted call gets 400."""
TEXT = {"sequences": ["the cat"]}
SELECTED = {**TEXT, "attention": {"layers": [-1]}}
OIP_TEXT = {"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["the cat"]}]}
OIP_SELECTED = {**OIP_TEXT, "outputs": [{"name": "attention:0"}]}
UNLOADED: dict[str, object] = {"parameters": {"unload_dependents": False}}
"""Of a model that is not there, so that an admitted call gets 404."""
REST: dict[str, tuple[str, str, object, str]] = {
    "models": ("GET", "/v1/models", None, "infer"),
    "a model": ("GET", "/v1/models/tiny", None, "infer"),
    "a version": ("GET", "/v1/models/tiny/versions/1", None, "infer"),
    "infer": ("POST", "/v1/models/tiny:infer", TEXT, "infer"),
    "infer with attention": ("POST", "/v1/models/tiny:infer", SELECTED, "attention"),
    "infer of a version": ("POST", "/v1/models/tiny/versions/1:infer", TEXT, "infer"),
    "infer of a version with attention": ("POST", "/v1/models/tiny/versions/1:infer", SELECTED, "attention"),
    "embeddings": ("POST", "/v1/embeddings", {"model": "tiny", "input": ["the cat"]}, "infer"),
    "rerank": ("POST", "/rerank", RANKED, "infer"),
    "rerank of version 1": ("POST", "/v1/rerank", RANKED, "infer"),
    "rerank of version 2": ("POST", "/v2/rerank", RANKED, "infer"),
    "OIP, live": ("GET", "/v2/health/live", None, "free"),
    "OIP, ready": ("GET", "/v2/health/ready", None, "free"),
    "OIP, the server": ("GET", "/v2", None, "infer"),
    "OIP, all statistics": ("GET", "/v2/models/stats", None, "infer"),
    "OIP, the index": ("POST", "/v2/repository/index", {}, "infer"),
    "OIP, load": ("POST", "/v2/repository/models/tiny/load", {}, "admin"),
    "OIP, unload": ("POST", "/v2/repository/models/none/unload", UNLOADED, "admin"),
    **{
        f"OIP, {subject or 'metadata'} of tiny{version}": ("GET", f"/v2/models/tiny{version}{subject}", None, "infer")
        for version in ("", "/versions/1")
        for subject in ("", "/ready", "/config", "/stats")
    },
    "OIP, infer": ("POST", "/v2/models/tiny/infer", OIP_TEXT, "infer"),
    "OIP, infer with attention": ("POST", "/v2/models/tiny/infer", OIP_SELECTED, "attention"),
    "OIP, infer of a version": ("POST", "/v2/models/tiny/versions/1/infer", OIP_TEXT, "infer"),
    "OIP, infer of a version with attention": ("POST", "/v2/models/tiny/versions/1/infer", OIP_SELECTED, "attention"),
    "OIP, a path with a slash": ("GET", "/v2/", None, "none"),
    "OIP, shared memory": ("GET", "/v2/systemsharedmemory/status", None, "none"),
    "the document": ("GET", "/openapi.json", None, "infer"),
    "its page": ("GET", "/openapi", None, "infer"),
    "the explorer": ("GET", "/explore", None, "free"),
    "a file of the explorer": ("GET", "/explore/explore.js", None, "free"),
    "the way to the explorer": ("GET", "/", None, "free"),
    "a folder of the explorer": ("GET", "/explore/a/b", None, "none"),
    "an unknown path": ("GET", "/v1/nothing", None, "none"),
    "a path with a slash": ("GET", "/v1/models/", None, "none"),
    "a path with two slashes": ("POST", "//v1/embeddings", {"model": "tiny", "input": "cat"}, "none"),
    "a path of the other port": ("GET", "/v1/../metrics", None, "none"),
}
WRONG = {
    "no token": (),
    "an empty authorization": (("authorization", ""),),
    "no scheme": (("authorization", UNKNOWN_TOKEN),),
    "another scheme": (("authorization", "Basic dXNlcjpwYXNz"),),
    "an empty token": (("authorization", "Bearer "),),
    "an unknown token": bearer(UNKNOWN_TOKEN),
    "an expired token": "expired",
    "a name for its token": bearer("all"),
}
CREDENTIALS = [*WRONG, *SCOPES]
ADMITTED = {"UnloadModel": "NOT_FOUND", "RepositoryModelUnload": "NOT_FOUND"}
"""What a call gets that is admitted, where it is not OK."""


def metadata_of(secured: Secured, credential: str) -> tuple[tuple[str, str], ...]:
    found = WRONG.get(credential, credential)
    return bearer(secured.tokens.secrets[found]) if isinstance(found, str) else found


@pytest.mark.parametrize("call", GRPC)
@pytest.mark.parametrize("credential", CREDENTIALS)
def test_every_method_is_served_to_its_scope_alone(secured: Secured, call: str, credential: str) -> None:
    method, data, scope = GRPC[call]
    scopes = SCOPES.get(credential, "").split(",")
    if scope == "free":
        expected = "OK"
    elif credential in WRONG:
        expected = UNAUTHENTICATED
    elif scope == "none":
        expected = "UNIMPLEMENTED"
    else:
        expected = ADMITTED.get(call, "OK") if scope in scopes else DENIED
    assert code_of(secured.shared, method, data, metadata_of(secured, credential)) == expected


@pytest.mark.parametrize("call", HTTP)
@pytest.mark.parametrize("credential", CREDENTIALS)
def test_every_path_is_served_to_its_scope_alone(secured: Secured, call: str, credential: str) -> None:
    path, scope = HTTP[call]
    scopes = SCOPES.get(credential, "").split(",")
    given = dict(metadata_of(secured, credential)).get("authorization", "")
    status, headers, body = secured.get(path, given)
    if scope == "free":
        assert status == 200
    elif credential in WRONG:
        assert (status, headers["www-authenticate"]) == (401, "Bearer")
        assert json.loads(body)["reason"] == UNAUTHENTICATED
    elif scope == "none":
        assert status in {404, 307}, "307 leads to the path without its last slash, which is checked again"
    else:
        assert status == (200 if scope in scopes else 403)


@pytest.mark.parametrize("call", REST)
@pytest.mark.parametrize("credential", CREDENTIALS)
def test_every_path_of_rest_is_served_to_its_scope_alone(secured: Secured, call: str, credential: str) -> None:
    method, path, body, scope = REST[call]
    scopes = SCOPES.get(credential, "").split(",")
    given = dict(metadata_of(secured, credential)).get("authorization", "")
    status, headers, text_ = secured.rest(method, path, body, given)
    if scope == "free":
        assert status == (307 if path == "/" else 200)
    elif credential in WRONG:
        assert (status, headers["www-authenticate"]) == (401, "Bearer")
        assert UNAUTHENTICATED in text_
    elif scope == "none":
        assert status == 404
    elif scope in scopes:
        assert status == (400 if body is RANKED else 404 if body is UNLOADED else 200), text_
    else:
        assert status == 403
        assert "the cat" not in text_


def test_every_endpoint_of_rest_has_a_row() -> None:
    named = {(method, path_of(path)) for method, path, _, scope in REST.values() if scope != "none"}
    served = {(one.method, one.path) for one in (*endpoints(), *explorer_endpoints(Settings()))}
    assert named == served


REFLECTING = ("/grpc.reflection.", "/grpc.channelz.")


def test_every_method_of_the_services_has_a_scope() -> None:
    services = [
        pb.DESCRIPTOR.services_by_name["InferenceService"],
        admin.DESCRIPTOR.services_by_name["ModelService"],
        oip.DESCRIPTOR.services_by_name["GRPCInferenceService"],
        health_pb2.DESCRIPTOR.services_by_name["Health"],
    ]  # fmt: skip
    methods = {f"/{service.full_name}/{method.name}" for service in services for method in service.methods}
    # The newest health protocol has a List, which the server does not serve.
    known = methods - {"/grpc.health.v1.Health/List"}
    assert known == {method for method in SCOPE_OF if not method.startswith(REFLECTING)}


def test_admin_methods_do_not_exist_unless_the_server_is_started_with_them(
    tiny_repository: Path, tmp_path: Path
) -> None:
    files, tokens = Files(tmp_path), Tokens(tmp_path / "tokens.txt")
    tokens.add("all", SCOPES["all"])
    with started(tiny_repository, tmp_path, files, tokens, "--isolation", "none") as running:
        for method in ("RepositoryModelLoad", "RepositoryModelUnload"):
            assert code_of(running.shared, f"/{OIP}/{method}", b"", bearer(tokens.secrets["all"])) == "UNIMPLEMENTED"
            assert code_of(running.shared, f"/{OIP}/{method}", b"") == UNAUTHENTICATED
        for method in METHODS:
            assert (
                code_of(running.shared, f"/{MODEL_SERVICE}/{method}", b"", bearer(tokens.secrets["all"]))
                == "UNIMPLEMENTED"
            )
            assert code_of(running.shared, f"/{MODEL_SERVICE}/{method}", b"") == UNAUTHENTICATED
        running.shared.close()


def test_a_client_without_tls_gets_nothing(secured: Secured) -> None:
    with grpc.insecure_channel(f"localhost:{secured.server.grpc_port}") as channel:
        assert code_of(channel, f"/{SERVICE}/ListModels", b"", bearer(secured.tokens.secrets["all"])) == "UNAVAILABLE"
    connection = http.client.HTTPConnection("localhost", secured.server.http_port, timeout=10)
    connection.request("GET", "/livez")
    with pytest.raises((http.client.HTTPException, OSError)):
        connection.getresponse()


def test_readiness_is_checked_over_tls(secured: Secured) -> None:
    port = secured.server.http_port
    assert probe.why_not_ready("127.0.0.1", port, 10, tls=True) == ""
    assert "no answer" in probe.why_not_ready("127.0.0.1", port, 10)


def test_a_client_that_does_not_know_the_authority_refuses_the_server(secured: Secured) -> None:
    with grpc.secure_channel(f"localhost:{secured.server.grpc_port}", grpc.ssl_channel_credentials()) as channel:
        assert code_of(channel, f"/{SERVICE}/ListModels", b"") == "UNAVAILABLE"


def test_metrics_have_no_series_of_calls_that_do_not_exist(secured: Secured) -> None:
    _, _, page = secured.get("/metrics", f"Bearer {secured.tokens.secrets['all']}")
    kinds = {
        (sample.labels["grpc_method"], sample.labels["grpc_type"])
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.name == "grpc_server_started_total"
    }
    assert kinds == {
        *[("Infer", "unary"), ("ListModels", "unary"), ("GetModel", "unary"), ("StreamInfer", "bidi_stream")],
        *[("GetLoad", "unary"), ("GetTokenizer", "unary"), ("Check", "unary"), ("Watch", "server_stream")],
        ("ServerReflectionInfo", "bidi_stream"),
        *[(method, "unary") for method in CHANNELZ_METHODS],
        *[("LoadModel", "unary"), ("UnloadModel", "unary"), ("ReloadRepository", "unary")],
        *[(method, "bidi_stream" if method == "ModelStreamInfer" else "unary") for method in OIP_METHODS],
    }


def test_a_refused_call_is_not_read(secured: Secured) -> None:
    """48 MiB from a caller without a token end at once: the server does not take them in first."""
    with secured.channel() as channel:
        began = time.monotonic()
        assert code_of(channel, f"/{SERVICE}/Infer", bytes(48 * 2**20)) == UNAUTHENTICATED
        assert time.monotonic() - began < 5


def test_first_call_with_a_token_is_counted_once(secured: Secured) -> None:
    method = {"grpc_method": "GetModel"}
    assert secured_settled(secured)
    before = secured.metric("grpc_server_handled_total", **method)
    with secured.channel() as channel:
        lower = (("authorization", f"bearer  {secured.tokens.secrets['infer']}"),)  # a spelling not used before
        request = pb.GetModelRequest(model="tiny").SerializeToString()
        # The tests of wrong tokens may have used up the guesses of this address; one is earned in six seconds.
        eventually(lambda: code_of(channel, f"/{SERVICE}/ListModels", b"", lower) == "OK")
        for _ in range(2):
            assert code_of(channel, f"/{SERVICE}/GetModel", request, lower) == "OK"
        stream = f"/{SERVICE}/StreamInfer"
        assert code_of(channel, stream, streamed(plain), lower) == "OK"
        assert code_of(channel, stream, streamed(selected), lower) == DENIED, "the first call is checked as later ones"
        assert code_of(channel, f"/{SERVICE}/Infer", selected.SerializeToString(), lower) == DENIED
    eventually(lambda: secured.metric("grpc_server_handled_total", **method) - before == 2)
    assert secured.metric("grpc_server_started_total", **method) == secured.metric(
        "grpc_server_handled_total", **method
    )


def secured_settled(secured: Secured) -> bool:
    """Wait until each call that began is counted as ended, just after its caller has the answer."""
    names = ("grpc_server_started_total", "grpc_server_handled_total")
    eventually(lambda: len({secured.metric(name, grpc_method="GetModel") for name in names}) == 1)
    return True


@pytest.mark.parametrize(("isolation", "count"), [("none", 2_000), ("process", 2_000)])
def test_guesses_are_held_back_counted_and_sampled_in_the_log(
    isolation: str, count: int, tiny_repository: Path, tmp_path: Path
) -> None:
    files, tokens = Files(tmp_path), Tokens(tmp_path / "tokens.txt")
    tokens.add("all", SCOPES["all"])
    late = tokens.add("late", "infer")
    with started(tiny_repository, tmp_path, files, tokens, "--isolation", isolation, "--fronts", "1") as running:
        with running.channel() as channel:
            assert code_of(channel, f"/{SERVICE}/ListModels", b"", bearer(tokens.secrets["all"])) == "OK"
        running.metric("attnserve_access_refused_total")
        began = time.monotonic()
        causes = asyncio.run(guess(running, count))
        most = 10 + (time.monotonic() - began) / 6 + 1
        assert 10 <= causes["unknown"] <= most, "examined: ten at once, and one each six seconds"
        assert causes["backed_off"] == count - causes["unknown"]
        with running.channel() as channel:
            assert code_of(channel, f"/{SERVICE}/ListModels", b"", bearer(tokens.secrets["all"])) == "OK", (
                "it is in use"
            )
            # A right guess would not be found either: it is not examined.
            assert code_of(channel, f"/{SERVICE}/ListModels", b"", bearer(late)) == UNAUTHENTICATED
        eventually(lambda: running.metric("attnserve_access_refused_total") == count + 1)
        lines = running.lines("access refused")
        assert 1 <= len(lines) <= 30
        assert len(running.server.log.read_text()) < 30_000
        assert UNKNOWN_TOKEN not in running.server.log.read_text()
        assert all(secret not in running.server.log.read_text() for secret in tokens.secrets.values())


async def guess(running: Secured, count: int) -> dict[str, int]:
    """Send unknown tokens, fifty at a time; returns how often each cause was given."""
    causes: dict[str, int] = {"unknown": 0, "backed_off": 0}
    async with grpc.aio.secure_channel(
        f"localhost:{running.server.grpc_port}", running.files.channel_credentials()
    ) as channel:
        call = channel.unary_unary(f"/{SERVICE}/ListModels")

        async def one(number: int) -> None:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call(b"", metadata=bearer(f"attn_{number:043}"))
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
            causes["backed_off" if "not examined" in caught.value.details() else "unknown"] += 1

        for first in range(0, count, 50):
            await asyncio.gather(*(one(first + number) for number in range(50)))
    return causes


@pytest.mark.parametrize("isolation", ["none", "process"])
def test_tokens_are_reloaded_and_a_broken_file_changes_nothing(
    isolation: str, tiny_repository: Path, tmp_path: Path
) -> None:
    files, tokens = Files(tmp_path), Tokens(tmp_path / "tokens.txt")
    tokens.add("all", SCOPES["all"])
    tokens.add("first", "infer")
    with (
        started(tiny_repository, tmp_path, files, tokens, "--isolation", isolation, "--fronts", "2") as running,
        running.channel() as channel,
    ):

        def code(name: str, data: bytes = b"", method: str = "ListModels") -> str:
            return code_of(channel, f"/{SERVICE}/{method}", data, bearer(tokens.secrets[name]))

        assert code("first") == "OK"
        stream = channel.stream_stream(f"/{SERVICE}/StreamInfer")
        feed, answers = _open(stream, bearer(tokens.secrets["first"]))
        feed(streamed(plain))
        assert code_within(next(answers)) == "OK"

        tokens.add("second", "infer,attention")
        eventually(lambda: code("second") == "OK")
        assert code("second", selected.SerializeToString(), "Infer") == "OK"

        good = tokens.path.read_bytes()
        swap(tokens.path, good + b"broken line\n")
        eventually(lambda: running.metric("attnserve_reload_failed", files="tokens") == 1)
        assert code("second") == code("first") == "OK"
        assert "line" in running.lines("reload failed")[0]["reason"]

        tokens.remove("first")
        eventually(lambda: code("first") == UNAUTHENTICATED)
        assert running.metric("attnserve_reload_failed", files="tokens") == 0
        feed(streamed(plain))
        assert code_within(next(answers)) == UNAUTHENTICATED, "a stream that is open follows"
        assert code("second") == "OK"


def _open(stream, metadata):
    import queue  # noqa: PLC0415

    requests: queue.Queue[bytes] = queue.Queue()
    return requests.put, stream(iter(requests.get, None), metadata=metadata, timeout=60)


@pytest.mark.parametrize("isolation", ["none", "process"])
def test_rotation_under_load_fails_no_call_and_new_connections_get_the_new_certificate(
    isolation: str, tiny_repository: Path, tmp_path: Path
) -> None:
    files, tokens = Files(tmp_path), Tokens(tmp_path / "tokens.txt")
    tokens.add("all", SCOPES["all"])
    with started(tiny_repository, tmp_path, files, tokens, "--isolation", isolation, "--fronts", "2") as running:
        failed, answered, new_serial = asyncio.run(rotate(running))
        assert failed == []
        assert answered > 100
        assert {serial(running, port) for port in ports(running)} == {new_serial}

        before = files.cert.read_bytes()
        swap(files.cert, chain_with_other_key(files))
        eventually(lambda: running.metric("attnserve_reload_failed", files="certificates") == 1)
        assert "--tls-key" in running.lines("reload failed")[0]["reason"]
        assert {serial(running, port) for port in ports(running)} == {new_serial}, "the old pair stays in use"
        swap(files.cert, before)
        running.server.process.send_signal(signal.SIGHUP)
        eventually(lambda: running.metric("attnserve_reload_failed", files="certificates") == 0)
        assert running.metric("attnserve_certificate_not_after_timestamp_seconds") > time.time()  # noqa: TID251
        assert running.metric("attnserve_tls_handshakes_total", port="grpc") > 2
        assert running.metric("attnserve_tls_handshakes_total", port="http") > 2
        assert running.metric("attnserve_tls_handshakes_total", port="rest") > 2


def ports(running: Secured) -> tuple[int, ...]:
    # Several connections, because each front has its own.
    return (running.server.http_port, *[running.server.grpc_port] * 8, *[running.server.rest_port] * 8)


def chain_with_other_key(files: Files) -> bytes:
    return files.authority.issue_cert("localhost").cert_chain_pems[0].bytes()


def serial(running: Secured, port: int) -> str:
    """The serial number of the certificate that a new connection to this port gets."""
    context = running.files.context()
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection(("localhost", port)) as raw,
        context.wrap_socket(raw, server_hostname="localhost") as secure,
    ):
        return f"{int(secure.getpeercert()['serialNumber'], 16):x}"


async def rotate(running: Secured) -> tuple[list[str], int, str]:
    """Renew the certificate while calls run on old connections and new ones. Returns failures, answers, serial."""
    metadata = bearer(running.tokens.secrets["all"])
    request = plain.SerializeToString()
    failed: list[str] = []
    answered = 0
    done = asyncio.Event()

    async def load(*, fresh: bool) -> None:
        nonlocal answered
        channel = None
        while not done.is_set():
            if channel is None or fresh:
                channel = grpc.aio.secure_channel(
                    f"localhost:{running.server.grpc_port}",
                    running.files.channel_credentials(),
                    [("grpc.use_local_subchannel_pool", 1)],
                )
            try:
                await channel.unary_unary(f"/{SERVICE}/Infer")(request, metadata=metadata, timeout=10)
                answered += 1
            except grpc.aio.AioRpcError as error:
                failed.append(f"{error.code().name}: {error.details()}")
            if fresh:
                await channel.close()
        if not fresh and channel is not None:
            await channel.close()

    old = await asyncio.to_thread(serial, running, running.server.http_port)
    loads = [asyncio.create_task(load(fresh=fresh)) for fresh in (False, False, True, True)]
    await asyncio.sleep(0.5)
    new = running.files.renew()
    assert new != old
    until = time.monotonic() + 20
    while await asyncio.to_thread(serial, running, running.server.http_port) != new:
        assert time.monotonic() < until, "the new certificate was not used"
        await asyncio.sleep(0.1)
    await asyncio.sleep(1)
    done.set()
    await asyncio.gather(*loads)
    return failed, answered, new


@pytest.mark.parametrize("isolation", ["none", "process"])
def test_without_a_valid_client_certificate_nothing_but_health_over_http_is_served(
    isolation: str, tiny_repository: Path, tmp_path: Path
) -> None:
    files = Files(tmp_path)
    good = files.clients.issue_cert("client")
    wrong = {
        "none": None,
        "of another authority": files.authority.issue_cert("client"),
        "expired": expired(files.clients),
    }
    flags = ("--tls-client-ca", str(files.client_ca), "--isolation", isolation, "--fronts", "1")
    with started(tiny_repository, tmp_path, files, None, *flags) as running:
        with running.channel(good) as channel:
            assert code_of(channel, f"/{SERVICE}/Infer", selected.SerializeToString()) == "OK"
        assert running.get("/metrics", client=good)[0] == 200
        for name, client in wrong.items():
            with running.channel(client) as channel:
                assert code_of(channel, f"/{SERVICE}/Infer", plain.SerializeToString()) == "UNAVAILABLE", name
                assert code_of(channel, "/grpc.health.v1.Health/Check", b"") == "UNAVAILABLE", name
        assert running.get("/livez")[0] == running.get("/readyz")[0] == 200
        assert json.loads(running.get("/metrics")[2])["reason"] == "CERTIFICATE_REQUIRED"
        for name in ("of another authority", "expired"):
            with pytest.raises((ssl.SSLError, OSError, http.client.HTTPException)):
                running.get("/livez", client=wrong[name])
        before = running.metric("attnserve_tls_handshakes_total", client=good, port="grpc")
        for _ in range(100):
            with pytest.raises((ssl.SSLError, OSError)):
                handshake(running, files.context())
        eventually(lambda: running.metric("attnserve_tls_handshakes_total", client=good, port="grpc") - before == 100)
        assert running.metric("attnserve_access_refused_total", client=good, cause="certificate") == 1
        assert len(running.server.log.read_text().splitlines()) < 30, "refused handshakes do not fill the log"


def handshake(running: Secured, context: ssl.SSLContext) -> None:
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection(("localhost", running.server.grpc_port)) as raw,
        context.wrap_socket(raw, server_hostname="localhost") as secure,
    ):
        secure.settimeout(5)
        if not secure.recv(1):  # in TLS 1.3 a server refuses after the client's side of the handshake
            raise OSError("closed")


@pytest.mark.parametrize("isolation", ["none", "process"])
def test_quota_of_a_token_holds_for_the_whole_server(isolation: str, tiny_repository: Path, tmp_path: Path) -> None:
    files, tokens = Files(tmp_path), Tokens(tmp_path / "tokens.txt")
    tokens.add("all", SCOPES["all"])
    limited = tokens.add("limited", "infer", rate="2", burst="20")
    with started(tiny_repository, tmp_path, files, tokens, "--isolation", isolation, "--fronts", "3") as running:
        began = time.monotonic()
        codes: list[str] = []
        delays: list[grpc.RpcError] = []
        for _ in range(12):  # connections, which fall on all fronts
            with running.channel() as channel:
                codes += [
                    code_of(channel, f"/{SERVICE}/Infer", plain.SerializeToString(), bearer(limited)) for _ in range(4)
                ]
        spent = time.monotonic() - began
        answered = codes.count("OK")
        assert 20 <= answered <= 20 + 2 * spent + 1
        assert set(codes) == {"OK", "RESOURCE_EXHAUSTED"}
        with running.channel() as channel:
            assert (
                code_of(channel, f"/{SERVICE}/Infer", plain.SerializeToString(), bearer(tokens.secrets["all"])) == "OK"
            )
            until_s = time.monotonic() + 30
            while not delays and time.monotonic() < until_s:  # some of the quota has come back meanwhile
                try:
                    channel.unary_unary(f"/{SERVICE}/Infer")(plain.SerializeToString(), metadata=bearer(limited))
                except grpc.RpcError as error:
                    delays.append(error)
        assert "quota" in delays[0].details()


async def test_sdk_and_command_use_tls_and_tokens(secured: Secured, tmp_path: Path) -> None:
    target = f"localhost:{secured.server.grpc_port}"
    ca, token = tmp_path / "ca.pem", tmp_path / "token"
    ca.write_bytes(secured.files.authority.cert_pem.bytes())
    token.write_text(secured.tokens.secrets["infer"] + "\n")
    tls = Tls(ca=ca)

    def calls() -> None:
        with Client(target, credentials=tls, token=TokenFile(token)) as client:
            assert client.infer("tiny", "the cat").outputs
            with pytest.raises(PermissionDenied) as denied:
                client.infer("tiny", "the cat", attention=True)
            assert (denied.value.scope, denied.value.token) == ("attention", "infer")
            list(client.stream("tiny", ["the cat", "a mat"]))
            swap(token, secured.tokens.secrets["attention"].encode())
            time.sleep(1.1)
            assert client.infer("tiny", "the cat", attention=True).attention
        with Client(target, credentials=tls) as client, pytest.raises(Unauthenticated) as missing:
            client.models()
        assert missing.value.cause == "missing"
        with Client(target, token="any") as client, pytest.raises(ServerUnreachable):
            client.models(timeout=2)

    await asyncio.to_thread(calls)
    async with AsyncClient(target, credentials=tls, token=secured.tokens.secrets["attention"]) as client:
        assert (await client.infer("tiny", "the cat", attention=True)).attention

    def command(*line: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "attnserve_client.cli", *line],
            env={**os.environ, "ATTNSERVE_SERVER": target, **env}, capture_output=True, text=True, check=False,
        )  # fmt: skip

    shown = await asyncio.to_thread(command, "--ca", str(ca), "--token-file", str(token), "models")
    assert (shown.returncode, "tiny" in shown.stdout) == (0, True), shown.stderr
    named = {"ATTNSERVE_CA": str(ca), "ATTNSERVE_TOKEN": secured.tokens.secrets["infer"]}
    denied = await asyncio.to_thread(partial(command, "explain", "tiny", "the cat", **named))
    assert (denied.returncode, "'attention'" in denied.stderr) == (14, True)
    refused = await asyncio.to_thread(command, "--ca", str(ca), "models")
    assert (refused.returncode, "--token-file" in refused.stderr) == (13, True)
    load = ("bench", "tiny", "--duration", "0.5", "--warm-up", "0", "--callers", "2", "--json", "--lengths", "4")
    for more in ((), ("--stream",)):
        measured = await asyncio.to_thread(partial(command, *load, *more, **named))
        assert measured.stdout, (measured.returncode, measured.stderr)
        assert json.loads(measured.stdout)["report"]["answered"] > 0


def eventually(holds: Callable[[], bool], timeout_s: float = 15.0) -> None:
    until = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < until, "it does not hold"
        time.sleep(0.1)
