"""MiniLM behind BentoML, at POST /infer: a peer, which is a serving system that `bench.peers` compares.

`bentoml serve bentoml_app:MiniLM --port PORT` starts it. `PEER_MODEL` is the graph's path, and `PEER_FORM` is `dynamic`
for its batcher. A body is JSON, `{"ids": [...]}`: int64 ids of one sequence, or a list of sequences for the batcher. An
answer is the float32 hidden states (T, 384) as bytes, or a JSON list of them in base64, for a batched method answers in
JSON. Without `PEER_MODEL`, the constructor of `MiniLM` raises KeyError.
"""

import base64

import bentoml
import numpy as np
from model import DYNAMIC, MAX_BATCH, run, session

batching = {"batchable": True, "max_batch_size": MAX_BATCH, "max_latency_ms": 60_000} if DYNAMIC else {}


@bentoml.service(workers=2, traffic={"timeout": 120}, logging={"access": {"enabled": False}})
class MiniLM:
    def __init__(self):
        self.model = session()

    if DYNAMIC:

        @bentoml.api(**batching)
        def infer(self, ids: list[list[int]]) -> list[str]:
            answers = run(self.model, [np.array(each, np.int64) for each in ids])
            return [base64.b64encode(each.tobytes()).decode() for each in answers]

    else:

        @bentoml.api
        def infer(self, ids: list[int]) -> bytes:
            return run(self.model, [np.array(ids, np.int64)])[0].tobytes()
