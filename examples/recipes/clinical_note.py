"""Show which drugs of a clinical note its symptoms look at, and whether the name of the drug matters for that.

The note is invented. For each symptom and drug it prints the weight, its rank among all words of the note, and the
weight after the drug's name is replaced by a word that names nothing: what remains does not come from the name. A
failed call raises an AttnserveError.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

from attnserve_client import AttentionMap, AttentionSelection, Client

NOTE = (
    "Patient takes metformin for diabetes and has no complaints about it. "
    "Lisinopril was started last month for hypertension. "
    "Since then there is a dry cough at night and occasional dizziness on standing. "
    "Ibuprofen was taken for knee pain for two weeks, with some nausea. "
    "No chest pain, no fever."
)
DRUGS = ("metformin", "lisinopril", "ibuprofen")
SYMPTOMS = ("cough", "dizziness", "nausea", "fever", "pain")
REPLACEMENT = "something"
SELECTION = AttentionSelection(layers=-1, heads="mean", unit="word", special_tokens="drop")


@dataclass(frozen=True)
class Pair:
    """How one symptom looks at one drug.

    Attributes:
        symptom: The symptom.
        drug: The drug.
        weight: Share of what the symptom takes from the words of the note.
        rank: Place of the drug among the other words of the note, from 1.
        without_name: The weight of the same place after the drug's name is replaced.
    """

    symptom: str
    drug: str
    weight: float
    rank: int
    without_name: float


def place_of(text: str, word: str) -> tuple[int, int] | None:
    """Return the positions of a word's first occurrence; None if the text does not have it."""
    match = re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE)
    return None if match is None else match.span()


def rank_of(attention: AttentionMap, symptom: tuple[int, int], weight: float) -> int:
    """Return the rank of a weight among all words of the row of a symptom, without itself and punctuation."""
    words = [
        (token.start, token.end)
        for token in attention.key_tokens
        if any(map(str.isalnum, token.text)) and token.start != symptom[0]
    ]
    others = attention.over_spans([symptom], words)[0]
    return 1 + int((others > weight).sum())


def main(server: str, model: str, note: str, drugs: list[str], symptoms: list[str]) -> list[Pair]:
    """Print a line for each pair, strongest first, and whether the map is a guide to the output; return the pairs."""
    pairs: list[Pair] = []
    with Client(server) as client:
        (attention,) = client.infer(model, note, outputs=[], attention=SELECTION).attention
        for drug in drugs:
            named = place_of(note, drug)
            if named is None:
                continue
            changed = note[: named[0]] + REPLACEMENT + note[named[1] :]
            (control,) = client.infer(model, changed, outputs=[], attention=SELECTION).attention
            for symptom in symptoms:
                place, moved = place_of(note, symptom), place_of(changed, symptom)
                if place is None or moved is None:
                    continue
                weight = float(attention.over_spans([place], [named])[0, 0])
                replaced = (named[0], named[0] + len(REPLACEMENT))
                without = float(control.over_spans([moved], [replaced])[0, 0])
                pairs.append(Pair(symptom, drug, weight, rank_of(attention, place, weight), without))
        found = client.faithfulness(model, note)
    pairs.sort(key=lambda pair: -pair.weight)
    print(f"{'symptom':12} {'drug':12} {'weight':>6} {'rank':>5} {'with the name replaced':>23}")
    for pair in pairs:
        print(f"{pair.symptom:12} {pair.drug:12} {pair.weight:6.3f} {pair.rank:5} {pair.without_name:23.3f}")
    gain = found.comprehensiveness_gain
    verdict = "a guide" if gain.low > 0 else "no guide"
    print(
        f"this map is {verdict} to what the output depends on: leaving its strongest words out lowers the "
        f"{found.measure} by {gain.mean:.3f} ({gain.low:.3f} to {gain.high:.3f}) more than random words"
    )
    return pairs


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", default="localhost:8001")
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--file", type=Path, help="a note as plain text, in place of the invented one")
    parser.add_argument("--drugs", nargs="+", default=list(DRUGS))
    parser.add_argument("--symptoms", nargs="+", default=list(SYMPTOMS))
    given = parser.parse_args()
    text = NOTE if given.file is None else given.file.read_text(encoding="utf-8")
    main(given.server, given.model, text, given.drugs, given.symptoms)
