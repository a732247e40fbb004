"""Search the paragraphs of a text with sparse vectors made of one row of attention, as BM42 does, and with BM25.

The vector of a paragraph has a value for each of its words: the weight that `[CLS]` gives it in the last layer, as the
mean over the heads. The score of a query is the sum of value times inverse document frequency over its words. Source:
Vasnetsov 2024, "BM42: New Baseline for Hybrid Search", an article of Qdrant. A failed call raises an AttnserveError.
"""

from __future__ import annotations

import argparse
import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from attnserve_client import AttentionSelection, Client

CLS_ROW = AttentionSelection(layers=-1, heads="mean", unit="word", queries=[0])
_STOP = (
    "a an and any are as at be by for from has have if in is it its no not of on or such that the their then there "
    "this to was with"
)
STOP_WORDS = frozenset(re.findall(r"\w+", _STOP))
QUERIES = {
    "patent litigation terminates licenses": "3. Grant of Patent License",
    "use of trade names and trademarks": "6. Trademarks",
    "goodwill damages computer failure": "8. Limitation of Liability",
    "warranties of merchantability": "7. Disclaimer of Warranty",
    "charge a fee for support": "9. Accepting Warranty",
    "notice file attribution": '(d) If the Work includes a "NOTICE"',
    "who owns fifty percent of the shares": '"Legal Entity" shall mean',
    "mailing lists and issue tracking": '"Contribution" shall mean',
}
"""Queries of LICENSE, each with a part of the paragraph that answers it."""


@dataclass(frozen=True)
class Answer:
    """Where the paragraph that answers a query is in the results; 1 is the best.

    Attributes:
        query: The query.
        bm42: Its rank by attention.
        bm25: Its rank by term frequency.
    """

    query: str
    bm42: int
    bm25: int


def paragraphs(text: str) -> list[str]:
    """Return the paragraphs of a text that have at least five words."""
    return [part for part in re.split(r"\n\s*\n", text) if len(part.split()) >= 5]


def words_of(text: str) -> list[str]:
    """Return the words of a text, in lower case, without stop words."""
    return [word for word in re.findall(r"\w+", text.lower()) if word not in STOP_WORDS]


def sparse_vectors(client: Client, model: str, documents: list[str]) -> list[dict[str, float]]:
    """Return the vector of each document: a word that repeats has its greatest weight."""
    vectors = []
    for document in documents:
        (row,) = client.infer(model, document, outputs=[], attention=CLS_ROW).attention
        vector: dict[str, float] = {}
        for token, weight in zip(row.key_tokens, row.weights[0, 0].tolist(), strict=True):
            for word in () if token.special else words_of(token.text):
                vector[word] = max(vector.get(word, 0.0), weight)
        vectors.append(vector)
    return vectors


def idf(word: str, documents: list[set[str]]) -> float:
    """Return the inverse document frequency of a word. Source: Robertson and Zaragoza 2009, section 3.1; plus 1."""
    count = sum(word in document for document in documents)
    return math.log((len(documents) - count + 0.5) / (count + 0.5) + 1)


def bm25_vectors(documents: list[str], k1: float = 1.2, b: float = 0.75) -> list[dict[str, float]]:
    """Return vectors of saturated term frequencies. Source: Robertson and Zaragoza 2009, section 3.4."""
    counted = [Counter(words_of(document)) for document in documents]
    mean = sum(each.total() for each in counted) / len(counted)
    return [
        {word: count * (k1 + 1) / (count + k1 * (1 - b + b * each.total() / mean)) for word, count in each.items()}
        for each in counted
    ]


def ranked(query: str, vectors: list[dict[str, float]]) -> list[int]:
    """Return the places of the documents, best first; equal scores in their order."""
    known = [set(vector) for vector in vectors]
    factors = {word: idf(word, known) for word in set(words_of(query))}
    scores = [sum(factor * vector.get(word, 0.0) for word, factor in factors.items()) for vector in vectors]
    return sorted(range(len(vectors)), key=lambda place: -scores[place])


def main(server: str, model: str, file: Path, queries: dict[str, str]) -> list[Answer]:
    """Print the rank of each query's paragraph by both methods, and return them."""
    documents = paragraphs(file.read_text(encoding="utf-8"))
    with Client(server) as client:
        by_attention = sparse_vectors(client, model, documents)
        (whole,) = client.infer(model, documents[1], outputs=[], attention=AttentionSelection(layers=-1)).attention
        (row,) = client.infer(model, documents[1], outputs=[], attention=CLS_ROW).attention
    by_frequency = bm25_vectors(documents)
    answers = []
    for query, part in queries.items():
        right = next(place for place, document in enumerate(documents) if part in document)
        places = [ranked(query, vectors).index(right) + 1 for vectors in (by_attention, by_frequency)]
        answers.append(Answer(query, *places))
    print(f"{len(documents)} paragraphs; a row is {row.raw.nbytes} bytes, a whole layer {whole.raw.nbytes}")
    print("heaviest words of the first paragraphs:")
    for vector in by_attention[1:4]:
        print("  ", ", ".join(f"{word} {vector[word]:.3f}" for word in sorted(vector, key=lambda w: -vector[w])[:6]))
    print(f"{'query':40} {'BM42':>5} {'BM25':>5}")
    for answer in answers:
        print(f"{answer.query:40} {answer.bm42:5} {answer.bm25:5}")
    for name in ("bm42", "bm25"):
        print(f"mean reciprocal rank, {name}: {sum(1 / getattr(each, name) for each in answers) / len(answers):.3f}")
    return answers


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", default="localhost:8001")
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--file", type=Path, default=Path(__file__).parents[2] / "LICENSE", help="the text to search")
    main(**vars(parser.parse_args()), queries=QUERIES)
