"""MiniLM behind Triton (PyTriton), a peer of `bench.peers`: raw contents over its gRPC, at `PEER_PORT`.

Its batcher joins requests of one shape. The next two ports are for HTTP and metrics.
Without the graph's path in `PEER_MODEL`, `session` raises KeyError.
"""

import numpy as np
from model import DYNAMIC, MAX_BATCH, PORT, WAIT_MS, WIDTH, run, session
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

model = session()


def infer(requests):
    return [{"hidden": np.stack(run(model, list(np.atleast_2d(request["ids"]))))} for request in requests]


def infer_one(requests):
    return [{"hidden": run(model, [request["ids"]])[0]} for request in requests]


config = TritonConfig(http_port=PORT + 1, grpc_port=PORT, metrics_port=PORT + 2, http_address="127.0.0.1",
                      grpc_address="127.0.0.1", log_verbose=0)  # fmt: skip
batching = (
    ModelConfig(max_batch_size=MAX_BATCH, batcher=DynamicBatcher(max_queue_delay_microseconds=1000 * WAIT_MS))
    if DYNAMIC
    else ModelConfig(batching=False)
)
function = infer if DYNAMIC else infer_one
with Triton(config=config) as triton:
    triton.bind(
        model_name="minilm",
        infer_func=[function, function],
        inputs=[Tensor(name="ids", dtype=np.int64, shape=(-1,))],
        outputs=[Tensor(name="hidden", dtype=np.float32, shape=(-1, WIDTH))],
        config=batching,
        strict=False,
    )
    triton.serve()
