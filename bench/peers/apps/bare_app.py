"""A runtime without a server: MiniLM over padded batches, on two threads, measured in this process.

`PEER_FORM` is `onnxruntime`, `openvino-fp32` or `openvino-bf16`, `PEER_MODEL` the graph's path, `PEER_BATCHES` an .npz
file of int64 ids (B, T), and `PEER_ANSWERS` the .npz file to write: float32 hidden states (B, T, 384) of the first
batches. It prints one line of JSON: `wall_s`, `cpu_s` and `memory_mb`, or `why_not` if the processor has no bf16.
Without a variable, KeyError ends the script.
"""

import json
import os
import threading
import time
from pathlib import Path

import numpy as np

THREADS, CHECKED = 2, 8
FORM, MODEL = os.environ["PEER_FORM"], os.environ["PEER_MODEL"]


def feeds(ids):
    return {"input_ids": ids, "attention_mask": (ids != 0).astype(np.int64), "token_type_ids": np.zeros_like(ids)}


def onnxruntime_runners():
    from model import session

    model = session()
    return [lambda ids: model.run(["last_hidden_state"], feeds(ids))[0]] * THREADS


def openvino_runners(precision):
    import openvino

    core = openvino.Core()
    if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        print(json.dumps({"why_not": "OpenVINO lists no BF16 among the capabilities of this processor"}))
        raise SystemExit(0)
    # Not pinned to cores, as the threads of onnxruntime here and of the servers are not.
    options = {"NUM_STREAMS": THREADS, "INFERENCE_NUM_THREADS": THREADS, "ENABLE_CPU_PINNING": False}
    options["INFERENCE_PRECISION_HINT"] = {"fp32": "f32", "bf16": "bf16"}[precision]
    compiled = core.compile_model(MODEL, "CPU", options)

    def runner():
        request = compiled.create_infer_request()
        return lambda ids: np.array(request.infer(feeds(ids), share_inputs=True, share_outputs=True)[0])

    return [runner() for _ in range(THREADS)]


def memory_mb():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


runners = onnxruntime_runners() if FORM == "onnxruntime" else openvino_runners(FORM.removeprefix("openvino-"))
with np.load(os.environ["PEER_BATCHES"]) as stored:
    batches = [stored[name] for name in stored.files]
np.savez(os.environ["PEER_ANSWERS"], *[runners[0](ids) for ids in batches[:CHECKED]])
for run in runners:  # one after the other, because the first calls of OpenVINO 2026.4 from two threads may never return
    for ids in batches[::8]:
        run(ids)
halves = (batches[::2], batches[1::2])
threads = [threading.Thread(target=lambda n=n: [runners[n](ids) for ids in halves[n]]) for n in range(THREADS)]
cpu, wall = time.process_time(), time.perf_counter()
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
figures = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu, "memory_mb": memory_mb()}
print(json.dumps(figures))
