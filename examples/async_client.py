"""Send several texts at once with asyncio, and print in which batch each ran.

The model must take text and have the output `embedding`; a failed call raises an AttnserveError.
"""

import argparse
import asyncio

from attnserve_client import AsyncClient

TEXTS = ("The cat sat on a mat.", "The dog looked at the cat.", "A dog and a cat.")


async def main(server: str, model: str) -> None:
    """Run all texts concurrently over one connection; the server batches them."""
    async with AsyncClient(server) as client:
        results = await asyncio.gather(*(client.infer(model, text, outputs=["embedding"]) for text in TEXTS))
    for text, result in zip(TEXTS, results, strict=True):
        dimensions = len(result.outputs["embedding"])
        print(f"{text}  {dimensions} dimensions, in a batch of {result.run.batch_size}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--server", default="localhost:8001")
    parser.add_argument("--model", default="minilm")
    asyncio.run(main(**vars(parser.parse_args())))
