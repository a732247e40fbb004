"""An attention map as one page that loads nothing. Texts of tokens are data on it and never markup."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from attnserve_client._tokens import plain_token

if TYPE_CHECKING:
    from attnserve_client._attention import AttentionMap
    from attnserve_client._patches import PatchGrid

_STEPS: Final = 65535
"""Weights travel as 16-bit steps of the map's greatest: finer than any colour, at a third of the bytes of numbers."""
_NOSCRIPT_LINKS: Final = 20

_FRAME: Final = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<header><h1>{heading}</h1><span class="facts">{facts}</span></header>
<noscript>{fallback}</noscript>
<div id="app" hidden>
<div id="controls" class="controls"></div>
<section class="panel"><h2>Where it looks</h2><div id="sentences"></div><p id="said" class="said"></p></section>
<div class="columns">
<section class="panel"><h2>Heatmap: rows look at columns</h2>
<div class="scroll"><canvas id="heatmap" role="img" aria-label="attention weights, rows look at columns"></canvas></div>
<div class="scale"><span>0</span><canvas id="strip" width="160" height="10"></canvas><span id="greatest"></span></div>
</section>
<section class="panel"><h2>Strongest links</h2><ol id="links"></ol></section>
</div>
{note}
</div>
<div id="tip" class="tip" hidden></div>
</main>
<script type="application/json" id="map">{data}</script>
<script>{script}</script>
</body>
</html>
"""


def page(attention: AttentionMap) -> str:
    """The page: the sentence, in which hovering over a token colours what it looks at, heatmap and strongest links.

    Its content security policy lets nothing run but its one script, named by its hash, and lets nothing be loaded.
    """
    style, script = _resource("page.css"), _resource("page.js")
    parts = ("default-src 'none'", f"script-src '{_hash(script)}'", f"style-src '{_hash(style)}'")
    policy = "; ".join((*parts, "base-uri 'none'", "form-action 'none'"))
    heading = f"{attention.model}: attention" if attention.model else "Attention"
    units = f"{len(attention.query_tokens)} × {len(attention.key_tokens)}"
    return _FRAME.format(
        policy=policy,
        title=html.escape(f"{heading}, {attention.title}"),
        heading=html.escape(heading),
        facts=html.escape(f"{attention.title} · {attention.kind}, {attention.form} · {units}"),
        style=style,
        script=script,
        fallback=_fallback(attention),
        note=_note(attention),
        data=_inert(_data(attention)),
    )


def _data(attention: AttentionMap) -> dict[str, Any]:
    weights = attention.weights
    scale = float(weights.max(initial=0.0)) or 1.0
    steps = np.rint(weights / np.float32(scale) * _STEPS).astype("<u2")
    outside = attention.outside
    return {
        "shape": list(weights.shape),
        "heads": ["joined"] if attention.is_joined else list(attention.heads),
        "same": attention.query_axis == attention.key_axis,
        "queries": [plain_token(token) for token in attention.query_tokens],
        "keys": [plain_token(token) for token in attention.key_tokens],
        "queryGrid": _grid(attention.grids.get(attention.query_axis)),
        "keyGrid": _grid(attention.grids.get(attention.key_axis)),
        "scale": scale,
        "weights": base64.b64encode(steps.tobytes()).decode("ascii"),
        # One bit for each cell, row after row, the first in the highest bit.
        "outside": None if outside is None else base64.b64encode(np.packbits(outside).tobytes()).decode("ascii"),
    }


def _grid(grid: PatchGrid | None) -> dict[str, int] | None:
    return None if grid is None else {"rows": grid.rows, "columns": grid.columns, "leading": grid.leading}


def _inert(data: dict[str, Any]) -> str:
    """JSON that cannot end the element it stands in: no `<`, `>` or `&` is left in it."""
    text = json.dumps(data, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _fallback(attention: AttentionMap) -> str:
    """The strongest links as a table, where scripts do not run."""
    rows = "".join(
        f"<tr><td>{html.escape(link.query)}</td><td>{html.escape(link.key)}</td><td>{link.weight:.3f}</td></tr>"
        for link in attention.links(top=_NOSCRIPT_LINKS)
    )
    return f"<table><tr><th>token</th><th>looks at</th><th>weight</th></tr>{rows}</table>"


def _note(attention: AttentionMap) -> str:
    if attention.residual is None:
        return ""
    left_out = float(attention.residual.mean()) if attention.residual.size else 0.0
    return f'<p class="note">Only the strongest links came; what was left out weighs {left_out:.1%} of a row.</p>'


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")


@cache
def _resource(name: str) -> str:
    return (files("attnserve_client") / "_page" / name).read_text(encoding="utf-8")
