"""Small graphs whose files leave open what their nodes force: channels, sizes of images, sums of axes, widths.

onnxruntime refuses a run of other sizes than the nodes allow.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from batch_graphs import graph

Array = np.ndarray[Any, np.dtype[Any]]

DIM, PATCH = 8, 4
_ATTEND = (
    "xt = Transpose<perm=[0,2,1]>(x) raw = MatMul(x, xt) scores = Mul(raw, scale) p = Softmax<axis=-1>(scores) "
    "last_hidden_state = MatMul(p, x)"
)


def drawn(*shape: int, seed: int = 0) -> Array:
    """Return small random numbers, float32."""
    return (0.3 * np.random.default_rng([seed, *shape]).normal(size=shape)).astype(np.float32)


def image_encoder(rows: int = 4, columns: int = 4, leading: int = 1, *, positions: bool = True) -> onnx.ModelProto:
    """A vision transformer of one layer as optimum names its axes: patches of 4 x 4, then `leading` tokens in front.

    `positions`: whether a table of positions, (1, leading + rows * columns, 8), is added to the tokens.
    """
    placed = "x = Add(tokens, positions)" if positions else "x = Identity(tokens)"
    constants: dict[str, Any] = {"positions": drawn(1, leading + rows * columns, DIM)} if positions else {}
    return graph(
        "g (float[batch_size, num_channels, height, width] pixel_values) "
        "=> (float[batch_size, n, 8] last_hidden_state) {"
        f"cut = Conv<kernel_shape=[{PATCH},{PATCH}], strides=[{PATCH},{PATCH}]>(pixel_values, kernel, bias)"
        "rows = Shape<start=0, end=1>(cut) shape = Concat<axis=0>(rows, dim, minus_one)"
        "flat = Reshape(cut, shape) patches = Transpose<perm=[0,2,1]>(flat)"
        "front_shape = Concat<axis=0>(rows, leading, dim) front = Expand(front_token, front_shape)"
        f"tokens = Concat<axis=1>(front, patches) {placed} {_ATTEND} }}",
        kernel=drawn(DIM, 3, PATCH, PATCH),
        bias=drawn(DIM),
        dim=np.array([DIM]),
        minus_one=np.array([-1]),
        leading=np.array([leading]),
        front_token=drawn(1, leading, DIM),
        scale=0.35,
        **constants,
    )


def audio_encoder(frames: int = 12) -> onnx.ModelProto:
    """An encoder of mel features as in Whisper: two convolutions, of strides 1 and 2, then a table of `frames` / 2."""
    return graph(
        "g (float[batch_size, feature_size, encoder_sequence_length] input_features) "
        "=> (float[batch_size, n, 8] last_hidden_state) {"
        "one = Conv<kernel_shape=[3], pads=[1,1]>(input_features, kernel_1)"
        "two = Conv<kernel_shape=[3], pads=[1,1], strides=[2]>(one, kernel_2)"
        f"hidden = Transpose<perm=[0,2,1]>(two) x = Add(hidden, positions) {_ATTEND} }}",
        kernel_1=drawn(DIM, 5, 3),
        kernel_2=drawn(DIM, DIM, 3),
        positions=drawn(frames // 2, DIM),
        scale=0.35,
    )


def cross_decoder(axis: str = "encoder_sequence_length / 2", positions: int = 32) -> onnx.ModelProto:
    """A decoder of one cross-attention in the form of Whisper's: ids, and encoder states on this axis."""
    return graph(
        "g (int64[batch_size, decoder_sequence_length] input_ids,"
        f' float[batch_size, "{axis}", 8] encoder_hidden_states)'
        " => (float[batch_size, decoder_sequence_length, 8] logits) {"
        "embedded = Gather(words, input_ids) length = Shape<start=1, end=2>(input_ids)"
        "placed = Slice(positions, zero, length, zero) q = Add(embedded, placed)"
        "kt = Transpose<perm=[0,2,1]>(encoder_hidden_states) raw = MatMul(q, kt) scores = Mul(raw, scale)"
        "p = Softmax<axis=-1>(scores) logits = MatMul(p, encoder_hidden_states) }",
        words=drawn(30, DIM),
        positions=drawn(positions, DIM),
        zero=np.array([0]),
        scale=0.35,
    )


def with_memory(mask_axis: str = "memory_length + length") -> onnx.ModelProto:
    """Attention over a memory and new keys, with a mask over both whose axis has this name; "?" is none."""
    axis = mask_axis if mask_axis == "?" else f'"{mask_axis}"'
    return graph(
        f"g (float[batch_size, memory_length, 8] memory, float[batch_size, length, 8] new,"
        f" float[batch_size, {axis}] mask) => (float[batch_size, length, 8] y) {{"
        "keys = Concat<axis=1>(memory, new) kt = Transpose<perm=[0,2,1]>(keys) raw = MatMul(new, kt)"
        "added = Unsqueeze(mask, one) scores = Add(raw, added) p = Softmax<axis=-1>(scores) y = MatMul(p, keys) }",
        one=np.array([1]),
    )
