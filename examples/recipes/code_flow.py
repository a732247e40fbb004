"""Show whether the uses of variables in a Python function look at the places that set them, by line.

The head that does this best is chosen on the other functions of the file, and judged on the named one. A file without
such functions exits with a message; a failed call raises an AttnserveError.
"""

from __future__ import annotations

import argparse
import ast
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from attnserve_client import AttentionMap, AttentionSelection, Client, InvalidRequest

ALL_HEADS = AttentionSelection(unit="word", special_tokens="drop", dtype="float16")
LEAST_USES = 4


@dataclass(frozen=True)
class Name:
    """A variable at one place of a function: its text, its positions in the function's source, its line in the file."""

    text: str
    start: int
    end: int
    line: int
    sets: bool


@dataclass(frozen=True)
class Flow:
    """A use of a variable, the place that last set it before, and what the use looks at.

    Attributes:
        use: The use.
        setter: The place that sets it, above the use or before it on its line.
        weight: Weight of the setter in the row of the use.
        others: Mean weight of the other variables before the use.
        first: Whether no other variable before the use has a greater weight.
    """

    use: Name
    setter: Name
    weight: float
    others: float
    first: bool


def functions(source: str) -> dict[str, tuple[str, list[Name]]]:
    """Return the source of each function with its variables, in the order of the source."""
    lines = source.splitlines(keepends=True)
    found = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            text = "".join(lines[node.lineno - 1 : node.end_lineno])
            found[node.name] = (text, _names(node, lines))
    return found


def _names(function: ast.FunctionDef, lines: list[str]) -> list[Name]:
    first = function.lineno - 1
    before = [0]
    for line in lines[first : function.end_lineno]:
        before.append(before[-1] + len(line))
    names = []
    for node in ast.walk(function):
        if isinstance(node, ast.arg | ast.Name):
            text = node.arg if isinstance(node, ast.arg) else node.id
            line = lines[node.lineno - 1].encode()
            column = len(line[: node.col_offset].decode())  # ast counts bytes, tokens count letters
            start = before[node.lineno - 1 - first] + column
            sets = isinstance(node, ast.arg) or isinstance(node.ctx, ast.Store)
            names.append(Name(text, start, start + len(text), node.lineno, sets))
    local = {name.text for name in names if name.sets}
    return sorted((name for name in names if name.text in local), key=lambda name: name.start)


def flows(names: list[Name], weights: npt.NDArray[np.float32]) -> list[Flow]:
    """Return the uses with their setters.

    Args:
        names: The N variables.
        weights: Weights between them, (N, N).
    """
    found = []
    for row, use in enumerate(names):
        setters = [place for place in range(row) if names[place].sets and names[place].text == use.text]
        others = [place for place in range(row) if names[place].text != use.text]
        if use.sets or not setters or not others:
            continue
        weight, rest = float(weights[row, setters[-1]]), weights[row, others]
        found.append(Flow(use, names[setters[-1]], weight, float(rest.mean()), bool(weight >= rest.max())))
    return found


def share(found: list[Flow]) -> float:
    """Return the share of uses that look more at their setter than at any other variable."""
    return sum(flow.first for flow in found) / len(found)


def by_head(maps: list[AttentionMap], names: list[Name]) -> dict[tuple[int, int], list[Flow]]:
    """Return the flows of each head, by layer and head."""
    spans = [(name.start, name.end) for name in names]
    return {(each.layer, head): flows(names, each.over_spans(spans, head=head)) for each in maps for head in each.heads}


def main(server: str, model: str, file: Path, function: str) -> tuple[list[Flow], float]:
    """Print the flows of the function by the chosen head; return them, and the mean share of all heads."""
    source = functions(file.read_text(encoding="utf-8"))
    if function not in source:
        sys.exit(f"{file} has no function {function!r}; it has {', '.join(source)}")
    judged: dict[str, dict[tuple[int, int], list[Flow]]] = {}
    with Client(server) as client:
        for name, (text, names) in source.items():
            if sum(not each.sets for each in names) >= LEAST_USES:
                try:
                    maps = client.infer(model, text, outputs=[], attention=ALL_HEADS).attention
                except InvalidRequest as error:  # it is longer than the model takes
                    if name == function:
                        raise
                    print(f"{name} is left out: {error.violations[0].description}")
                    continue
                judged[name] = by_head(maps, names)
    measured = judged.pop(function, {})
    learned = {head: [flow for each in judged.values() for flow in each[head]] for head in measured}
    if not any(learned.values()) or not any(measured.values()):
        sys.exit(f"{file} needs {function!r} and another function with at least {LEAST_USES} uses of variables")
    layer, head = max(learned, key=lambda place: share(learned[place]))
    found = measured[layer, head]
    everywhere = float(np.mean([share(each) for each in measured.values()]))
    print(f"layer {layer}, head {head}: chosen on {', '.join(judged)}")
    print(f"{'use':24} {'set':>8} {'weight':>7} {'others':>7}")
    for flow in found:
        mark = "" if flow.first else "  another variable has more"
        use = f"{flow.use.text}, line {flow.use.line}"
        print(f"{use:24} {f'line {flow.setter.line}':>8} {flow.weight:7.3f} {flow.others:7.3f}{mark}")
    print(
        f"the setter is first in {share(found):.0%} of {len(found)} uses; in {everywhere:.0%} by the mean of all heads"
    )
    return found, everywhere


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="a Python file")
    parser.add_argument("function", help="the function to show")
    parser.add_argument("--server", default="localhost:8001")
    parser.add_argument("--model", default="minilm")
    main(**vars(parser.parse_args()))
