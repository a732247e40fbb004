"""The part that all apps share: MiniLM in onnxruntime sessions of one thread, at its best, and batches padded by hand.

An app is a server of a peer, a serving system that `bench.peers` compares. The environment has the graph's path
(`PEER_MODEL`), the port (`PEER_PORT`), and `dynamic` in `PEER_FORM` for a batcher. A port that is no integer raises
ValueError on import. `session` raises KeyError without a path, and onnxruntime's error for a file that it cannot load.
"""

from __future__ import annotations

import os

import numpy as np
import onnxruntime as ort

WIDTH = 384
MAX_BATCH, WAIT_MS = 32, 5
DYNAMIC = os.environ.get("PEER_FORM") == "dynamic"
PORT = int(os.environ.get("PEER_PORT", "0"))


def session() -> ort.InferenceSession:
    """Return a session of one thread, without the fusion that slows MiniLM down on the CPU."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("optimization.disable_specified_optimizers", "SkipLayerNormFusion")
    return ort.InferenceSession(os.environ["PEER_MODEL"], options, providers=["CPUExecutionProvider"])


def run(model: ort.InferenceSession, sequences: list) -> list:
    """Return hidden states (T, 384), float32, of each sequence of ids (T,): one run, padded to the longest."""
    ids = np.zeros((len(sequences), max(map(len, sequences))), np.int64)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = sequence
    feeds = {"input_ids": ids, "attention_mask": (ids != 0).astype(np.int64), "token_type_ids": np.zeros_like(ids)}
    (hidden,) = model.run(["last_hidden_state"], feeds)
    return [hidden[row, : len(sequence)] for row, sequence in enumerate(sequences)]
