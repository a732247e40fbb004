"""Draw the pictures of explanation/attention.md and how-to/draw-attention.md, from responses of a server.

Exits with a message if a server does not start; a missing model raises the client's ModelNotFound. Needs MiniLM as
`minilm`, matplotlib, and the zoo: this project's small models, one for each pattern of attention, which these commands
export.

for name in self causal cross sliding-window top-k linear multi-scale cross-modal; do attnserve-server export zoo:$name
--name $name --repository .demo/zoo done python docs/pictures.py --repository .demo/models --zoo .demo/zoo
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from attnserve_client import AttentionMap, AttentionSelection, Client
from matplotlib.axes import Axes
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))
from examples.demo import SENTENCES, running_server

IMAGES = Path(__file__).parent / "images"
SHORT = "The buyer agrees to assume all liabilities."
COLOURS = "magma_r"
OUTSIDE = "#d9dce1"
"""The colour of keys outside a query's window, as in the client's own pictures."""
CROSS_SITE = "decoder.0.cross_attention"


def _panel(axes: Axes, weights: np.ndarray, title: str, labels: Sequence[str] = ()) -> None:
    """Draw a heat map. Its colours run from 0 to its own greatest weight, because maps differ in scale."""
    axes.imshow(weights, cmap=COLOURS, vmin=0.0, interpolation="nearest", aspect="auto")
    axes.set_facecolor(OUTSIDE)
    axes.set_title(title, fontsize=9)
    axes.set_xticks([])
    axes.set_yticks(range(len(labels)), labels=labels, fontsize=7)
    axes.tick_params(length=0)


def _words(attention: AttentionMap) -> list[str]:
    return [token.text for token in attention.query_tokens]


def heads(client: Client, text: str) -> Figure:
    """Draw all heads of one layer, then their mean and their maximum."""
    common = {"layers": [1], "unit": "word"}
    each = client.infer("minilm", text, attention=AttentionSelection(**common)).attention[0]
    mean = client.infer("minilm", text, attention=AttentionSelection(**common, head_reduction="mean")).attention[0]
    greatest = client.infer("minilm", text, attention=AttentionSelection(**common, head_reduction="max")).attention[0]
    drawn = Figure(figsize=(11, 5.2), layout="constrained")
    panels = drawn.subplots(2, 7)
    numbered = [(f"head {head}", each.weights[head]) for head in range(len(each.heads))]
    shown = [*numbered[:6], ("mean", mean.weights[0]), *numbered[6:], ("max", greatest.weights[0])]
    for place, (title, weights) in enumerate(shown):
        _panel(panels.flat[place], weights, title, _words(each) if place % 7 == 0 else ())
    return drawn


def layers(client: Client, text: str) -> Figure:
    """Draw each layer's mean over heads, then the mean over layers and rollout through them."""
    common = {"unit": "word", "special_tokens": "drop"}
    each = client.infer("minilm", text, attention=AttentionSelection(**common, head_reduction="mean")).attention
    joined = [AttentionSelection(**common, layer_reduction=how, head_reduction="mean") for how in ("mean", "rollout")]
    mean, rollout = (client.infer("minilm", text, attention=selection).attention[0] for selection in joined)
    drawn = Figure(figsize=(11, 5.2), layout="constrained")
    panels = drawn.subplots(2, 4)
    shown = [(f"layer {one.layer}", one) for one in each] + [("mean of layers", mean), ("rollout", rollout)]
    for place, (title, attention) in enumerate(shown):
        _panel(panels.flat[place], attention.weights[0], title, _words(attention) if place % 4 == 0 else ())
    return drawn


def forms(client: Client) -> Figure:
    """Draw one layer of each model of the zoo. Untrained, so a map shows only what may attend to what."""
    text, pair = "The buyer agrees to assume all liabilities.", "Der Käufer übernimmt alles."
    first = AttentionSelection(layers=[0], head_reduction="mean")

    def map_of(model: str, selection: AttentionSelection = first) -> AttentionMap:
        return client.infer(model, text, attention=selection).attention[0]

    image = np.random.default_rng(0).normal(size=(3, 32, 32)).astype(np.float32)
    second = AttentionSelection(layers=[1], head_reduction="mean")
    windowed = map_of("sliding-window", second)
    over_image = client.infer("cross-modal", (text, {"pixel_values": image}), attention=second).attention[0]
    panel = over_image.over_patches()[1]
    pooled = AttentionSelection(sites=["layers.0.attention.scales.stride_4"], head_reduction="mean")
    crossed = AttentionSelection(sites=[CROSS_SITE], head_reduction="mean")
    translated = client.infer("cross", (text, pair), attention=crossed).attention[0]
    shown = [
        ("self", map_of("self").weights[0]),
        ("causal", map_of("causal").weights[0]),
        ("windowed, as it travels", np.ma.masked_where(windowed.band_keys < 0, windowed.band[0])),
        ("windowed, laid out", np.ma.masked_where(windowed.outside, windowed.weights[0])),
        ("top-k", map_of("top-k").weights[0]),
        ("linear", map_of("linear").weights[0]),
        ("multi-scale: keys in fours", map_of("multi-scale", pooled).weights[0]),
        ("cross: one text over another", translated.weights[0]),
        ("cross-modal: a text over patches", over_image.weights[0]),
        (f"the same, of {panel.token.text!r}, as they lie", panel.weights),
    ]
    drawn = Figure(figsize=(12, 5), layout="constrained")
    panels = drawn.subplots(2, 5)
    for place, (title, weights) in enumerate(shown):
        _panel(panels.flat[place], weights, title)
        panels.flat[place].set_xlabel(f"{weights.shape[0]} x {weights.shape[1]}", fontsize=8)
    return drawn


def views(client: Client) -> dict[str, str]:
    """Draw one map in each view of the client."""
    selection = AttentionSelection(layers=-1, heads="mean", unit="word", special_tokens="drop")
    (attention,) = client.infer("minilm", SHORT, outputs=[], attention=selection).attention
    return {view: attention.to_svg(view) for view in ("heatmap", "bipartite", "arcs")}


def main() -> None:
    """Start the servers, request the maps, draw and save the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repository", type=Path, required=True, help="has all-MiniLM-L6-v2 as minilm")
    parser.add_argument("--zoo", type=Path, required=True, help="has the models of the zoo, by their own names")
    arguments = parser.parse_args()
    with running_server(arguments.zoo) as (port, _), Client(f"localhost:{port}") as client:
        forms(client).savefig(IMAGES / "forms.png", dpi=110)
        print("docs/images/forms.png")
    with running_server(arguments.repository) as (port, _), Client(f"localhost:{port}") as client:
        for name, draw, text in (("heads", heads, SENTENCES["contract"]), ("layers", layers, SENTENCES["contract"])):
            draw(client, text).savefig(IMAGES / f"{name}.png", dpi=110)
            print(f"docs/images/{name}.png")
        for view, drawing in views(client).items():
            (IMAGES / f"view-{view}.svg").write_text(drawing, encoding="utf-8")
            print(f"docs/images/view-{view}.svg")


if __name__ == "__main__":
    main()
