# Generated from _async/helpers.py by client/unasync.py: change that file, then run `make client`.
"""One-line calls of the client for threads: embeddings of texts, and texts ranked for a query."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from attnserve.v1 import inference_service_pb2 as wire

from attnserve_client._helpers import Ranked, embeds, named_output, only_model, ranked, ranks
from attnserve_client._inputs import Input, check_timeout, request_of, sequence_of
from attnserve_client._labels import LabelSelection
from attnserve_client._models import ModelInfo, model_of
from attnserve_client._results import InferenceResult, results_of
from attnserve_client._retry import DEFAULT_TIMEOUT_S
from attnserve_client._sync.models import Models
from attnserve_client.errors import InvalidRequest


class Helpers(Models):
    """The methods of a client for the usual tasks of a vector store or a search."""

    def embed(
        self,
        texts: str | Sequence[str],
        *,
        model: str = "",
        version: str = "",
        prompt_name: str | None = None,
        timeout: float | None = DEFAULT_TIMEOUT_S,
    ) -> npt.NDArray[Any]:
        """Return the embeddings of texts, as the model gives them.

        More texts than one request may hold become several requests, one after another.

        Args:
            texts: One text, or any number of them.
            model: Name of a model with an embedding output; empty for the only one of the server.
            version: Version of the model; empty for the highest that is ready.
            prompt_name: Name of the prompt to put before each text; None for the model's default, empty for none.
            timeout: Seconds until `DeadlineExpired`, all requests together; None for no limit.

        Returns:
            (D,) for one text, (N, D) for N texts.

        Raises:
            InvalidRequest: The model has no embedding output, or `model` is empty and not exactly one model has one.
            AttnserveError: A call failed.
        """
        deadline, described = self._chosen(model, version, timeout, "embeds", embeds)
        output = named_output(described)
        many = [texts] if isinstance(texts, str) else list(texts)
        rows: list[npt.NDArray[Any]] = []
        for part in _parts(many, described.max_batch_size):
            for result in self._ask((described.name, version), part, [output.name], None, prompt_name, deadline):
                rows.append(result.outputs[output.name])  # noqa: PERF401 - a list comprehension would not in turn
        if isinstance(texts, str):
            return rows[0]
        return np.stack(rows) if rows else np.empty((0, *output.sizes), output.dtype)

    def rerank(
        self,
        query: str,
        texts: Sequence[str],
        *,
        model: str = "",
        version: str = "",
        top_n: int | None = None,
        timeout: float | None = DEFAULT_TIMEOUT_S,
    ) -> list[Ranked]:
        """Return texts by their relevance to a query, the most relevant first, by a cross-encoder.

        More texts than one request may hold become several requests, one after another.

        Args:
            query: The query.
            texts: The texts to rank.
            model: Name of a model whose head gives a pair of texts one score; empty for the only one of the server.
            version: Version of the model; empty for the highest that is ready.
            top_n: Most texts to return; None for all.
            timeout: Seconds until `DeadlineExpired`, all requests together; None for no limit.

        Returns:
            For each text its index in `texts`, its score after the head's activation, and the text; equal scores in the
            order of `texts`.

        Raises:
            InvalidRequest: The model does not score pairs, or `model` is empty and not exactly one model does.
            AttnserveError: A call failed.
        """
        deadline, described = self._chosen(model, version, timeout, "scores pairs of texts", ranks)
        scores: list[float] = []
        for part in _parts([(query, text) for text in texts], described.max_batch_size):
            for result in self._ask((described.name, version), part, [], LabelSelection(top_k=1), None, deadline):
                assert result.labels is not None, "the request selects labels"
                scores.append(result.labels.labels[0].score)
        return ranked(texts, scores, top_n)

    def _chosen(
        self, model: str, version: str, timeout: float | None, does: str, fits: Any
    ) -> tuple[float | None, ModelInfo]:
        """Return the deadline of a call and its model: the named one, or the only one that fits."""
        check_timeout(timeout)
        deadline = self._calls.deadline(timeout)
        if model:
            described = self._description(model, version, deadline)
            return deadline, only_model([described], does, fits)
        response = self._calls.call(lambda stub: stub.ListModels, wire.ListModelsRequest(), deadline)
        return deadline, only_model([model_of(each) for each in response.models], does, fits)

    def _ask(
        self,
        model: tuple[str, str],
        inputs: Sequence[Input],
        outputs: list[str],
        labels: LabelSelection | None,
        prompt_name: str | None,
        deadline: float | None,
    ) -> list[InferenceResult]:
        request_id = uuid.uuid4().hex
        request = request_of(
            model=model[0],
            version=model[1],
            sequences=[sequence_of(each, None) for each in inputs],
            outputs=outputs,
            attention=None,
            labels=labels,
            prompt_name=prompt_name,
            priority="normal",
            request_id=request_id,
            validate_only=False,
        )
        try:
            response = self._calls.call(lambda stub: stub.Infer, request, deadline, request_id)
        except InvalidRequest:
            self._described.pop(model, None)  # the description may be that of a model since replaced
            raise
        return results_of(response, len(inputs), validate_only=False)


def _parts(inputs: Sequence[Any], most: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(inputs), most):
        yield inputs[start : start + most]
