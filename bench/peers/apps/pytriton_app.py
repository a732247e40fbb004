"""MiniLM behind Triton (PyTriton), over gRPC: a peer, which is a serving system that `bench.peers` compares.

`PEER_MODEL` is the graph's path, `PEER_PORT` the port; the next two are for HTTP and metrics. `PEER_FORM` is `dynamic`
for its batcher, which joins requests of one shape. A request is a ModelInfer of the Open Inference Protocol whose raw
contents are int64 ids of one sequence; its answer has the float32 hidden states (T, 384). Without `PEER_MODEL`,
KeyError ends the script.
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
