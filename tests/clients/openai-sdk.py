"""OpenAI's Python client, sync and async, without any setting but the address: embeddings, models, errors."""

from __future__ import annotations

import argparse
import asyncio
import base64
import struct

import openai

TEXTS = ["the cat sat on a mat", "a dog looked", "the mat"]


def main() -> None:
    """Check all of it. Raises AssertionError."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rest", type=int, required=True)
    address = f"http://127.0.0.1:{parser.parse_known_args()[0].rest}/v1"
    client = openai.OpenAI(base_url=address, api_key="none", max_retries=0)
    answer = client.embeddings.create(model="tiny", input=TEXTS)  # base64, which the client decodes
    assert [one.index for one in answer.data] == [0, 1, 2]
    assert {len(one.embedding) for one in answer.data} == {8}
    assert answer.usage.prompt_tokens == sum(len(text.split()) + 2 for text in TEXTS)
    numbers = client.embeddings.create(model="tiny", input=TEXTS[0], encoding_format="float").data[0].embedding
    sent = client.embeddings.create(model="tiny", input=TEXTS[0], encoding_format="base64").data[0].embedding
    assert list(struct.unpack("<8f", base64.b64decode(sent))) == numbers  # type: ignore[arg-type]
    assert len(client.embeddings.create(model="tiny", input=["the cat"] * 2048).data) == 2048
    assert {one.id for one in client.models.list()} >= {"tiny", "plain"}
    assert client.models.retrieve("tiny").id == "tiny"
    for wrong, kind in (
        ({"model": "none", "input": "a"}, openai.NotFoundError),
        ({"model": "tiny", "input": [1, 2]}, openai.BadRequestError),
        ({"model": "tiny", "input": "a", "dimensions": 3}, openai.BadRequestError),
    ):
        try:
            client.embeddings.create(**wrong)  # type: ignore[arg-type]
        except kind as error:
            assert error.code, error
            assert error.request_id, error
        else:
            raise AssertionError(wrong)
    asyncio.run(together(address))
    print("openai: embeddings in both encodings, 2,048 inputs, models, errors, async")


async def together(address: str) -> None:
    """Call many at a time. Raises AssertionError."""
    async with openai.AsyncOpenAI(base_url=address, api_key="none") as client:
        calls = [client.embeddings.create(model="tiny", input=TEXTS) for _ in range(32)]
        assert {len(one.data) for one in await asyncio.gather(*calls)} == {3}


main()
