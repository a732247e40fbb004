"""MiniLM behind Ray Serve, at POST /infer: a peer, which is a serving system that `bench.peers` compares.

`PEER_MODEL` is the graph's path, `PEER_PORT` the port, and `PEER_FORM` is `dynamic` for its batcher. A body is int64
ids of one sequence as bytes, an answer the float32 hidden states (T, 384) as bytes. It serves until a signal ends it.
Without `PEER_MODEL`, the replicas raise KeyError and none starts.
"""

import signal

import numpy as np
import ray
from model import DYNAMIC, MAX_BATCH, PORT, WAIT_MS, run, session
from ray import serve
from starlette.requests import Request
from starlette.responses import Response


@serve.deployment(num_replicas=2, max_ongoing_requests=64, ray_actor_options={"num_cpus": 0.5})
class MiniLM:
    def __init__(self):
        self.model = session()

    @serve.batch(max_batch_size=MAX_BATCH, batch_wait_timeout_s=WAIT_MS / 1000)
    async def batched(self, sequences):
        return run(self.model, sequences)

    async def __call__(self, request: Request):
        ids = np.frombuffer(await request.body(), np.int64)
        hidden = await self.batched(ids) if DYNAMIC else run(self.model, [ids])[0]
        return Response(hidden.tobytes(), media_type="application/octet-stream")


if __name__ == "__main__":
    ray.init(num_cpus=2, include_dashboard=False, logging_level="warning")
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    serve.run(MiniLM.bind(), route_prefix="/infer")
    signal.pause()
