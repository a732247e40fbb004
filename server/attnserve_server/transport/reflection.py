"""gRPC's services about the server itself, with `--reflection`: its services and messages, and its connections.

The libraries grpcio-reflection and grpcio-channelz answer. Here their methods become handlers on bytes like all others,
so that scopes, metrics and statuses hold for them too.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from functools import partial
from typing import Any, Final

import grpc
from google.protobuf import descriptor_pool, message
from grpc_channelz.v1 import channelz, channelz_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

from attnserve_server.transport.rpc import Context
from attnserve_server.transport.servicer import RpcMetrics, receive_aside, send

REFLECTION: Final = ("grpc.reflection.v1alpha.ServerReflection", "grpc.reflection.v1.ServerReflection")
"""The service under both of its names. The messages of both are equal on the wire."""
CHANNELZ: Final = "grpc.channelz.v1.Channelz"
CHANNELZ_METHODS: Final = tuple(method.name for method in channelz_pb2.DESCRIPTOR.services_by_name["Channelz"].methods)


class Pools:
    """Descriptor pools that are searched in order: of messages that may not share the process's default pool."""

    def __init__(self, *others: descriptor_pool.DescriptorPool) -> None:
        self._pools: tuple[Any, ...] = (descriptor_pool.Default(), *others)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """Return a method of pools, such as `FindFileByName`. It raises KeyError if no pool has the name."""
        if not name.startswith("Find"):
            raise AttributeError(name)
        return partial(self._first, name)

    def _first(self, method: str, *arguments: Any) -> Any:
        for pool in self._pools:
            try:
                found = getattr(pool, method)(*arguments)
            except KeyError:
                continue
            if found or method != "FindAllExtensions":
                return found
        if method == "FindAllExtensions":
            return []
        raise KeyError(arguments[-1])


def reflecting(
    services: Iterable[str], metrics: RpcMetrics, pools: Sequence[descriptor_pool.DescriptorPool] = ()
) -> tuple[grpc.GenericRpcHandler, ...]:
    """Return the handlers of reflection, under both names, and of channelz.

    Args:
        services: full names of the services that the server has besides.
        metrics: of the RPCs.
        pools: descriptor pools besides the default one.
    """
    names = (*services, *REFLECTION, CHANNELZ)
    servicer = reflection.aio.ReflectionServicer(names, pool=Pools(*pools))
    handlers = [
        grpc.method_handlers_generic_handler(
            service,
            {
                "ServerReflectionInfo": grpc.stream_stream_rpc_method_handler(
                    metrics.measured("bidi_stream", service, "ServerReflectionInfo", partial(_reflect, servicer))
                )
            },
        )
        for service in REFLECTION
    ]
    calls: dict[str, Any] = {
        name: grpc.unary_unary_rpc_method_handler(metrics.measured("unary", CHANNELZ, name, partial(_look_up, name)))
        for name in CHANNELZ_METHODS
    }
    return (*handlers, grpc.method_handlers_generic_handler(CHANNELZ, calls))


async def _reflect(servicer: Any, _: object, context: Context) -> None:
    async def requests() -> AsyncIterator[message.Message]:
        while True:
            data: Any = await context.read()
            if data is grpc.aio.EOF:
                return
            yield (await receive_aside(reflection_pb2.ServerReflectionRequest, data)).message

    async for answer in servicer.ServerReflectionInfo(requests(), context):
        if not await send(context, answer.SerializeToString()):
            return


async def _look_up(name: str, data: bytes, context: Context) -> bytes:
    request = (await receive_aside(getattr(channelz_pb2, f"{name}Request"), data)).message
    answer = await getattr(channelz.aio.ChannelzServicer, name)(request, _Unset())
    if answer is None:
        await context.abort(grpc.StatusCode.NOT_FOUND, f"{name}: there is none of this id, or no more")
    found: bytes = answer.SerializeToString()
    return found


class _Unset:
    """Stands in for the context of a channelz method, which sets INTERNAL and a parser's text for an unknown id."""

    def set_code(self, _: grpc.StatusCode) -> None:
        """Leave the code to the caller of the method."""

    def set_details(self, _: str) -> None:
        """Leave the text to the caller of the method."""
