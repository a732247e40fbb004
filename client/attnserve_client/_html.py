"""An attention map as one HTML page. The page loads nothing, and token texts are data in it, never markup."""

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
    from attnserve_client._labels import Labels
    from attnserve_client._map_data import MapData
    from attnserve_client._patches import PatchGrid

_STEPS: Final = 65535
"""Weights are stored as 16-bit fractions of their range: finer than colours, at a third of the size of decimals."""
_NOSCRIPT_LINKS: Final = 20


def page(attention: MapData) -> str:
    """Return a page with the text, a heatmap and the strongest links; hovering over a token colours its weights.

    The content security policy allows the page's own script and style alone, by their hashes, and no loading.

    Raises:
        ValueError: The map holds scores.
    """
    style, script = _resource("page.css"), _resource("page.js")
    parts = ("default-src 'none'", f"script-src '{_hash(script)}'", f"style-src '{_hash(style)}'")
    policy = "; ".join((*parts, "base-uri 'none'", "form-action 'none'"))
    heading = f"{attention.model}: attention" if attention.model else "Attention"
    units = f"{len(attention.query_tokens)} × {len(attention.key_tokens)}"
    return _resource("page.html").format(
        policy=policy,
        title=html.escape(f"{heading}, {attention.title}"),
        heading=html.escape(heading),
        facts=html.escape(f"{attention.title} · {attention.kind}, {attention.form} · {units}"),
        style=style,
        script=script,
        fallback=_fallback(attention),
        note=_note(attention),
        labels=_labels(attention.labels),
        data=_inert(_data(attention)),
    )


def _data(attention: MapData) -> dict[str, Any]:
    weights = attention.weights
    scale = float(weights.max(initial=0.0)) or 1.0
    least = float(weights.min(initial=0.0))  # below 0 at some linear sites
    steps = np.rint((weights - np.float32(least)) / np.float32(scale - least) * _STEPS).astype("<u2")
    outside = attention.outside
    return {
        "shape": list(weights.shape),
        "heads": ["joined"] if attention.is_joined else list(attention.heads),
        "same": attention.query_axis == attention.key_axis,
        "queries": [plain_token(token) for token in attention.query_tokens],
        "keys": [plain_token(token) for token in attention.key_tokens],
        "queryGrid": _grid(attention.grids.get(attention.query_axis)),
        "keyGrid": _grid(attention.grids.get(attention.key_axis)),
        "least": least,
        "scale": scale,
        "weights": base64.b64encode(steps.tobytes()).decode("ascii"),
        # One bit for each cell, row by row, from the most significant bit on.
        "outside": None if outside is None else base64.b64encode(np.packbits(outside).tobytes()).decode("ascii"),
    }


def _grid(grid: PatchGrid | None) -> dict[str, int] | None:
    return None if grid is None else {"rows": grid.rows, "columns": grid.columns, "leading": grid.leading}


def _inert(data: dict[str, Any]) -> str:
    """Return JSON with `<`, `>` and `&` escaped, so that it cannot close its script element."""
    text = json.dumps(data, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _fallback(attention: MapData) -> str:
    """Return the strongest links as a table, for browsers that run no scripts."""
    names = attention.names()
    rows = "".join(
        f"<tr><td>{html.escape(names[link.query_token])}</td><td>{html.escape(names[link.key_token])}</td>"
        f"<td>{link.weight:.3f}</td></tr>"
        for link in attention.links(top=_NOSCRIPT_LINKS)
    )
    return f"<table><tr><th>token</th><th>looks at</th><th>weight</th></tr>{rows}</table>"


def _labels(labels: Labels | None) -> str:
    """Return the labels of a sequence, or its labelled parts, as one line."""
    if not labels:
        return ""
    title = {"spans": "Answers", "masked_tokens": "Masked tokens"}.get(labels.kind, "Labels")
    return f'<p class="note">{title}: {html.escape(str(labels))}</p>'


def _note(attention: MapData) -> str:
    if attention.residual is None:
        return ""
    omitted = float(attention.residual.mean()) if attention.residual.size else 0.0
    return f'<p class="note">Strongest links only; the omitted ones sum to {omitted:.1%} of a row on average.</p>'


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")


@cache
def _resource(name: str) -> str:
    return (files("attnserve_client") / "_page" / name).read_text(encoding="utf-8")
