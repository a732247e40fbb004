"""Processor time of ModelInfer beside that of the native Infer, a call: `python -m bench.protocols`.

The null model multiplies 128 int64 ids with a mask of as many. Both protocols call one server from 64 callers, in
interleaved rounds. Reported are the user and system time of the server's processes over calls, and the ratio of both.

Exit code 1 if the median ratio exceeds its limit or the server does not start; a failed call raises
`grpc.aio.AioRpcError`, and a failed conversion of the model `subprocess.CalledProcessError`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import grpc
import numpy as np
import onnx
from attnserve.oip import open_inference_pb2 as oip
from attnserve.v1 import inference_service_pb2, tensor_pb2
from onnx import TensorProto, helper
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench import service

IDS = 128
CALLERS = 64
LIMIT = 1.15
"""Of ModelInfer over Infer."""
NATIVE, OIP = "/attnserve.v1.InferenceService/Infer", "/inference.GRPCInferenceService/ModelInfer"


def write_null(folder: Path) -> None:
    """Write the null model as the bundle `null`."""
    shape = ["batch", IDS]
    ids, mask, same = (
        helper.make_tensor_value_info(name, TensorProto.INT64, shape) for name in ("ids", "mask", "same")
    )
    graph = helper.make_graph([helper.make_node("Mul", ["ids", "mask"], ["same"])], "null", [ids, mask], [same])
    path = folder / "null.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    line = [str(Path(sys.executable).with_name("attnserve-server")), "prepare", str(path), "--name", "null"]
    subprocess.run([*line, "--repository", str(folder)], check=True, capture_output=True)


def requests() -> dict[str, bytes]:
    """Return one request with the same tensors for each method."""
    arrays = {"ids": np.arange(IDS, dtype="<i8"), "mask": np.ones(IDS, "<i8")}
    tensors = [
        tensor_pb2.Tensor(name=name, dtype=tensor_pb2.DATA_TYPE_INT64, shape=[IDS], data=array.tobytes())
        for name, array in arrays.items()
    ]
    sequence = inference_service_pb2.Sequence(tensors=inference_service_pb2.TensorInput(tensors=tensors))
    native = inference_service_pb2.InferRequest(model="null", sequences=[sequence])
    given = oip.ModelInferRequest(
        model_name="null",
        inputs=[{"name": name, "datatype": "INT64", "shape": [1, IDS]} for name in arrays],
        raw_input_contents=[array.tobytes() for array in arrays.values()],
    )
    return {NATIVE: native.SerializeToString(), OIP: given.SerializeToString()}


async def drive(target: str, method: str, data: bytes, calls: int) -> None:
    """Make calls from `CALLERS` closed loops on one channel."""
    left = iter(range(calls))
    async with grpc.aio.insecure_channel(target) as channel:
        call = channel.unary_unary(method)

        async def caller() -> None:
            for _ in left:
                await call(data)

        await asyncio.gather(*(caller() for _ in range(CALLERS)))


def measure(rounds: int, calls: int, console: Console, *flags: str) -> dict[str, list[float]]:
    """Return the server's ms of processor time a call, by method and for each round."""
    found: dict[str, list[float]] = {NATIVE: [], OIP: []}
    with tempfile.TemporaryDirectory() as folder:
        write_null(Path(folder))
        with service.running(Path(folder), *flags) as server:
            for number in track(range(rounds + 1), description="calls", console=console, transient=True):
                for method, data in requests().items():
                    before = server.cpu_seconds()
                    asyncio.run(drive(server.target, method, data, calls))
                    if number:  # the first round is the warm-up
                        found[method].append(1e3 * (server.cpu_seconds() - before) / calls)
    return found


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds; default: 7")
    parser.add_argument("--calls", type=int, default=3000, help="calls of each method in a round; default: 3000")
    parser.add_argument("--json", action="store_true", help="print the numbers of all rounds as JSON")
    parser.add_argument("flags", nargs="*", help="of the server, after --, such as -- --isolation none")
    options = parser.parse_args()
    found = measure(options.rounds, options.calls, Console(stderr=True), *options.flags)
    ratios = [one / native for one, native in zip(found[OIP], found[NATIVE], strict=True)]
    if options.json:
        print(json.dumps({**found, "ratios": ratios}))
    else:
        table = Table("method", "median ms a call", "least", "greatest")
        for name, values in ((NATIVE, found[NATIVE]), (OIP, found[OIP]), ("ratio", ratios)):
            table.add_row(name, *(f"{of(values):.3f}" for of in (statistics.median, min, max)))
        Console().print(table)
    sys.exit(statistics.median(ratios) > LIMIT)


if __name__ == "__main__":
    main()
