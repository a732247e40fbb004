"""MiniLM behind BentoML, a peer of `bench.peers`, at POST /infer.

JSON in; raw bytes out, or base64 where batched, for a batched method answers in JSON.
Without the graph's path in `PEER_MODEL`, `session` raises KeyError.
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
