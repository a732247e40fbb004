"""The same sequences over native gRPC, both forms of the Open Inference Protocol, and OpenAI's API get equal answers.

One at a time they are equal bit for bit. Together, in batches as they form, they are equal by the rule of
`model/equality.py`. Needs the fixtures of tests/contract/conftest.py.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
from collections.abc import AsyncIterator, Awaitable, Callable

import grpc
import numpy as np
import pytest
from attnserve.oip import open_inference_pb2 as oip
from attnserve.v1 import inference_service_pb2 as pb
from attnserve.v1.inference_service_pb2_grpc import InferenceServiceStub
from attnserve_server.app import Application
from attnserve_server.config import Settings
from attnserve_server.model.equality import equality_of
from attnserve_server.transport.oip.servicer import SERVICE
from attnserve_server.transport.rest.oip_bodies import JSON_BYTES
from http_calls import call
from tiny_bundle import WORDS

TEXTS = [" ".join(itertools.islice(itertools.cycle(WORDS), at, at + 1 + 3 * at)) for at in range(10)]
"""Of 1 to 28 words, none of which begins as another does."""


class Calls:
    """One text over each protocol; each method returns the bytes of the output `embedding`."""

    def __init__(self, server: Application, channel: grpc.aio.Channel) -> None:
        self._server = server
        self._native = InferenceServiceStub(channel).Infer
        self._oip = channel.unary_unary(
            f"/{SERVICE}/ModelInfer", oip.ModelInferRequest.SerializeToString, oip.ModelInferResponse.FromString
        )

    async def native(self, text: str) -> bytes:
        wanted = pb.OutputSelection(names=["embedding"])
        sequence = pb.Sequence(text=pb.TextInput(text=text))
        answer = await self._native(pb.InferRequest(model="tiny", sequences=[sequence], outputs=wanted))
        return answer.results[0].outputs[0].data

    async def oip_grpc(self, text: str) -> bytes:
        request = oip.ModelInferRequest(model_name="tiny", outputs=[{"name": "embedding"}])
        contents = oip.InferTensorContents(bytes_contents=[text.encode()])
        request.inputs.add(name="text", datatype="BYTES", shape=[1, 1], contents=contents)
        return (await self._oip(request)).raw_output_contents[0]

    async def oip_rest(self, text: str) -> bytes:
        data = len(text).to_bytes(4, "little") + text.encode()
        given = {"name": "text", "datatype": "BYTES", "shape": [1, 1], "parameters": {"binary_data_size": len(data)}}
        wanted = [{"name": "embedding", "parameters": {"binary_data": True}}]
        top = json.dumps({"inputs": [given], "outputs": wanted}).encode()
        headers = {JSON_BYTES: str(len(top))}
        answer = await call(self._server.rest_port, "POST", "/v2/models/tiny/infer", top + data, headers)
        assert answer.status == 200, answer.body
        return answer.body[int(answer.headers[JSON_BYTES]) :]

    async def openai(self, text: str) -> bytes:
        sent = {"model": "tiny", "input": text, "encoding_format": "base64"}
        answer = await call(self._server.rest_port, "POST", "/v1/embeddings", sent)
        assert answer.status == 200, answer.body
        return base64.b64decode(answer.json["data"][0]["embedding"])

    @property
    def all(self) -> list[Callable[[str], Awaitable[bytes]]]:
        return [self.native, self.oip_grpc, self.oip_rest, self.openai]


@pytest.fixture
async def calls(settings: Settings) -> AsyncIterator[tuple[Application, Calls]]:
    server = Application(settings.model_copy(update={"instances": 1}))
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        yield server, Calls(server, channel)
    await server.aclose()


async def test_answers_one_at_a_time_are_equal_bit_for_bit(calls: tuple[Application, Calls]) -> None:
    _, by = calls
    found = [[await one(text) for one in by.all] for text in TEXTS]
    assert all(len(set(answers)) == 1 for answers in found)
    assert len({answers[0] for answers in found}) == len(TEXTS), "the control: other texts have other answers"


async def test_answers_together_are_equal_within_the_noise(calls: tuple[Application, Calls]) -> None:
    server, by = calls
    alone = [np.frombuffer(await by.native(text), "<f4") for text in TEXTS]
    served = server.catalog.get("tiny", "2")
    assert served.manifest is not None
    runs = served.statistics.runs
    together = await asyncio.gather(*(one(text) for _ in range(5) for text in TEXTS for one in by.all))
    rows = len(together)
    assert served.statistics.runs - runs < rows / 2, "the control: requests of several protocols shared runs"
    equality = equality_of(served.manifest)
    for at, answer in enumerate(together):
        reference = alone[at // len(by.all) % len(TEXTS)]
        assert equality.error("embedding", np.frombuffer(answer, "<f4"), reference) <= 1
