"""Makes ONNX files of attention in Keras, by tf2onnx.

`python keras_files.py FOLDER` writes a case for each model, in an environment with tensorflow and tf2onnx: the file,
its inputs, and the answers and attention weights in Keras. `bench.foreign` serves and compares them. A conversion that
fails makes a case without a file, which states the error. A case that FOLDER already has raises FileExistsError.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import keras
import numpy as np
import tensorflow as tf
from cases import cases_of_command_line

PACKAGE = "tf2onnx"
VOCABULARY, WIDTH, HEADS, LAYERS = 60, 32, 4, 2
LENGTHS = (9, 4, 6)


def encoder(*, embedded: bool, causal: bool, activation: str) -> tuple[Any, Any]:
    """Return a Keras encoder, and a model of its weights: of ids if `embedded`, else of vectors."""
    keras.utils.set_random_seed(50)
    start = keras.Input((None,), dtype="int64", name="ids") if embedded else keras.Input((None, WIDTH), name="x")
    hidden = (
        keras.layers.Embedding(VOCABULARY, WIDTH, embeddings_initializer="random_normal")(start) if embedded else start
    )
    weights = []
    for _ in range(LAYERS):
        attention = keras.layers.MultiHeadAttention(HEADS, WIDTH // HEADS, kernel_initializer="random_normal")
        mixed, own = attention(hidden, hidden, return_attention_scores=True, use_causal_mask=causal)
        weights.append(own)
        hidden = keras.layers.LayerNormalization()(hidden + mixed)
        wide = keras.layers.Dense(2 * WIDTH, activation=activation)(hidden)
        hidden = keras.layers.LayerNormalization()(hidden + keras.layers.Dense(WIDTH)(wide))
    return keras.Model(start, hidden), keras.Model(start, [hidden, *weights])


def rows(*, embedded: bool) -> list[dict[str, np.ndarray[Any, Any]]]:
    """Return random sequences."""
    random = np.random.default_rng(51)
    if embedded:
        return [{"ids": random.integers(1, VOCABULARY, length)} for length in LENGTHS]
    return [{"x": random.normal(size=(length, WIDTH)).astype(np.float32)} for length in LENGTHS]


def answers(watched: Any, sequences: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Return the output and the weights, (H, L, S) by layer, of each sequence alone."""
    outputs, weights = [], []
    for sequence in sequences:
        hidden, *own = watched(next(iter(sequence.values()))[None])
        outputs.append({"output": np.asarray(hidden[0])})
        weights.append({str(layer): np.asarray(each[0]) for layer, each in enumerate(own)})
    return outputs, weights


def converted(model: Any, embedded: bool) -> Callable[[Path], Path]:
    """Return a function that writes the model by tf2onnx. `embedded`: it takes ids; False: vectors."""

    def write(place: Path) -> Path:
        import tf2onnx

        spec = (
            tf.TensorSpec((None, None), tf.int64, "ids")
            if embedded
            else tf.TensorSpec((None, None, WIDTH), tf.float32, "x")
        )
        function = tf.function(lambda given: tf.identity(model(given), "output"))
        tf2onnx.convert.from_function(function, [spec], opset=17, output_path=str(place / "model.onnx"))
        return place / "model.onnx"

    return write


def main() -> None:
    """Entry point."""
    cases = cases_of_command_line(__doc__)
    for name, embedded, causal, activation in (
        ("Keras MultiHeadAttention", False, False, "relu"),
        ("Keras encoder of ids", True, False, "relu"),
        ("Keras causal MultiHeadAttention", False, True, "relu"),
        ("Keras encoder of ids, gelu", True, False, "gelu"),
    ):
        model, watched = encoder(embedded=embedded, causal=causal, activation=activation)
        sequences = rows(embedded=embedded)
        outputs, weights = answers(watched, sequences)
        cases.add(
            "tf2onnx", PACKAGE, name, converted(model, embedded), sequences,
            outputs=outputs, weights=weights, sites=LAYERS,
        )  # fmt: skip


if __name__ == "__main__":
    main()
