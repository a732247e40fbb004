"""MiniLM behind KServe's Python server, a peer of `bench.peers`: raw contents over its gRPC, at `PEER_PORT`.

Its batcher is a separate container, not in the package. The next port is for HTTP.
Without the graph's path in `PEER_MODEL`, `session` raises KeyError.
"""

import asyncio
from concurrent.futures import ThreadPoolExecutor

from kserve import InferOutput, InferResponse, Model, ModelServer
from model import PORT, run, session


class MiniLM(Model):
    def __init__(self):
        super().__init__("minilm")
        self.model, self.threads, self.ready = session(), ThreadPoolExecutor(2), True

    async def predict(self, payload, headers=None, response_headers=None):
        ids = payload.inputs[0].as_numpy().reshape(-1)
        loop = asyncio.get_running_loop()
        (hidden,) = await loop.run_in_executor(self.threads, run, self.model, [ids])
        output = InferOutput("hidden", list(hidden.shape), "FP32")
        output.set_data_from_numpy(hidden, binary_data=True)
        return InferResponse(payload.id or "", "minilm", [output])


if __name__ == "__main__":
    ModelServer(http_port=PORT + 1, grpc_port=PORT, workers=1, access_log_format=None).start([MiniLM()])
