"""The threads' side of a stream: what feeds it, and what ends it when nothing comes. The reader is `_client`'s."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Self

from attnserve.v1 import inference_service_pb2 as wire

from attnserve_client._exchange import Exchange, Flow
from attnserve_client._inputs import Input


class Watch:
    """Ends a stream that has stalled, from a thread of its own. `stop` is the reader's."""

    def __init__(self, exchange: Exchange, cancel: Callable[[], object]) -> None:
        self._exchange = exchange
        self._cancel = cancel
        self._stopped = threading.Event()
        self.stalled = False  # written by the thread before it cancels, read by the reader after
        if exchange.patience_s is not None:
            threading.Thread(target=self._run, args=(exchange.patience_s,), name="attnserve-watch", daemon=True).start()

    def _run(self, patience_s: float) -> None:
        while (left_s := self._exchange.stalled_in_s(patience_s)) > 0:
            if self._stopped.wait(left_s):
                return
        self.stalled = True
        self._cancel()

    def stop(self) -> None:
        """The stream is over."""
        self._stopped.set()


class Feed:
    """What gRPC's own thread takes the stream's requests from. `answered` and `close` are the reader's."""

    def __init__(
        self,
        inputs: Iterable[Input],
        sequence: Callable[[Input], wire.Sequence],
        message: Callable[[list[wire.Sequence]], wire.InferRequest],
        exchange: Exchange,
        flow: Flow,
    ) -> None:
        self._inputs = iter(inputs)
        self._sequence = sequence
        self._message = message
        self._exchange = exchange
        self._per_message = flow.per_message
        self._slots = threading.Semaphore(flow.max_in_flight)
        self._closed = threading.Event()
        self.error: Exception | None = None
        """Why there were no more inputs, for the reader to raise when what is under way has been answered."""

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> wire.StreamInferRequest:
        group = self._group()
        if group:
            try:
                return self._exchange.open(self._message(group))
            except Exception as error:  # noqa: BLE001 - the boundary to gRPC's thread: the reader raises it
                self.error = error
        raise StopIteration

    def _group(self) -> list[wire.Sequence]:
        """What one message takes of the inputs; what comes before a fault is sent all the same."""
        group: list[wire.Sequence] = []
        while len(group) < self._per_message and self.error is None:
            self._slots.acquire()
            if self._closed.is_set():
                return []
            try:
                group.append(self._sequence(next(self._inputs)))
            except StopIteration:
                break
            except Exception as error:  # noqa: BLE001 - the inputs' own, or an input that cannot be sent
                self.error = error
        return group

    def answered(self) -> None:
        """There is room for another."""
        self._slots.release()

    def close(self) -> None:
        """Nobody reads any more."""
        self._closed.set()
        self._slots.release()
