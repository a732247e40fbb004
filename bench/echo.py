"""The cost of the service itself: an identity model through `StreamInfer`, and a bare stream that echoes its bytes.

`python -m bench.echo --bare PORT_FILE BYTES` is the bare server, in a separate process; its unary answers have BYTES
bytes. `bench.floor` and `bench.calls` run it too. `bare` and `ratios` raise SystemExit with a message, so code 1, if a
server does not start, and `ratios` if it refuses a message. A failed conversion of the model raises
`subprocess.CalledProcessError`.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnx
import psutil
from attnserve.v1 import inference_service_pb2, tensor_pb2
from onnx import TensorProto, helper

from bench import service

WIDTH = 384
IN_FLIGHT = 8
"""Messages in flight: enough that neither side waits for the other."""
ANSWERED = 65_000
"""Bytes of the bare server's unary answers, unless its caller states others."""
_METHOD = "/attnserve.v1.InferenceService/StreamInfer"
UNARY = "/attnserve.v1.InferenceService/Infer"
_OPTIONS = [("grpc.max_receive_message_length", 64 << 20), ("grpc.max_send_message_length", 64 << 20)]


def write_bundle(folder: Path) -> None:
    """Write an identity of (batch, seq, 384) float32 as the bundle `echo`."""
    write_identity(folder, "echo", ("x", "y"), TensorProto.FLOAT, ["batch", "seq", WIDTH], "--max-length", "4096")


def write_identity(
    folder: Path, name: str, tensors: tuple[str, str], element: int, shape: list[str | int], *flags: str
) -> None:
    """Write an identity from the first tensor to the second as a bundle. `flags`: of `attnserve-server prepare`."""
    given, returned = (helper.make_tensor_value_info(tensor, element, shape) for tensor in tensors)
    graph = helper.make_graph([helper.make_node("Identity", [given.name], [returned.name])], name, [given], [returned])
    path = folder / f"{name}.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    line = [str(Path(sys.executable).with_name("attnserve-server")), "prepare", str(path), "--name", name, *flags]
    subprocess.run(
        [*line, "--repository", str(folder)], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def messages(count: int, per_message: int, tokens: Sequence[int]) -> list[bytes]:
    """Return stream messages of `per_message` sequences each, all different, so that nothing is cached."""
    random = np.random.default_rng(0)
    made = []
    at = 0
    for number in range(count):
        packed = []
        for _ in range(per_message):
            x = random.standard_normal((tokens[at % len(tokens)], WIDTH)).astype("<f4")
            tensor = tensor_pb2.Tensor(
                name="x", dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=list(x.shape), data=x.tobytes()
            )
            packed.append(inference_service_pb2.Sequence(tensors=inference_service_pb2.TensorInput(tensors=[tensor])))
            at += 1
        request = inference_service_pb2.InferRequest(model="echo", sequences=packed, request_id=str(number))
        made.append(inference_service_pb2.StreamInferRequest(request=request).SerializeToString())
    return made


async def rate(target: str, sent: list[bytes], seconds: float) -> tuple[float, int]:
    """Return messages a second through one stream with `IN_FLIGHT` in flight, and the number of refusals.

    The messages are sent in turns. There are many times as many as are in flight, because these must have different
    ids. Raise TimeoutError if no answer comes for 30 s.
    """
    assert len(sent) >= 4 * IN_FLIGHT
    refused = done = 0
    async with grpc.aio.insecure_channel(target, options=_OPTIONS) as channel:
        call = channel.stream_stream(_METHOD)()
        room = asyncio.Semaphore(IN_FLIGHT)

        async def write() -> None:
            # A separate task: a writer without a reader may wait without a limit.
            for message in itertools.cycle(sent):
                await room.acquire()
                await call.write(message)

        writer = asyncio.create_task(write())
        begun = time.perf_counter()
        while time.perf_counter() - begun < seconds:
            answer = await asyncio.wait_for(call.read(), 30)
            refused += len(answer) < 1000
            done += 1
            room.release()
        took = time.perf_counter() - begun
        writer.cancel()
        call.cancel()
    return done / took, refused


@contextmanager
def bare(answered: int = ANSWERED) -> Iterator[tuple[str, psutil.Process]]:
    """Run the echo in a separate process until the block ends; its unary answers have `answered` bytes."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "port")
        process = subprocess.Popen([sys.executable, "-m", "bench.echo", "--bare", str(file), str(answered)])
        try:
            until = time.monotonic() + service.START_TIMEOUT_S
            while not (file.exists() and file.stat().st_size):
                if process.poll() is not None or time.monotonic() > until:
                    sys.exit(f"the bare echo did not start within {service.START_TIMEOUT_S:g} s; its error is above")
                time.sleep(0.05)
            yield f"127.0.0.1:{json.loads(file.read_text())}", psutil.Process(process.pid)
        finally:
            process.terminate()
            process.wait(timeout=30)


def ratios(rounds: int, per_message: int, tokens: int, seconds: float = 1.5) -> dict[str, list[float]]:
    """Return sequences a second, bare and through the service, in interleaved rounds after one warm-up round."""
    sent = messages(8 * IN_FLIGHT, per_message, [tokens])
    found: dict[str, list[float]] = {"bare": [], "service": []}
    with tempfile.TemporaryDirectory() as folder:
        write_bundle(Path(folder))
        with bare() as (one, _), service.running(Path(folder)) as other:
            for _ in range(rounds + 1):
                for name, target in (("bare", one), ("service", other.target)):
                    per_s, refused = asyncio.run(rate(target, sent, seconds))
                    if refused:
                        sys.exit(f"{name}: {refused} messages were refused; a rate would not count them")
                    found[name].append(per_s * per_message)
    return {name: values[1:] for name, values in found.items()}


async def _serve(file: Path, answered: int) -> None:
    whole = b"a" * answered

    async def echo(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:  # noqa: ARG001 - gRPC's shape
        async for message in requests:
            yield message

    async def answer(_: bytes, __: Any) -> bytes:
        return whole

    server = grpc.aio.server(options=_OPTIONS)
    service_name, method = _METHOD[1:].split("/")
    handlers: dict[str, Any] = {
        method: grpc.stream_stream_rpc_method_handler(echo),
        UNARY.rpartition("/")[2]: grpc.unary_unary_rpc_method_handler(answer),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service_name, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    file.write_text(json.dumps(port))  # noqa: ASYNC240 - once, before the first request
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(_serve(Path(sys.argv[2]), int(sys.argv[3])))
