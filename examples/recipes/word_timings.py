"""Find when each word of a recording begins and ends, from the attention of words to frames.

A frame is 20 ms of the recording. The model is made here, by `--make`, and its alignment is known: head 0 of its
cross-attention compares each word with each frame, and head 1 compares noise. The recording is synthetic too. Serve
the model as `--make` prints it; a failed call raises an AttnserveError.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from attnserve_client import AttentionSelection, Client

TRANSCRIPT = "the cat sat on the mat and the dog looked at the cat"
WORDS = ("the", "cat", "sat", "on", "mat", "and", "dog", "looked", "at")
FRAME_S = 0.02
HALF = 16
"""Numbers of a word or a frame that each of both heads compares."""
SHARPNESS = 8.0

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Timing:
    """When a word begins and ends by its attention, and in truth, in seconds."""

    word: str
    start_s: float
    end_s: float
    true_start_s: float
    true_end_s: float


def word_table() -> Floats:
    """Return the vectors of `[PAD]`, `[UNK]` and the words, (11, 32): a direction for head 0, and noise for head 1."""
    table = np.random.default_rng(1).normal(size=(len(WORDS) + 2, 2 * HALF)).astype(np.float32)
    table[:, :HALF] /= np.linalg.norm(table[:, :HALF], axis=1, keepdims=True)
    return table


def recording(noise: float = 0.25) -> tuple[Floats, list[tuple[int, int]]]:
    """Return the frames of the transcript, (frames, 32), and the first frame and the one after the last of each word.

    A word takes 6 to 20 frames, which are its vector with noise.
    """
    generator = np.random.default_rng(2)
    table, frames, truth, at = word_table(), [], [], 0
    for word in TRANSCRIPT.split():
        count = int(generator.integers(6, 21))
        sound = generator.normal(scale=noise, size=(count, 2 * HALF))
        sound[:, :HALF] += table[WORDS.index(word) + 2, :HALF]
        frames.append(sound)
        truth.append((at, at + count))
        at += count
    return np.concatenate(frames).astype(np.float32), truth


def align(weights: Floats) -> list[tuple[int, int]]:
    """Return the frames of each word: the best way to divide the frames among the words, in their order.

    A word has at least one frame, and no frame is left out. Of all divisions, this one has the greatest sum of the
    logarithms of weights, after each row is divided by its greatest weight, so that long words count as much as short
    ones. Source: Sakoe and Chiba 1978, dynamic time warping, with the steps "next frame" and "next word".

    Args:
        weights: Weights of one head (words, frames).

    Raises:
        ValueError: There are fewer frames than words.
    """
    words, frames = weights.shape
    if frames < words:
        raise ValueError(f"{frames} frames are fewer than {words} words")
    gains = np.log(np.maximum(weights / weights.max(axis=1, keepdims=True), 1e-12))
    best = np.full((words, frames), -np.inf)
    advanced = np.zeros((words, frames), dtype=bool)
    best[0] = np.cumsum(gains[0])
    for frame in range(1, frames):
        for word in range(1, min(words, frame + 1)):
            stay, advance = best[word, frame - 1], best[word - 1, frame - 1]
            advanced[word, frame] = advance > stay
            best[word, frame] = gains[word, frame] + max(stay, advance)
    spans, end, word = [], frames, words - 1
    for frame in range(frames - 1, -1, -1):
        if advanced[word, frame] or frame == 0:
            spans.append((frame, end))
            end, word = frame, word - 1
    return spans[::-1]


def make(folder: Path) -> Path:
    """Write the model and its tokenizer into a folder, and return the model's file. Needs `attnserve[convert]`."""
    import onnx  # noqa: PLC0415 - only for making the model
    from onnx import TensorProto, helper, numpy_helper  # noqa: PLC0415
    from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: PLC0415

    generator = np.random.default_rng(3)
    width = 2 * HALF
    key = np.zeros((width, width), dtype=np.float32)
    key[:HALF, :HALF] = SHARPNESS * np.eye(HALF) * HALF**0.5
    key[HALF:, HALF:] = generator.normal(scale=0.3, size=(HALF, HALF))
    value = generator.normal(scale=0.3, size=(width, width)).astype(np.float32)
    nodes = [
        helper.make_node("Gather", ["words", "input_ids"], ["query"]),
        helper.make_node("MatMul", ["frames", "key.weight"], ["key"]),
        helper.make_node("MatMul", ["frames", "value.weight"], ["value"]),
        helper.make_node(
            "Attention", ["query", "key", "value"], ["heard"], name="/cross/Attention", q_num_heads=2, kv_num_heads=2
        ),
        helper.make_node("Add", ["query", "heard"], ["hidden"]),
    ]
    graph = helper.make_graph(
        nodes,
        "aligner",
        [
            helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "seq"]),
            helper.make_tensor_value_info("frames", TensorProto.FLOAT, ["batch", "frames", width]),
        ],
        [helper.make_tensor_value_info("hidden", TensorProto.FLOAT, ["batch", "seq", width])],
        [
            numpy_helper.from_array(array, name)
            for name, array in (("words", word_table()), ("key.weight", key), ("value.weight", value))
        ],
    )
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "aligner.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10), file)
    vocabulary = {word: place for place, word in enumerate(("[PAD]", "[UNK]", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return file


def main(server: str, model: str) -> list[Timing]:
    """Print start and end of each word beside the truth, and return them."""
    frames, truth = recording()
    selection = AttentionSelection(layers=-1, heads=[0, 1])
    with Client(server) as client:
        result = client.infer(model, (TRANSCRIPT, {"frames": frames}), outputs=[], attention=selection)
    (attention,) = result.attention
    assert attention.kind == "cross", "the words must look at the frames"
    spans = align(attention.head_weights(head=0))
    timings = [
        Timing(token.text, *(FRAME_S * frame for frame in (*span, *true)))
        for token, span, true in zip(attention.query_tokens, spans, truth, strict=True)
    ]
    print(f"{'word':8} {'start':>6} {'end':>6} {'true':>14}")
    for each in timings:
        print(f"{each.word:8} {each.start_s:6.2f} {each.end_s:6.2f} {each.true_start_s:7.2f} {each.true_end_s:6.2f}")
    for head in attention.heads:
        found = align(attention.head_weights(head))
        errors = [abs(a - b) for span, true in zip(found, truth, strict=True) for a, b in zip(span, true, strict=True)]
        print(f"head {head}: mean error of a boundary {1000 * FRAME_S * np.mean(errors):.0f} ms")
    return timings


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", default="localhost:8001")
    parser.add_argument("--model", default="aligner")
    parser.add_argument("--make", type=Path, metavar="FOLDER", help="write the model into this folder, and end")
    given = parser.parse_args()
    if given.make:
        written = make(given.make)
        print(f"attnserve-server prepare {written} --name aligner --tokenizer {written.parent}/tokenizer.json \\")
        print("  --repository .demo/models")
    else:
        main(given.server, given.model)
