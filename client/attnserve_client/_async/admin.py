"""What operators do in the client for asyncio: load, unload and reload models of a running server."""

from __future__ import annotations

from attnserve.v1 import model_service_pb2 as wire

from attnserve_client._async.calls import AsyncCalls
from attnserve_client._inputs import check_timeout
from attnserve_client._models import ModelChange, ModelInfo, change_of, model_of
from attnserve_client._retry import LOAD_TIMEOUT_S


class AsyncAdmin:
    """The methods of a client that change the models of a server, which needs `serve --admin`.

    Each call changes the one server that answers it: with several addresses, use a client for each. With tokens, the
    scope `admin` is needed.
    """

    _calls: AsyncCalls

    async def load_model(self, name: str, version: str = "", *, timeout: float | None = LOAD_TIMEOUT_S) -> ModelInfo:
        """Load a version from the server's repository, and return its description once it is ready.

        One that is ready with the same files is left as it is. If its files were replaced, the new ones take the place
        of the earlier ones once they are ready; if they cannot be loaded, the earlier ones serve on.

        Args:
            name: Name of the model.
            version: Its version; empty for the highest of the repository.
            timeout: Seconds to wait; loading continues after that. None for no limit.

        Raises:
            ModelNotFound: The repository has none of that name, or not this version.
            ModelFailed: It cannot be loaded; `why` states the reason.
            Unsupported: The server was started without `--admin`.
            AttnserveError: The call failed in another way.
        """
        check_timeout(timeout)
        request = wire.LoadModelRequest(model=name, version=str(version))
        response = await self._calls.call(lambda stub: stub.LoadModel, request, self._calls.deadline(timeout))
        return model_of(response.model)

    async def unload_model(self, name: str, version: str, *, timeout: float | None = LOAD_TIMEOUT_S) -> None:
        """Unload a version, and return once its pending requests have been answered and its memory is free.

        It stays unloaded until `load_model` names it, or the server starts again.

        Args:
            name: Name of the model.
            version: Its version.
            timeout: Seconds to wait; unloading continues after that. None for no limit.

        Raises:
            ModelNotFound: The server does not hold this version.
            Unsupported: The server was started without `--admin`.
            AttnserveError: The call failed in another way.
        """
        check_timeout(timeout)
        request = wire.UnloadModelRequest(model=name, version=str(version))
        await self._calls.call(lambda stub: stub.UnloadModel, request, self._calls.deadline(timeout))

    async def reload_repository(self, *, timeout: float | None = LOAD_TIMEOUT_S) -> list[ModelChange]:
        """Compare the server's repository with what is loaded, and return what was changed, by name and version.

        Versions that are new, or failed before, are loaded, those whose files were replaced are replaced, and those
        whose folders were removed are unloaded. A version that cannot be loaded is a change with the outcome `failed`.

        Args:
            timeout: Seconds to wait; loading continues after that. None for no limit.

        Raises:
            RepositoryUnusable: The repository has no bundle, or cannot be read. Nothing was changed.
            Unsupported: The server was started without `--admin`.
            AttnserveError: The call failed in another way.
        """
        check_timeout(timeout)
        request = wire.ReloadRepositoryRequest()
        response = await self._calls.call(lambda stub: stub.ReloadRepository, request, self._calls.deadline(timeout))
        return [change_of(each) for each in response.changes]
