"""MiniLM behind KServe's Python server, over gRPC: a peer, which is a serving system that `bench.peers` compares.

`PEER_MODEL` is the graph's path, `PEER_PORT` the port; the next one is for HTTP. A request is a ModelInfer of the Open
Inference Protocol whose raw contents are int64 ids of one sequence; its answer has the float32 hidden states (T, 384).
There is no batching: its batcher is a separate container, not in the package. Without `PEER_MODEL`, KeyError ends the
script.
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
