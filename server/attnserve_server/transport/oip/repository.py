"""Loads and unloads of models for clients of the protocol, over gRPC or REST."""

from __future__ import annotations

from collections.abc import Iterable

from attnserve_server.domain.errors import InvalidRequest, Unsupported, quoted
from attnserve_server.transport.admin import Lifecycle, ModelServicer
from attnserve_server.transport.dataplane import DataPlane
from attnserve_server.transport.oip import describe
from attnserve_server.transport.validation import check_model_reference


async def load(models: ModelServicer | None, name: str, parameters: Iterable[str]) -> None:
    """Load the highest version of a model.

    Args:
        models: whose lifecycle loads it; None without `--admin`.
        name: the model's name.
        parameters: names of those of the request; none is supported.

    Raises:
        Unsupported: The server was started without `--admin`.
        InvalidRequest: The name or a parameter is invalid.
        AttnserveError: As `Lifecycle.load`.
    """
    lifecycle = _lifecycle(models)
    _check(parameters, ())
    check_model_reference(name, "")
    await lifecycle.load(name)


async def unload(models: ModelServicer | None, plane: DataPlane, name: str, parameters: Iterable[str]) -> None:
    """Unload all versions of a model. Raises as `load`, and ModelNotFound if there is none."""
    lifecycle = _lifecycle(models)
    _check(parameters, ("unload_dependents",))
    for version in describe.versions(plane, name):
        await lifecycle.unload(name, version)


def _lifecycle(models: ModelServicer | None) -> Lifecycle:
    if models is None:
        raise Unsupported("models are not loaded and unloaded by callers of this server", "start it with --admin")
    return models.lifecycle


def _check(given: Iterable[str], known: tuple[str, ...]) -> None:
    for name in given:
        if name not in known:
            raise InvalidRequest.of(f"parameters[{quoted(name)}]", "not supported: leave it out")
