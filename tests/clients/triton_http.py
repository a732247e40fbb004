"""tritonclient's HTTP client, unmodified: from threads and with asyncio, with tensors as bytes and as JSON."""

from __future__ import annotations

import argparse
import asyncio

import numpy as np
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from tritonclient.utils import InferenceServerException

IDS = np.array([[2, 4, 5, 3], [2, 6, 3, 0]], np.int64)
MASK = np.array([[1, 1, 1, 1], [1, 1, 1, 0]], np.int64)


def tensors(module=triton, *, binary: bool = True) -> list:
    """Return the inputs of a padded batch of two rows."""
    found = []
    for name, array in (("input_ids", IDS), ("attention_mask", MASK)):
        found.append(module.InferInput(name, array.shape, "INT64"))
        found[-1].set_data_from_numpy(array, binary_data=binary)
    return found


def texts(*given: str, binary: bool = True) -> list:
    """Return the input of one text for each row."""
    found = triton.InferInput("text", [len(given), 1], "BYTES")
    found.set_data_from_numpy(np.array([[one.encode()] for one in given], object), binary_data=binary)
    return [found]


def refused(call, status: str, *words: str) -> None:
    """Check that a call fails with a status, and a message that has these words."""
    found = ("", "nothing")
    try:
        call()
    except InferenceServerException as error:
        found = (error.status(), error.message())
    assert found[0] == status, f"not refused with {status}: {found}"
    assert all(word in found[1] for word in words), f"not refused with {words}: {found}"


def check_models(client: triton.InferenceServerClient) -> None:
    """Check what describes and changes models."""
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("tiny")
    assert client.is_model_ready("tiny", "1")
    assert not client.is_model_ready("none")
    assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
    metadata = client.get_model_metadata("tiny")
    assert [one["name"] for one in metadata["inputs"]] == ["input_ids", "attention_mask", "text", "text_pair"]
    config = client.get_model_config("tiny", "2")
    assert (config["name"], config["max_batch_size"]) == ("tiny", 8)
    assert {one["name"] for one in client.get_model_repository_index()} >= {"tiny", "plain"}
    refused(lambda: client.get_model_metadata("none"), "404", "no model 'none'")
    client.unload_model("plain")
    refused(lambda: client.get_model_metadata("plain"), "404")
    client.load_model("plain")
    assert client.is_model_ready("plain")
    refused(lambda: client.load_model("plain", config="{}"), "400", "parameters['config']")


def check_infer(client: triton.InferenceServerClient) -> None:
    """Check requests and answers in both forms."""
    answer = client.infer("tiny", tensors(), request_id="a", priority=1, timeout=5_000_000)
    hidden = answer.as_numpy("hidden")
    assert hidden.shape[:2] == (2, 4)
    assert not hidden[1, 3].any()
    assert answer.as_numpy("lengths").tolist() == [4, 3]
    assert answer.get_response()["id"] == "a"
    assert answer.get_response()["parameters"]["compute_ns"] > 0
    outputs = [triton.InferRequestedOutput("hidden", binary_data=False), triton.InferRequestedOutput("lengths")]
    for binary in (True, False):
        other = client.infer("tiny", tensors(binary=binary), outputs=outputs)
        assert other.as_numpy("hidden").tobytes() == hidden.tobytes()
        assert "data" in other.get_output("hidden")
        assert "data" not in other.get_output("lengths")
        found = client.infer("tiny", texts("the cat", "the cat sat", binary=binary), model_version="1")
        assert found.as_numpy("lengths").tolist() == [4, 5]
    weights = client.infer("tiny", tensors(), outputs=[triton.InferRequestedOutput("attention:1")])
    np.testing.assert_allclose(weights.as_numpy("attention:1")[0].sum(axis=-1), 1, atol=1e-5)
    links = [triton.InferRequestedOutput(f"attention:0:{part}") for part in ("query", "key", "weight")]
    found = client.infer("tiny", tensors(), outputs=links, parameters={"top_k": 3})
    assert found.as_numpy("attention:0:weight").shape == (2, 3)
    refused(lambda: client.infer("tiny", tensors(), sequence_id=4), "400", "sequence_id")
    classes = [triton.InferRequestedOutput("hidden", class_count=2)]
    refused(lambda: client.infer("tiny", tensors(), outputs=classes), "400", "classification")
    refused(lambda: client.infer("tiny", tensors(), request_compression_algorithm="gzip"), "415", "compressed")
    pending = [client.async_infer("tiny", tensors()) for _ in range(8)]
    assert all(one.get_result().as_numpy("hidden").shape == hidden.shape for one in pending)
    known = client.get_inference_statistics("tiny", "2")["model_stats"][0]
    assert known["inference_stats"]["success"]["count"] >= 4
    assert client.get_inference_statistics()["model_stats"]


async def check_asyncio(url: str) -> None:
    """Check calls with asyncio, whose bodies have other content types."""
    async with triton_aio.InferenceServerClient(url) as client:
        assert await client.is_server_ready()
        assert {one["name"] for one in await client.get_model_repository_index()} >= {"tiny", "plain"}
        for binary in (True, False):
            made = [client.infer("tiny", tensors(triton_aio, binary=binary)) for _ in range(20)]
            assert all(one.as_numpy("lengths").tolist() == [4, 3] for one in await asyncio.gather(*made))
        await client.unload_model("plain")
        assert not await client.is_model_ready("plain")
        await client.load_model("plain")
        assert await client.is_model_ready("plain")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rest", required=True)
    arguments, _ = parser.parse_known_args()
    url = f"127.0.0.1:{arguments.rest}"
    with triton.InferenceServerClient(url, concurrency=4) as client:
        check_models(client)
        check_infer(client)
    asyncio.run(check_asyncio(url))
    print("tritonclient: HTTP from threads and with asyncio, bytes and JSON")


if __name__ == "__main__":
    main()
