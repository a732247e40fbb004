"""Compare two versions of a model on the same texts: which heads attend otherwise, and by how much outputs move.

Attention is compared by its features, a few numbers for each row, so that all heads of a text come back in kilobytes.
Exits with 1 if a head moves by more than `--limit` standard deviations; a failed call raises an AttnserveError.
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from attnserve_client import AttentionSelection, Client

FEATURES = ("entropy", "top1_share", "first_token", "mean_distance")
SELECTION = AttentionSelection(features=FEATURES)
RESAMPLES = 1000


@dataclass(frozen=True)
class Shift:
    """How one feature of one head moves from the first version to the second.

    Attributes:
        layer: Position of the site.
        head: Number of the head.
        feature: Name of the feature.
        before: Its mean over the texts in the first version.
        after: In the second.
        size: The mean change in standard deviations over the texts of the first version.
        low: The 2.5th percentile of `size` over resamples of the texts.
        high: The 97.5th percentile.
    """

    layer: int
    head: int
    feature: str
    before: float
    after: float
    size: float
    low: float
    high: float


def sentences(text: str) -> list[str]:
    """Return the sentences of a text that have at least five words."""
    flat = " ".join(text.split())
    return [part for part in re.split(r"(?<=[.;:])\s+", flat) if len(part.split()) >= 5]


@dataclass(frozen=True)
class Answers:
    """What one version answers.

    Attributes:
        features: float64 (texts, sites, heads, 4); NaN for a head that a site does not have.
        outputs: The embedding of each text, or else its first output, as a vector.
        layers: Positions of the sites.
        heads: Numbers of the heads.
    """

    features: npt.NDArray[np.float64]
    outputs: list[npt.NDArray[np.float64]]
    layers: list[int]
    heads: list[int]


def answers(client: Client, model: str, version: str, texts: list[str]) -> Answers:
    """Run the texts through one version."""
    names = [spec.name for spec in client.model(model, version).outputs]
    output = "embedding" if "embedding" in names else names[0]
    results = [client.infer(model, text, version=version, outputs=[output], attention=SELECTION) for text in texts]
    of_texts = [result.features for result in results if result.features is not None]
    return Answers(
        np.stack([np.stack([each.by_head(name) for name in FEATURES], axis=-1) for each in of_texts]).astype(
            np.float64
        ),
        [result.outputs[output].astype(np.float64).ravel() for result in results],
        [site.layer for site in of_texts[0].sites],
        list(of_texts[0].heads),
    )


def shifts(before: Answers, after: Answers, seed: int = 0) -> list[Shift]:
    """Return how every feature of every head moves, the greatest first.

    Raises:
        ValueError: The versions have other sites or heads.
    """
    if before.features.shape != after.features.shape:
        shapes = f"{before.features.shape[1:3]} and {after.features.shape[1:3]}"
        raise ValueError(f"the versions have {shapes} sites and heads; they cannot be compared by head")
    change = after.features - before.features
    spread = before.features.std(axis=0)
    spread[spread == 0] = 1.0  # a feature that is the same for all texts: its change is left as it is
    texts = len(change)
    generator = np.random.default_rng(seed)
    drawn = np.stack([change[generator.integers(texts, size=texts)].mean(axis=0) for _ in range(RESAMPLES)])
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0) / spread
    size = change.mean(axis=0) / spread
    found = [
        Shift(
            before.layers[site],
            before.heads[head],
            FEATURES[feature],
            float(before.features[:, site, head, feature].mean()),
            float(after.features[:, site, head, feature].mean()),
            float(size[site, head, feature]),
            float(low[site, head, feature]),
            float(high[site, head, feature]),
        )
        for site, head, feature in np.argwhere(~np.isnan(size)).tolist()
    ]
    return sorted(found, key=lambda shift: -abs(shift.size))


def cosines(before: Answers, after: Answers) -> list[float]:
    """Return the cosine of both outputs of each text whose outputs have the same size."""
    pairs = [(one, other) for one, other in zip(before.outputs, after.outputs, strict=True) if one.size == other.size]
    return [float(one @ other / (np.linalg.norm(one) * np.linalg.norm(other))) for one, other in pairs]


def main(server: str, model: str, versions: tuple[str, str], file: Path, top: int) -> tuple[list[Shift], list[float]]:
    """Print the heads that move most, and how far the outputs move; return both."""
    texts = sentences(file.read_text(encoding="utf-8"))
    with Client(server) as client:
        before, after = (answers(client, model, version, texts) for version in versions)
    found, alike = shifts(before, after), cosines(before, after)
    print(f"{len(texts)} texts, {len(found)} features of heads; sizes are in standard deviations over the texts")
    print(
        f"{'layer':>5} {'head':>4} {'feature':14} {versions[0]:>8} {versions[1]:>8} {'size':>7} {'95 % interval':>18}"
    )
    for each in found[:top]:
        interval = f"{each.low:.3f} to {each.high:.3f}"
        numbers = f"{each.before:8.3f} {each.after:8.3f} {each.size:7.3f} {interval:>18}"
        print(f"{each.layer:5} {each.head:4} {each.feature:14} {numbers}")
    if alike:
        print(f"cosine of the outputs: mean {np.mean(alike):.5f}, least {min(alike):.5f}")
    return found, alike


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs=2, metavar="VERSION", help="the version before, and the one after")
    parser.add_argument("--server", default="localhost:8001")
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--file", type=Path, default=Path(__file__).parents[2] / "LICENSE", help="the texts")
    parser.add_argument("--top", type=int, default=8, help="how many features to print")
    parser.add_argument("--limit", type=float, default=0.5, help="standard deviations beyond which it exits with 1")
    given = parser.parse_args()
    moved, _ = main(given.server, given.model, tuple(given.versions), given.file, given.top)
    sys.exit(1 if moved and abs(moved[0].size) > given.limit else 0)
