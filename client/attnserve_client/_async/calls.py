"""The attempts of a call in the client for asyncio: on which connection, and again after which failures."""

from __future__ import annotations

import asyncio

from attnserve.v1 import inference_service_pb2

from attnserve_client._connection import AsyncConnections, AsyncMethod, RequestT, ResponseT
from attnserve_client._race import AsyncRace
from attnserve_client._retry import Retrying
from attnserve_client._status import is_retryable
from attnserve_client.errors import AttnserveError, ServerUnreachable


class AsyncCalls:
    """Sends requests over the connections to a server, under a policy of retries."""

    def __init__(self, connections: AsyncConnections, retrying: Retrying) -> None:
        self._connections = connections
        self._retrying = retrying
        self._sleep = asyncio.sleep

    def deadline(self, timeout_s: float | None) -> float | None:
        """Return the time on the retry clock at which a timeout that starts now ends; None for no timeout."""
        return self._retrying.deadline(timeout_s)

    def left_s(self, deadline: float | None) -> float | None:
        """Return the seconds until a deadline of `deadline`, at least 0; None without one."""
        return None if deadline is None else max(0.0, deadline - self._retrying.clock())

    async def pause(self, wait_s: float) -> None:
        """Wait between two calls, in seconds."""
        await self._sleep(wait_s)

    async def reach(self, timeout_s: float | None) -> None:
        """Wait until a server can be reached, unless one has answered before, or the policy does not wait.

        A stream needs it, because it is opened once. Any answer will do, so failures of other kinds are not raised.

        Raises:
            ServerUnreachable: No server answered within `timeout_s` seconds.
        """
        if self._connections.lanes.reached or not self._retrying.policy.waits:
            return
        deadline = self.deadline(timeout_s)
        try:
            await self.call(lambda stub: stub.ListModels, inference_service_pb2.ListModelsRequest(), deadline)
        except ServerUnreachable:
            raise
        except AttnserveError:
            return  # the stream meets the same failure, and reports it

    async def call(
        self,
        method: AsyncMethod[RequestT, ResponseT],
        request: RequestT,
        deadline: float | None,
        request_id: str = "",
    ) -> ResponseT:
        """Send a request, again after each failure that allows it, until `deadline` on the retry clock.

        Raises:
            AttnserveError: The last attempt failed.
        """
        if self._retrying.policy.watches:
            return await self._watched(method, request, deadline, request_id)
        attempts = self._retrying.attempts(self._connections.lanes, deadline)
        while True:
            turn = attempts.begin()
            try:
                response = await self._connections.call(turn, method, request, attempts.remaining_s(), request_id)
            except AttnserveError as error:
                wait_s = attempts.wait_after(turn, error)
                if wait_s is None:
                    raise
            else:
                attempts.succeeded(turn)
                return response
            await self._sleep(wait_s)

    async def once(self, method: AsyncMethod[RequestT, ResponseT], request: RequestT, timeout_s: float) -> ResponseT:
        """Send a request once to a server that can be reached: at most one attempt to each address.

        Raises:
            AttnserveError: The attempt failed; ServerUnreachable if no address could be reached.
        """
        deadline = self._retrying.deadline(timeout_s)
        attempts = self._retrying.attempts(self._connections.lanes, deadline)
        while True:
            turn = attempts.begin()
            try:
                response = await self._connections.call(turn, method, request, attempts.remaining_s())
            except AttnserveError as error:
                self._connections.lanes.failed(turn, error)
                if not isinstance(error, ServerUnreachable) or attempts.made >= self._connections.lanes.peers:
                    raise
            else:
                self._connections.lanes.answered(turn)
                return response

    async def _watched(
        self, method: AsyncMethod[RequestT, ResponseT], request: RequestT, deadline: float | None, request_id: str
    ) -> ResponseT:
        """Do what `call` does under a policy that limits or hedges attempts."""
        attempts = self._retrying.attempts(self._connections.lanes, deadline)
        async with AsyncRace(self._connections, method, request, request_id) as race:
            race.start(attempts.begin(), attempts.remaining_s())
            while True:
                ended = await race.ended(attempts.patience_s())
                if ended is None:
                    late, again = attempts.overdue()
                    if late is not None:
                        race.cancel(late)
                    if again:
                        race.start(attempts.begin(), attempts.remaining_s())
                elif isinstance(ended.outcome, AttnserveError):
                    wait_s = attempts.wait_after(ended.turn, ended.outcome)
                    if race.running and is_retryable(ended.outcome):
                        continue  # the other attempt may still succeed
                    if wait_s is None:
                        raise ended.outcome
                    await self._sleep(wait_s)
                    race.start(attempts.begin(), attempts.remaining_s())
                else:
                    attempts.succeeded(ended.turn)
                    return ended.outcome
