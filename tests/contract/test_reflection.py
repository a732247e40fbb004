"""With `--reflection`: a client without files learns every service, calls it, and lists the connections.

Needs the fixtures of tests/contract/conftest.py. The client is written here, from what reflection answers alone.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc
import pytest
from attnserve_server.app import Application
from attnserve_server.config import Settings
from attnserve_server.transport.reflection import Pools
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from grpc_channelz.v1 import channelz_pb2, channelz_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2 as pb

METHOD = "/grpc.reflection.{}.ServerReflection/ServerReflectionInfo"


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"reflection": True})


@pytest.fixture
async def opened(server: Application) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        yield channel


async def ask(channel: grpc.aio.Channel, version: str = "v1", **what: object) -> pb.ServerReflectionResponse:
    call = channel.stream_stream(METHOD.format(version))()
    await call.write(pb.ServerReflectionRequest(**what).SerializeToString())
    answer = await call.read()
    await call.done_writing()
    assert await call.code() is grpc.StatusCode.OK
    return pb.ServerReflectionResponse.FromString(answer)


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_every_service_is_listed(opened: grpc.aio.Channel, version: str) -> None:
    listed = await ask(opened, version, list_services="")
    assert [one.name for one in listed.list_services_response.service] == [
        "attnserve.v1.InferenceService", "grpc.channelz.v1.Channelz", "grpc.health.v1.Health",
        "grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection",
        "inference.GRPCInferenceService",
    ]  # fmt: skip


async def test_messages_of_a_private_pool_are_found(opened: grpc.aio.Channel) -> None:
    found = await ask(opened, file_containing_symbol="inference.GRPCInferenceService")
    (sent,) = found.file_descriptor_response.file_descriptor_proto
    file = descriptor_pb2.FileDescriptorProto.FromString(sent)
    assert [one.name for one in file.service] == ["GRPCInferenceService"]


async def test_a_client_without_files_calls_a_method(opened: grpc.aio.Channel) -> None:
    found = await ask(opened, file_containing_symbol="attnserve.v1.InferenceService")
    pool = descriptor_pool.DescriptorPool()
    sent = found.file_descriptor_response.file_descriptor_proto
    files = {file.name: file for file in map(descriptor_pb2.FileDescriptorProto.FromString, sent)}

    def add(name: str) -> None:
        file = files.pop(name, None)
        if file is not None:
            for needed in file.dependency:
                add(needed)
            pool.Add(file)

    add("attnserve/v1/inference_service.proto")
    method = pool.FindServiceByName("attnserve.v1.InferenceService").methods_by_name["ListModels"]
    kind = message_factory.GetMessageClass(method.output_type)
    answer = kind.FromString(await opened.unary_unary("/attnserve.v1.InferenceService/ListModels")(b""))
    assert [one.name for one in answer.models] == ["plain", "tiny", "tiny"]


async def test_an_unknown_symbol_is_an_answer_and_no_error(opened: grpc.aio.Channel) -> None:
    found = await ask(opened, file_containing_symbol="no.such.Thing")
    assert found.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]


async def test_malformed_bytes_are_an_invalid_argument(opened: grpc.aio.Channel) -> None:
    call = opened.stream_stream(METHOD.format("v1"))()
    await call.write(b"\xff")
    assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_channelz_shows_the_calls_of_the_server(opened: grpc.aio.Channel) -> None:
    stub = channelz_pb2_grpc.ChannelzStub(opened)
    servers = await stub.GetServers(channelz_pb2.GetServersRequest())
    assert any(one.data.calls_started >= 1 for one in servers.server)
    with pytest.raises(grpc.aio.AioRpcError) as unknown:
        await stub.GetSocket(channelz_pb2.GetSocketRequest(socket_id=2**40))
    assert unknown.value.code() is grpc.StatusCode.NOT_FOUND


async def test_without_the_flag_there_is_neither(tiny_repository: object) -> None:
    server = Application(Settings(repository=tiny_repository, grpc_port=0, http_port=0))
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
            for method in (METHOD.format("v1"), "/grpc.channelz.v1.Channelz/GetServers"):
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await channel.unary_unary(method)(b"")
                assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
    finally:
        await server.aclose()


def test_another_pool_is_searched_after_the_default_one() -> None:
    other = descriptor_pool.DescriptorPool()
    other.Add(descriptor_pb2.FileDescriptorProto(name="only/here.proto", package="only.here"))
    assert Pools(other).FindFileByName("only/here.proto").package == "only.here"
    with pytest.raises(KeyError):
        Pools().FindFileByName("only/here.proto")
