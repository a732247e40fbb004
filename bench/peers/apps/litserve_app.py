"""MiniLM behind LitServe, a peer of `bench.peers`, at POST /predict of `PEER_PORT`.

JSON in, its only input format; raw float32 hidden states out.
Without the graph's path in `PEER_MODEL`, `session` raises KeyError.
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
