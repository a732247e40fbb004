"""Count the server modules that one `Infer` enters: a reader must open each of them to follow a request.

Needs `settings` of tests/contract/conftest.py, whose repository has the model `tiny`. Fails if more than `MAX_MODULES`
are entered.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Iterator
from types import FrameType

import grpc
import pytest
from attnserve.v1 import attention_pb2
from attnserve.v1 import inference_service_pb2 as pb
from attnserve.v1.inference_service_pb2_grpc import InferenceServiceStub
from attnserve_server.app import Application
from attnserve_server.config import Settings

MAX_MODULES = 42
PACKAGE = "attnserve_server."
REQUEST = pb.InferRequest(
    model="tiny",
    sequences=[pb.Sequence(text=pb.TextInput(text="the cat sat on a mat"))],
    attention=attention_pb2.AttentionSelection(layers=[-1], head_reduction=attention_pb2.HEAD_REDUCTION_MEAN),
)


class Recorder:
    """Collects the server's modules whose functions are called while `modules` is set, in every watched thread."""

    def __init__(self) -> None:
        self.modules: set[str] | None = None

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        name = frame.f_globals.get("__name__", "")
        if event == "call" and self.modules is not None and name.startswith(PACKAGE):
            self.modules.add(name.removeprefix(PACKAGE))


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    """Watches this thread and those that start later. It profiles, because coverage uses the trace function."""
    made = Recorder()
    threading.setprofile(made)
    sys.setprofile(made)
    yield made
    sys.setprofile(None)
    threading.setprofile(None)


async def test_infer_with_attention_enters_few_modules(recorder: Recorder, settings: Settings) -> None:
    server = Application(settings)
    await server.start()  # after the recorder, so that the instances' threads are watched too
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
            infer = InferenceServiceStub(channel).Infer
            await infer(REQUEST)  # fills caches, which every later request finds filled
            for watching in server._watching:  # looks at files and runs are part of no call
                watching.cancel()
            await asyncio.gather(*server._watching, return_exceptions=True)
            recorder.modules = modules = set[str]()
            answer = await infer(REQUEST)
            recorder.modules = None
    finally:
        await server.aclose()
    assert answer.results[0].attention.maps
    assert "engine.session" in modules, "the instance's thread was not watched"
    assert len(modules) <= MAX_MODULES, f"{len(modules)} modules: {', '.join(sorted(modules))}"
