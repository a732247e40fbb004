"""Draws the pictures of attention.md from real runs: a server over all-MiniLM-L6-v2, asked by the client.

python docs/pictures.py --repository .demo/models
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from attnserve_client import Attention, AttentionMap, Client
from matplotlib.axes import Axes
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))
from examples.demo import SENTENCES, running_server

IMAGES = Path(__file__).parent / "images"
COLOURS = "magma_r"


def _panel(axes: Axes, weights: np.ndarray, title: str, labels: Sequence[str] = ()) -> None:
    """One heat map; its colours run from 0 to its own greatest weight, since maps differ in scale."""
    axes.imshow(weights, cmap=COLOURS, vmin=0.0, interpolation="nearest", aspect="auto")
    axes.set_title(title, fontsize=9)
    axes.set_xticks([])
    axes.set_yticks(range(len(labels)), labels=labels, fontsize=7)
    axes.tick_params(length=0)


def _words(attention: AttentionMap) -> list[str]:
    return [token.text for token in attention.query_tokens]


def heads(client: Client, text: str) -> Figure:
    """All heads of one layer, then their mean and their maximum."""
    ask = {"layers": [1], "unit": "word"}
    each = client.infer("minilm", text, attention=Attention(**ask)).attention[0]
    mean = client.infer("minilm", text, attention=Attention(**ask, head_reduction="mean")).attention[0]
    greatest = client.infer("minilm", text, attention=Attention(**ask, head_reduction="max")).attention[0]
    drawn = Figure(figsize=(11, 5.2), layout="constrained")
    panels = drawn.subplots(2, 7)
    numbered = [(f"head {head}", each.weights[head]) for head in range(len(each.heads))]
    shown = [*numbered[:6], ("mean", mean.weights[0]), *numbered[6:], ("max", greatest.weights[0])]
    for place, (title, weights) in enumerate(shown):
        _panel(panels.flat[place], weights, title, _words(each) if place % 7 == 0 else ())
    return drawn


def layers(client: Client, text: str) -> Figure:
    """Each layer's mean over heads, then the mean over layers and rollout through them."""
    ask = {"unit": "word", "special_tokens": "drop"}
    each = client.infer("minilm", text, attention=Attention(**ask, head_reduction="mean")).attention
    joined = [Attention(**ask, layer_reduction=how, head_reduction="mean") for how in ("mean", "rollout")]
    mean, rollout = (client.infer("minilm", text, attention=selection).attention[0] for selection in joined)
    drawn = Figure(figsize=(11, 5.2), layout="constrained")
    panels = drawn.subplots(2, 4)
    shown = [(f"layer {one.layer}", one) for one in each] + [("mean of layers", mean), ("rollout", rollout)]
    for place, (title, attention) in enumerate(shown):
        _panel(panels.flat[place], attention.weights[0], title, _words(attention) if place % 4 == 0 else ())
    return drawn


def main() -> None:
    """Serves, asks, draws."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repository", type=Path, required=True)
    repository = parser.parse_args().repository
    with running_server(repository) as (port, _), Client(f"localhost:{port}") as client:
        for name, draw, text in (("heads", heads, SENTENCES["contract"]), ("layers", layers, SENTENCES["contract"])):
            draw(client, text).savefig(IMAGES / f"{name}.png", dpi=110)
            print(f"docs/images/{name}.png")


if __name__ == "__main__":
    main()
