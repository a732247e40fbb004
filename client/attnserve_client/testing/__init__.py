"""A server for your own tests: a real gRPC server on a loopback port, with made-up but valid answers.

    from attnserve_client import Client, Overloaded
    from attnserve_client.testing import FakeServer

    with FakeServer() as server, Client(server.target) as client:
        assert client.infer("fake", "a sentence").outputs["embedding"].shape == (16,)
        server.fail_next(server.overloaded(retry_delay_s=0.01))
        client.infer("fake", "again")  # the client's retry hides it
        assert len(server.requests) == 3

It needs nothing beyond what the client needs.
"""

from attnserve_client.testing._server import FakeServer

__all__ = ["FakeServer"]
