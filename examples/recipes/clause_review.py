"""List the links between the defined terms of a contract, clause by clause, and draw the strongest clause.

Defined terms are those that the contract introduces as `"Term" shall mean`. A file without any exits with a message; a
failed call raises an AttnserveError.
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from attnserve_client import AttentionMap, AttentionSelection, Client

SELECTION = AttentionSelection(layers=-1, heads="mean", unit="word", special_tokens="drop")
_TERM = re.compile(r'"([A-Z][\w ]*?)"(?: \(or "([A-Z]\w*)"\))?(?: form)? shall mean')
_CLAUSE = re.compile(r"^ *(\d+)\. [A-Z]")
_PART = re.compile(r"^ *\(([a-z])\) ")


@dataclass(frozen=True)
class Found:
    """A link from one defined term of a clause to another.

    Attributes:
        clause: Number of the clause, such as `4(b)`.
        paragraph: First line of its paragraph in the file.
        query: The term that looks, and its line in the file.
        key: The term that is looked at, and its line.
        weight: Its weight: a share of what the query takes from the words of the clause.
        times_even: The weight as a multiple of that of evenly spread attention.
    """

    clause: str
    paragraph: int
    query: tuple[str, int]
    key: tuple[str, int]
    weight: float
    times_even: float


def defined_terms(text: str) -> list[str]:
    """Return the defined terms, longest first, so that `Derivative Works` comes before `Work`."""
    terms = {name for pair in _TERM.findall(text) for name in pair if name}
    return sorted(terms, key=lambda term: (-len(term), term))


def clauses(text: str) -> list[tuple[str, int]]:
    """Return number and position of each paragraph; a paragraph without a number belongs to the clause before it."""
    found, number = [], ""
    for paragraph in re.finditer(r"(?:^.*\S.*\n?)+", text.partition("END OF TERMS")[0], re.MULTILINE):
        if clause := _CLAUSE.match(paragraph[0]):
            number = clause[1]
        lettered = _PART.match(paragraph[0])
        if number:
            found.append((f"{number}({lettered[1]})" if lettered else number, paragraph.start()))
    return found


def paragraph_at(text: str, start: int) -> str:
    """Return the paragraph that starts at a position."""
    match = re.match(r"(?:.*\S.*\n?)+", text[start:])
    assert match is not None
    return match[0]


def occurrences(paragraph: str, terms: list[str]) -> list[tuple[str, int, int]]:
    """Return each defined term in a paragraph with its positions; none lies in another."""
    pattern = re.compile("|".join(rf"\b{re.escape(term)}\b" for term in terms))
    return [(match[0], match.start(), match.end()) for match in pattern.finditer(paragraph)]


def links_of(
    clause: str, first_line: int, paragraph: str, terms: list[str], attention: AttentionMap
) -> tuple[list[Found], float]:
    """Return the links between different terms, and how the other links compare: their median, as times even."""
    places = occurrences(paragraph, terms)
    spans = [(start, end) for _, start, end in places]
    weights = attention.over_spans(spans)
    even = 1 / len(attention.key_tokens)
    lines = [first_line + paragraph.count("\n", 0, start) for _, start, _ in places]
    found = []
    for row, (query, *_) in enumerate(places):
        for column, (key, start, end) in enumerate(places):
            if query != key:
                words = sum(start < token.end and token.start < end for token in attention.key_tokens)
                times = float(weights[row, column]) / (even * words)
                found.append(
                    Found(
                        clause,
                        first_line,
                        (query, lines[row]),
                        (key, lines[column]),
                        float(weights[row, column]),
                        times,
                    )
                )
    words = [place for place, token in enumerate(attention.key_tokens) if any(map(str.isalnum, token.text))]
    between = attention.head_weights()[np.ix_(words, words)]
    others = between[~np.eye(len(words), dtype=bool)] / even
    return found, float(np.median(others))


def main(server: str, model: str, file: Path, top: int, output: Path | None) -> list[Found]:
    """Print the strongest links between defined terms, and return all of them, strongest first."""
    text = file.read_text(encoding="utf-8")
    terms = defined_terms(text)
    if not terms:
        sys.exit(f'{file} has no defined terms: nothing of the form "Term" shall mean')
    found: list[Found] = []
    maps: dict[int, AttentionMap] = {}
    medians = []
    with Client(server) as client:
        for clause, start in clauses(text):
            paragraph = paragraph_at(text, start)
            if len({term for term, *_ in occurrences(paragraph, terms)}) < 2:
                continue
            line = text.count("\n", 0, start) + 1
            (attention,) = client.infer(model, paragraph, outputs=[], attention=SELECTION).attention
            links, median = links_of(clause, line, paragraph, terms, attention)
            found += links
            medians.append(median)
            maps[line] = attention
    found.sort(key=lambda link: -link.times_even)
    print(f"{len(terms)} defined terms: {', '.join(terms)}")
    print(f"{'clause':7} {'term':25} {'looks at':25} {'weight':>6} {'times even':>10}")
    for link in found[:top]:
        query, key = (f"{term}, line {line}" for term, line in (link.query, link.key))
        print(f"{link.clause:7} {query:25} {key:25} {link.weight:6.3f} {link.times_even:10.1f}")
    print(
        f"median: {np.median([link.times_even for link in found]):.2f} times even between terms, "
        f"{np.median(medians):.2f} between other words"
    )
    if output is not None:
        output.write_text(maps[found[0].paragraph].to_svg("arcs"), encoding="utf-8")
        print(f"drew the paragraph of line {found[0].paragraph} into {output}")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="the contract, as plain text")
    parser.add_argument("--server", default="localhost:8001")
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--top", type=int, default=10, help="how many links to print")
    parser.add_argument("--output", type=Path, help="draw the clause of the strongest link into this SVG file")
    main(**vars(parser.parse_args()))
