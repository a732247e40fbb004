# Generated from _async/models.py by client/unasync.py: change that file, then run `make client`.
"""How the client for threads looks models up."""

from __future__ import annotations

from attnserve.v1 import inference_service_pb2 as wire

from attnserve_client._inputs import check_timeout
from attnserve_client._models import ModelInfo, model_of
from attnserve_client._retry import DEFAULT_TIMEOUT_S
from attnserve_client._sync.calls import Calls


class Models:
    """The methods of a client that describe models. Descriptions are kept by name and version."""

    _calls: Calls
    _described: dict[tuple[str, str], ModelInfo]

    def models(self, *, timeout: float | None = DEFAULT_TIMEOUT_S) -> list[ModelInfo]:
        """Return all models of the server, by name and version.

        Raises:
            AttnserveError: The call failed, or took longer than `timeout` seconds.
        """
        check_timeout(timeout)
        deadline = self._calls.deadline(timeout)
        response = self._calls.call(lambda stub: stub.ListModels, wire.ListModelsRequest(), deadline)
        return [model_of(each) for each in response.models]

    def model(self, name: str, version: str = "", *, timeout: float | None = DEFAULT_TIMEOUT_S) -> ModelInfo:
        """Return the description of one model; of its highest ready version if `version` is empty.

        Raises:
            ModelNotFound: The server has no model of that name and version.
            AttnserveError: The call failed, or took longer than `timeout` seconds.
        """
        check_timeout(timeout)
        return self._model(name, version, self._calls.deadline(timeout))

    def _model(self, name: str, version: str, deadline: float | None) -> ModelInfo:
        request = wire.GetModelRequest(model=name, version=str(version))
        response = self._calls.call(lambda stub: stub.GetModel, request, deadline)
        return model_of(response.model)

    def _description(self, model: str, version: str, deadline: float | None) -> ModelInfo:
        known = self._described.get((model, version))
        if known is None:
            known = self._described[model, version] = self._model(model, version, deadline)
        return known
