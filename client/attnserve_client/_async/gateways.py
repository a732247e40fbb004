"""What gateways call in the client for asyncio: the load of models, and their tokenizers."""

from __future__ import annotations

from attnserve.v1 import inference_service_pb2 as wire

from attnserve_client._async.calls import AsyncCalls
from attnserve_client._gateways import ModelLoad, Pieces, TokenizerFile, load_of
from attnserve_client._inputs import check_timeout
from attnserve_client._retry import DEFAULT_TIMEOUT_S


class AsyncGateways:
    """The methods of a client for programs that choose a server by its load, or tokenize texts themselves."""

    _calls: AsyncCalls

    async def loads(self, model: str = "", *, timeout: float | None = DEFAULT_TIMEOUT_S) -> list[ModelLoad]:
        """Return what waits and runs of each version of a model, or of all models, by name and version.

        With several addresses, it is the load of the one that answers: use a client for each.

        Args:
            model: Name of the model; empty for all.
            timeout: Seconds until `DeadlineExpired`; None for no limit.

        Raises:
            ModelNotFound: The server has no model of that name.
            AttnserveError: The call failed in another way.
        """
        check_timeout(timeout)
        request = wire.GetLoadRequest(model=model)
        response = await self._calls.call(lambda stub: stub.GetLoad, request, self._calls.deadline(timeout))
        return [load_of(each) for each in response.models]

    async def tokenizer(
        self, model: str, version: str = "", *, timeout: float | None = DEFAULT_TIMEOUT_S
    ) -> TokenizerFile:
        """Return the tokenizer file of a model, its digest checked, and what the server sets beside it.

        Args:
            model: Name of the model.
            version: Its version; empty for the highest that is ready.
            timeout: Seconds until `DeadlineExpired`, all pieces together; None for no limit.

        Raises:
            ModelNotFound: The server has no model of that name and version.
            TextUnavailable: The model has no tokenizer.
            BadAnswer: The file does not have its digest.
            AttnserveError: The call failed in another way.
        """
        check_timeout(timeout)
        deadline = self._calls.deadline(timeout)
        pieces = Pieces()
        while True:
            request = wire.GetTokenizerRequest(model=model, version=str(version), offset=pieces.offset)
            file = pieces.add(await self._calls.call(lambda stub: stub.GetTokenizer, request, deadline))
            if file is not None:
                return file
