"""Cohere's Python client, versions 1 and 2 of its API: rerank."""

from __future__ import annotations

import argparse

import cohere

DOCUMENTS = ["the cat sat on a mat", "a dog looked", "the mat"]


def main() -> None:
    """Check all of it. Raises AssertionError."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rest", type=int, required=True)
    address = f"http://127.0.0.1:{parser.parse_known_args()[0].rest}"
    orders = []
    for client in (cohere.Client("none", base_url=address), cohere.ClientV2("none", base_url=address)):
        answer = client.rerank(model="ranker", query="the cat", documents=DOCUMENTS, top_n=2)
        assert len(answer.results) == 2
        scores = [one.relevance_score for one in answer.results]
        assert 0 <= scores[1] <= scores[0] <= 1, scores
        orders.append([one.index for one in answer.results])
        try:
            client.rerank(model="tiny", query="the cat", documents=DOCUMENTS)
        except cohere.BadRequestError as error:
            assert "ranker" in str(error.body), error
        else:
            raise AssertionError("a model that cannot rank")
    assert orders[0] == orders[1]
    print("cohere: rerank of versions 1 and 2, and its error")


main()
