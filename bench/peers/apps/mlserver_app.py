"""MiniLM behind MLServer, over gRPC: a peer, which is a serving system that `bench.peers` compares.

`PEER_MODEL` is the graph's path, `PEER_PORT` the port; the next two are for HTTP and metrics. A request is a ModelInfer
of the Open Inference Protocol whose raw contents are int64 ids of one sequence; its answer has the float32 hidden
states (T, 384). Two threads share one session in one process, without batching. Without `PEER_MODEL`, `load` raises
KeyError.
"""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from mlserver import MLModel, MLServer, ModelSettings, Settings
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceResponse
from model import PORT, run, session


class MiniLM(MLModel):
    async def load(self):
        self.model, self.threads = session(), ThreadPoolExecutor(2)
        return True

    async def predict(self, payload):
        ids = NumpyCodec.decode_input(payload.inputs[0]).reshape(-1).astype(np.int64)
        loop = asyncio.get_running_loop()
        (hidden,) = await loop.run_in_executor(self.threads, run, self.model, [ids])
        output = NumpyCodec.encode_output("hidden", hidden)
        return InferenceResponse(model_name=self.name, outputs=[output])


async def main():
    settings = Settings(host="127.0.0.1", http_port=PORT + 1, grpc_port=PORT, metrics_port=PORT + 2, parallel_workers=0,
                        debug=False, use_structured_logging=False)  # fmt: skip
    server = MLServer(settings)
    await server.start([ModelSettings(name="minilm", implementation=MiniLM)])


asyncio.run(main())
