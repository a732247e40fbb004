"""Embed any number of texts over one stream, and find the two most similar ones.

The model must take text and have the output `embedding`. A stream that breaks raises an AttnserveError.
"""

import argparse

import numpy as np
from attnserve_client import Client

TEXTS = ("The cat sat on a mat.", "The cat sat on the mat.", "", "A dog looked at a cat.")


def main(server: str, model: str) -> None:
    """Stream the texts. An invalid text fails alone, and the stream continues."""
    embeddings: dict[int, np.ndarray] = {}
    with Client(server) as client:
        for answer in client.stream(model, TEXTS, outputs=["embedding"], ordered=False):
            if answer.error is not None:
                print(f"text {answer.index} failed: {answer.error}")
                continue
            embedding = answer.result.outputs["embedding"]
            embeddings[answer.index] = embedding / np.linalg.norm(embedding)
    pairs = [(one, other) for one in embeddings for other in embeddings if one < other]
    best = max(pairs, key=lambda pair: float(embeddings[pair[0]] @ embeddings[pair[1]]))
    print(f"most similar: {TEXTS[best[0]]!r} and {TEXTS[best[1]]!r}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--server", default="localhost:8001")
    parser.add_argument("--model", default="minilm")
    main(**vars(parser.parse_args()))
