"""A grpc.aio server by hand: MiniLM behind the unary method `/peer/Infer`, on loopback at the port in `PEER_PORT`.

The graph is the file in `PEER_MODEL`. A request is int64 ids of one sequence as bytes, its answer the float32 hidden
states (T, 384) as bytes. Two threads share one session; there is no batching. A port that is in use raises
RuntimeError, and KeyError ends the script without `PEER_MODEL`.
"""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
from model import PORT, run, session

model, threads = session(), ThreadPoolExecutor(2)


def answer(data):
    return run(model, [np.frombuffer(data, np.int64)])[0].tobytes()


async def infer(data, context):
    return await asyncio.get_running_loop().run_in_executor(threads, answer, data)


async def main():
    server = grpc.aio.server()
    method = grpc.unary_unary_rpc_method_handler(infer)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("peer", {"Infer": method}),))
    server.add_insecure_port(f"127.0.0.1:{PORT}")
    await server.start()
    await server.wait_for_termination()


asyncio.run(main())
