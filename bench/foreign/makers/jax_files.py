"""Makes ONNX files of attention written in JAX, by jax2onnx.

`python jax_files.py FOLDER` writes a case for each function, in an environment with jax2onnx: the file, its inputs, and
the answers and attention weights in JAX. `bench.foreign` serves and compares them. A conversion that fails makes a case
without a file, which states the error. A case that FOLDER already has raises FileExistsError.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from cases import cases_of_command_line

PACKAGE = "jax2onnx"
WIDTH, HEADS = 32, 4
LENGTHS = (9, 4, 6)
_KEYS = jax.random.split(jax.random.key(60), 8)
_MATRICES = [jax.random.normal(key, (WIDTH, WIDTH)) * 0.4 for key in _KEYS]


def _heads(x: Any, matrix: Any) -> Any:
    return (x @ matrix).reshape(x.shape[0], x.shape[1], HEADS, WIDTH // HEADS)


def written_out(x: Any, *, causal: bool) -> tuple[Any, Any]:
    """Return two layers of attention over (B, T, W) by their definition, and their weights, (B, H, T, T)."""
    weights = []
    for layer in (0, 4):
        query, key, value = (_heads(x, matrix) for matrix in _MATRICES[layer : layer + 3])
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / np.sqrt(WIDTH // HEADS)
        if causal:
            scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -1e30)
        own = jax.nn.softmax(scores, axis=-1)
        weights.append(own)
        x = x + jnp.einsum("bhqk,bkhd->bqhd", own, value).reshape(x.shape) @ _MATRICES[layer + 3]
    return x, weights


def by_jax(x: Any, *, causal: bool) -> Any:
    """Return the same by jax.nn.dot_product_attention."""
    for layer in (0, 4):
        query, key, value = (_heads(x, matrix) for matrix in _MATRICES[layer : layer + 3])
        mixed = jax.nn.dot_product_attention(query, key, value, is_causal=causal)
        x = x + mixed.reshape(x.shape) @ _MATRICES[layer + 3]
    return x


def converted(function: Callable[[Any], Any]) -> Callable[[Path], Path]:
    """Return a function that writes a model by jax2onnx, with a dynamic batch and length."""

    def write(place: Path) -> Path:
        import onnx
        from jax2onnx import to_onnx

        onnx.save(to_onnx(function, inputs=[("B", "T", WIDTH)], model_name="jax"), place / "model.onnx")
        return place / "model.onnx"

    return write


def main() -> None:
    """Entry point."""
    cases = cases_of_command_line(__doc__)
    random = np.random.default_rng(61)
    rows = [random.normal(size=(length, WIDTH)).astype(np.float32) for length in LENGTHS]
    for causal in (False, True):
        outputs, weights = [], []
        for row in rows:
            found, own = written_out(row[None], causal=causal)
            outputs.append(np.asarray(found[0]))
            weights.append({str(layer): np.asarray(each[0]) for layer, each in enumerate(own)})
        for name, function in (
            ("jax.nn.dot_product_attention", lambda x, c=causal: by_jax(x, causal=c)),
            ("jax.numpy attention", lambda x, c=causal: written_out(x, causal=c)[0]),
        ):
            cases.add(
                "jax2onnx",
                PACKAGE,
                f"{name}, causal" if causal else name,
                converted(function),
                [{"x": row} for row in rows],
                outputs=[{"output": output} for output in outputs],
                weights=weights,
                sites=2,
            )


if __name__ == "__main__":
    main()
