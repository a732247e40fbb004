# Generated from _async/waiting.py by client/unasync.py: change that file, then run `make client`.
"""How to wait for a server in the client for threads: whether models are ready, and until they are."""

from __future__ import annotations

from attnserve.v1 import inference_service_pb2 as wire

from attnserve_client._inputs import check_timeout
from attnserve_client._models import model_of, why_not_ready
from attnserve_client._retry import DEFAULT_TIMEOUT_S, READY_TIMEOUT_S
from attnserve_client._sync.calls import Calls
from attnserve_client.errors import DeadlineExpired, ModelNotFound, NotServing

NOT_READY = "NOT_READY"
"""Reason of the error that this client raises."""
_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 1.0


class Waiting:
    """The methods of a client that check whether models are ready."""

    _calls: Calls

    def ready(self, model: str | None = None, *, timeout: float = READY_TIMEOUT_S) -> bool:
        """Return whether a version of a model is ready; without a name, whether one of every model is.

        Makes one attempt, or one for each address until one can be reached. Returns False for a server without models,
        and for one that cannot be reached or does not answer within `timeout` seconds.

        Raises:
            AttnserveError: The attempt failed in another way, or the client is closed.
        """
        return not self._why_not(model, timeout)

    def wait_ready(self, model: str | None = None, *, timeout: float | None = DEFAULT_TIMEOUT_S) -> None:
        """Return once `ready` is true: for code that starts together with its server.

        Args:
            model: Name of the model; None for one version of every model.
            timeout: Seconds to wait; None for no limit.

        Raises:
            DeadlineExpired: It is not ready within `timeout` seconds; the message has the last reason.
            AttnserveError: An attempt failed in another way, or the client is closed.
        """
        check_timeout(timeout)
        deadline, pause_s = self._calls.deadline(timeout), _FIRST_PAUSE_S
        while True:
            left_s = self._calls.left_s(deadline)
            why = self._why_not(model, READY_TIMEOUT_S if left_s is None else min(READY_TIMEOUT_S, left_s))
            if not why:
                return
            left_s = self._calls.left_s(deadline)
            if left_s is not None and left_s <= pause_s:
                what = "the server" if model is None else f"model {model!r}"
                problem = f"{what} was not ready within {timeout:g} s: {why}"
                raise DeadlineExpired(problem, code="DEADLINE_EXCEEDED", reason=NOT_READY)
            self._calls.pause(pause_s)
            pause_s = min(_LONGEST_PAUSE_S, 2 * pause_s)

    def _why_not(self, model: str | None, timeout_s: float) -> str:
        """Return why a model, or the server, is not ready; empty if it is."""
        try:
            if model is None:
                listed = self._calls.once(lambda stub: stub.ListModels, wire.ListModelsRequest(), timeout_s)
                return why_not_ready([model_of(each) for each in listed.models])
            request = wire.GetModelRequest(model=model)
            described = self._calls.once(lambda stub: stub.GetModel, request, timeout_s)
            return why_not_ready([model_of(described.model)])
        except (NotServing, ModelNotFound, DeadlineExpired) as error:
            return error.message or type(error).__name__
