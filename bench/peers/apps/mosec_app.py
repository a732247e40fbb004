"""MiniLM behind mosec, at POST /inference: a peer, which is a serving system that `bench.peers` compares.

`PEER_MODEL` is the graph's path, `PEER_PORT` the port, and `PEER_FORM` is `dynamic` for its batcher. A body is int64
ids of one sequence as bytes, an answer the float32 hidden states (T, 384) as bytes. Without `PEER_MODEL`, the
constructor of `MiniLM` raises KeyError in each worker.
"""

import sys

import numpy as np
from model import DYNAMIC, MAX_BATCH, PORT, WAIT_MS, run, session
from mosec import Server, Worker


class MiniLM(Worker):
    def __init__(self):
        self.model = session()

    def deserialize(self, data):
        return np.frombuffer(data, np.int64)

    def serialize(self, data):
        return data.tobytes()

    def forward(self, data):
        return run(self.model, data) if DYNAMIC else run(self.model, [data])[0]


if __name__ == "__main__":
    sys.argv = [sys.argv[0], "--address", "127.0.0.1", "--port", str(PORT), "--log-level", "warning"]
    sys.argv += ["--timeout", "120000"]  # by default it drops a request after 3 s; none of the others does
    server = Server()
    batching = {"max_batch_size": MAX_BATCH, "max_wait_time": WAIT_MS} if DYNAMIC else {}
    server.append_worker(MiniLM, num=2, **batching)
    server.run()
