"""A rerank request as text-embeddings-inference's own examples send it, without any client library."""

from __future__ import annotations

import argparse
import json
import urllib.error
import urllib.request


def main() -> None:
    """Check all of it. Raises AssertionError."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rest", type=int, required=True)
    address = f"http://127.0.0.1:{parser.parse_known_args()[0].rest}/rerank"
    texts = ["the cat sat on a mat", "a dog looked", "the mat"]
    status, ranks = post(address, {"query": "the cat", "texts": texts, "raw_scores": False})
    assert status == 200
    assert sorted(one["index"] for one in ranks) == [0, 1, 2]
    assert ranks == sorted(ranks, key=lambda one: -one["score"])
    status, refused = post(address, {"query": "the cat", "texts": []})
    assert (status, refused["error_type"]) == (400, "validation"), refused
    print("tei: rerank, and its error")


def post(address: str, body: object) -> tuple[int, list | dict]:
    """Send JSON; return the status and the answer."""
    request = urllib.request.Request(address, json.dumps(body).encode(), {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


main()
