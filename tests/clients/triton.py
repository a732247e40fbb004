"""tritonclient, unmodified: gRPC from threads, with asyncio and on a stream; and HTTP, by `triton_http.py`."""

from __future__ import annotations

import argparse
import asyncio
import queue
import subprocess
import sys
from pathlib import Path

import numpy as np
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from tritonclient.utils import InferenceServerException

IDS = np.array([[2, 4, 5, 3], [2, 6, 3, 0]], np.int64)
MASK = np.array([[1, 1, 1, 1], [1, 1, 1, 0]], np.int64)


def tensors(module=triton) -> list:
    """Return the inputs of a padded batch of two rows."""
    found = []
    for name, array in (("input_ids", IDS), ("attention_mask", MASK)):
        found.append(module.InferInput(name, array.shape, "INT64"))
        found[-1].set_data_from_numpy(array)
    return found


def texts(*given: str) -> list:
    """Return the input of one text for each row."""
    found = triton.InferInput("text", [len(given), 1], "BYTES")
    found.set_data_from_numpy(np.array([[one.encode()] for one in given], object))
    return [found]


def refused(call, *words: str) -> None:
    """Check that a call fails with a message that has these words."""
    message = "nothing"
    try:
        call()
    except InferenceServerException as error:
        message = str(error)
    assert all(word in message for word in words), f"not refused with {words}: {message}"


def check_models(client: triton.InferenceServerClient) -> None:
    """Check what describes and changes models."""
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("tiny")
    assert client.get_server_metadata().name == "attnserve"
    metadata = client.get_model_metadata("tiny", as_json=True)
    assert [one["name"] for one in metadata["inputs"]] == ["input_ids", "attention_mask", "text", "text_pair"]
    config = client.get_model_config("tiny").config
    assert (config.name, config.max_batch_size) == ("tiny", 8)
    assert {one.name for one in client.get_model_repository_index().models} >= {"tiny", "plain"}
    refused(lambda: client.get_model_metadata("none"), "NOT_FOUND", "no model 'none'")
    client.unload_model("plain")
    refused(lambda: client.is_model_ready("plain") or client.get_model_metadata("plain"), "NOT_FOUND")
    client.load_model("plain")
    assert client.is_model_ready("plain")


def check_threads(client: triton.InferenceServerClient) -> None:
    """Check calls from a thread."""
    answer = client.infer("tiny", tensors(), request_id="a", priority=1, timeout=5_000_000)
    hidden = answer.as_numpy("hidden")
    assert hidden.shape[:2] == (2, 4)
    assert not hidden[1, 3].any()
    assert answer.as_numpy("lengths").tolist() == [4, 3]
    assert answer.get_response().id == "a"
    answer = client.infer("tiny", texts("the cat", "the cat sat"), model_version="1")
    assert answer.as_numpy("lengths").tolist() == [4, 5]
    wanted = [triton.InferRequestedOutput(name) for name in ("attention:1", "attention:rollout")]
    weights = client.infer("tiny", tensors(), outputs=wanted[:1]).as_numpy("attention:1")
    assert weights.shape == (2, 2, 4, 4)
    np.testing.assert_allclose(weights[0].sum(axis=-1), 1, atol=1e-5)
    refused(lambda: client.infer("tiny", tensors(), outputs=wanted), "INVALID_ARGUMENT", "two requests")
    links = [triton.InferRequestedOutput(f"attention:0:{part}") for part in ("query", "key", "weight")]
    found = client.infer("tiny", tensors(), outputs=links, parameters={"top_k": 3})
    assert found.as_numpy("attention:0:weight").shape == (2, 3)
    refused(lambda: client.infer("tiny", tensors(), sequence_id=4), "INVALID_ARGUMENT", "sequence_id")
    refused(
        lambda: client.infer("tiny", tensors(), outputs=[triton.InferRequestedOutput("hidden", class_count=2)]),
        "INVALID_ARGUMENT",
        "classification",
    )
    pending: queue.Queue = queue.Queue()
    client.async_infer("tiny", tensors(), lambda result, error: pending.put((result, error)))
    result, error = pending.get(timeout=20)
    assert error is None
    assert result.as_numpy("hidden").tobytes() == hidden.tobytes()
    known = client.get_inference_statistics("tiny", "2").model_stats[0]
    assert known.inference_stats.success.count >= 4


def check_stream(client: triton.InferenceServerClient) -> None:
    """Check a stream: answers in order, also after one that fails."""
    answers: queue.Queue = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    for name, model in (("1", "tiny"), ("2", "none"), ("3", "tiny")):
        client.async_stream_infer(model, tensors(), request_id=name, enable_empty_final_response=True)
    found = [answers.get(timeout=20) for _ in range(3)]
    client.stop_stream()
    assert found[0][0].get_response().id == "1"
    assert "no model 'none'" in str(found[1][1])
    last = found[2][0].get_response()
    assert last.id == "3"
    assert last.parameters["triton_final_response"].bool_param


async def check_asyncio(url: str) -> None:
    """Check calls and a stream with asyncio."""
    async with triton_aio.InferenceServerClient(url) as client:
        assert await client.is_server_ready()
        answers = await asyncio.gather(*(client.infer("tiny", tensors(triton_aio)) for _ in range(20)))
        assert all(one.as_numpy("lengths").tolist() == [4, 3] for one in answers)

        async def requests():
            for name in ("1", "2"):
                yield {"model_name": "tiny", "inputs": tensors(triton_aio), "request_id": name}

        found = [result.get_response().id async for result, _ in client.stream_infer(requests())]
        assert found == ["1", "2"]


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--grpc", required=True)
    arguments, _ = parser.parse_known_args()
    url = f"127.0.0.1:{arguments.grpc}"
    with triton.InferenceServerClient(url) as client:
        check_models(client)
        check_threads(client)
        check_stream(client)
    asyncio.run(check_asyncio(url))
    print("tritonclient: gRPC from threads, with asyncio, on a stream", flush=True)
    # In its own process, because its event loop is that of gevent.
    subprocess.run([sys.executable, Path(__file__).with_name("triton_http.py"), *sys.argv[1:]], check=True)


if __name__ == "__main__":
    main()
