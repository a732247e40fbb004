"""Thousands of generated graphs against the proof: `make fuzz-batching`; `FUZZ_GRAPHS` and `FUZZ_SEED` choose which.

The Makefile passes them as `--graphs` and `--seed`. Prints progress, verdicts by piece and by poison, and for each
failure the seed that repeats it. Exit code 1 where a mixed clause is proved, the proof raises, a clause is missing or
lacks its reason, or a truth of the grammar does not hold.

The proof is the conversion's judgement, for the batch and each axis, of whether other rows or padding can change an
answer; a clause is its part on one of them. A piece is a part of a generated graph. A poison is a piece that lets
padding or other rows change the answer, so that a clause is mixed. The grammar states such truths of each graph.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter

from mixing_graphs import mixing_graph
from mixing_judge import Judgement, Summary, judged
from mixing_values import UNSAID
from mixing_witness import CLEAR, EXTREME, HOLES, USUAL, Witness, satisfying
from rich.console import Console
from rich.progress import track
from rich.table import Table

VERDICTS = ("proved", "refuted", "unknown", "raised", "missing")


def untrue(seed: int) -> list[str]:
    """Return the truths of a graph that a run contradicts."""
    graph = mixing_graph(seed)
    witness, found = Witness(graph), []
    for axis in graph.axes:
        if not graph.poison(axis):
            worst = witness.worst(axis, satisfying(graph.needs), 2)
            found += [f"{axis}: {name} differs by {value:.3g}" for name, value in worst.items() if value > CLEAR]
        elif graph.poison(axis) != UNSAID:
            worst = witness.worst(axis, USUAL + HOLES + EXTREME, 6, enough=CLEAR)
            mixed = [name for name, truth in graph.truths.items() if truth[axis] not in {"", UNSAID}]
            found += [f"{axis}: {name} must be mixed, but no run shows it" for name in mixed if worst[name] < CLEAR]
    return found


def table_of(title: str, counts: dict[str, Counter[str]]) -> Table:
    """Counts of verdicts, a row for each key."""
    table = Table("", *VERDICTS, title=title)
    for key in sorted(counts):
        table.add_row(key, *(str(counts[key][verdict] or "") for verdict in VERDICTS))
    return table


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--graphs", type=int, default=3000, help="how many")
    parser.add_argument("--seed", type=int, default=100_000, help="of the first; the others follow by one")
    parser.add_argument("--witness", type=int, default=10, help="run one graph of so many to check its truth; 0: none")
    options = parser.parse_args()
    console = Console()
    seeds = range(options.seed, options.seed + options.graphs)
    judgements: list[Judgement] = []
    wrong: list[tuple[int, str]] = []
    for seed in track(seeds, description="graphs", console=console):
        found = judged(mixing_graph(seed))
        judgements += found
        wrong += [(seed, f"{each.axis}: {each.fault}") for each in found if each.fault]
        if options.witness and seed % options.witness == 0:
            wrong += [(seed, f"the grammar is wrong: {what}") for what in untrue(seed)]
    summary = Summary(tuple(judgements))
    console.print(table_of("mixed clauses by poison", summary.by_poison()))
    console.print(table_of("unmixed clauses by piece", summary.by_piece()))
    for seed, what in wrong:
        console.print(f"seed {seed}: {what}", markup=False)
        console.print(f"  repeat: FUZZ_GRAPHS=1 FUZZ_SEED={seed} make fuzz-batching", markup=False)
    console.print(
        f"{len(wrong)} failures of {options.graphs} graphs; {summary.proved_share:.1%} of unmixed clauses proved"
    )
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
