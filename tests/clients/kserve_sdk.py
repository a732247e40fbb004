"""KServe's SDK, unmodified: its clients for gRPC and REST."""

from __future__ import annotations

import argparse
import asyncio
import sys

import grpc
import httpx
import numpy as np

PORTS = argparse.ArgumentParser(description=__doc__)
PORTS.add_argument("--grpc", required=True)
PORTS.add_argument("--rest", required=True)
ARGUMENTS, _ = PORTS.parse_known_args()
del sys.argv[1:]  # kserve reads them while it is imported, and refuses what it does not know

from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest, RESTConfig  # noqa: E402
from kserve.protocol.infer_type import RequestedOutput  # noqa: E402

IDS = np.array([[2, 4, 5, 3], [2, 6, 3, 0]], np.int64)
MASK = np.array([[1, 1, 1, 1], [1, 1, 1, 0]], np.int64)


def tensors(*, binary: bool) -> list[InferInput]:
    """Return the inputs of a padded batch, as bytes or as lists."""
    found = []
    for name, array in (("input_ids", IDS), ("attention_mask", MASK)):
        found.append(InferInput(name=name, shape=list(array.shape), datatype="INT64"))
        found[-1].set_data_from_numpy(array, binary_data=binary)
    return found


async def check(url: str) -> None:
    """Check the methods of the client."""
    async with InferenceGRPCClient(url=url) as client:
        assert await client.is_server_live()
        assert await client.is_server_ready()
        assert await client.is_model_ready("tiny")
        answers = []
        for binary in (True, False):
            request = InferRequest(model_name="tiny", request_id="a", infer_inputs=tensors(binary=binary))
            answer = await client.infer(request)
            assert answer.id == "a"
            found = {one.name: one.as_numpy() for one in answer.outputs}
            assert found["lengths"].tolist() == [4, 3]
            assert found["hidden"].shape[:2] == (2, 4)
            answers.append(found["embedding"].tobytes())
        assert answers[0] == answers[1]
        text = InferInput(name="text", shape=[2], datatype="BYTES", data=["the cat", "the cat sat"])
        outputs = [RequestedOutput("attention:0"), RequestedOutput("lengths")]
        answer = await client.infer(InferRequest(model_name="tiny", infer_inputs=[text], request_outputs=outputs))
        assert [one.name for one in answer.outputs] == ["attention:0", "lengths"]
        assert answer.outputs[1].as_numpy().tolist() == [4, 5]
        code = None
        try:
            await client.infer(InferRequest(model_name="none", infer_inputs=tensors(binary=True)))
        except grpc.RpcError as error:
            code = error.code()
        assert code is grpc.StatusCode.NOT_FOUND, code


async def check_rest(url: str) -> None:
    """Check the methods of the client for REST."""
    client = InferenceRESTClient(RESTConfig(protocol="v2"))
    assert await client.is_server_live(url)
    assert await client.is_server_ready(url)
    assert await client.is_model_ready(url, "tiny")
    answers = []
    for binary in (True, False):
        parameters = {"binary_data_output": binary}
        request = InferRequest("tiny", tensors(binary=binary), request_id="a", parameters=parameters)
        answer = await client.infer(url, request, model_name="tiny")
        found = {one.name: one.as_numpy() for one in answer.outputs}
        assert answer.id == "a"
        assert found["lengths"].tolist() == [4, 3]
        answers.append(found["embedding"].tobytes())
    assert answers[0] == answers[1]
    text = InferInput(name="text", shape=[2], datatype="BYTES", data=["the cat", "the cat sat"])
    outputs = [RequestedOutput("attention:0"), RequestedOutput("lengths")]
    answer = await client.infer(url, InferRequest("tiny", [text], request_outputs=outputs), model_name="tiny")
    assert answer.outputs[1].as_numpy().tolist() == [4, 5]
    status = 0
    try:
        await client.infer(url, InferRequest("none", tensors(binary=True)), model_name="none")
    except httpx.HTTPStatusError as error:
        status = error.response.status_code
        assert "no model 'none'" in str(error), error
    assert status == 404, status
    await client.close()


def main() -> None:
    """Entry point."""
    asyncio.run(check(f"127.0.0.1:{ARGUMENTS.grpc}"))
    asyncio.run(check_rest(f"http://127.0.0.1:{ARGUMENTS.rest}"))
    print("kserve: gRPC and REST with bytes, lists and texts")


if __name__ == "__main__":
    main()
