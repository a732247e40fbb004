"""A fake server for tests of code that uses the client: real gRPC on a loopback port, made-up but valid answers.

    from attnserve_client import Client, Overloaded
    from attnserve_client.testing import FakeServer

    with FakeServer() as server, Client(server.target) as client:
        assert client.infer("fake", "a sentence").outputs["embedding"].shape == (16,)
        server.fail_next(server.overloaded(retry_delay_s=0.01))
        client.infer("fake", "again")  # succeeds, because the client retries
        assert len(server.requests) == 3

It needs no extra.
"""

from attnserve_client.testing._server import FakeServer

__all__ = ["FakeServer"]
