"""MiniLM behind LitServe, at POST /predict: a peer, which is a serving system that `bench.peers` compares.

`PEER_MODEL` is the graph's path, `PEER_PORT` the port, and `PEER_FORM` is `dynamic` for its batcher. A body is JSON,
its only input format: `{"ids": [...]}`, int64 ids of one sequence. An answer is the float32 hidden states (T, 384) as
bytes. Without `PEER_MODEL`, `setup` raises KeyError in each worker.
"""

import litserve
import numpy as np
from fastapi import Response
from model import DYNAMIC, MAX_BATCH, PORT, WAIT_MS, run, session


class MiniLM(litserve.LitAPI):
    def setup(self, device):
        self.model = session()

    def decode_request(self, request):
        return np.array(request["ids"], np.int64)

    def batch(self, inputs):
        return inputs

    def unbatch(self, output):
        return output

    def predict(self, x):
        return run(self.model, x) if isinstance(x, list) else run(self.model, [x])[0]

    def encode_response(self, output):
        return Response(output.tobytes(), media_type="application/octet-stream")


if __name__ == "__main__":
    batching = {"max_batch_size": MAX_BATCH, "batch_timeout": WAIT_MS / 1000} if DYNAMIC else {}
    api = MiniLM(**batching)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=2)
    server.run(host="127.0.0.1", port=PORT, generate_client_file=False, log_level="warning")
