# Generated from _async/faithful.py by client/unasync.py: change that file, then run `make client`.
"""How the client for threads measures whether a map shows what an output depends on: `faithfulness`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from attnserve_client._faithfulness import Faithfulness, cosine, judge, plan
from attnserve_client._labels import Label
from attnserve_client._models import ModelInfo
from attnserve_client._results import InferenceResult
from attnserve_client._retry import DEFAULT_TIMEOUT_S
from attnserve_client._selection import AttentionSelection
from attnserve_client.errors import InvalidRequest


class Faithful:
    """The method of a client that measures faithfulness."""

    infer: Any
    model: Any

    def faithfulness(  # noqa: PLR0913 - everything but model and text is passed by name
        self,
        model: str,
        text: str,
        *,
        version: str = "",
        attention: AttentionSelection | None = None,
        output: str = "",
        shares: Sequence[float] = (0.1, 0.2, 0.5),
        draws: int = 20,
        seed: int = 0,
        timeout: float | None = DEFAULT_TIMEOUT_S,
    ) -> Faithfulness:
        """Leave words out of a text, those of greatest weight and random ones, and compare the drops of its output.

        The output is the score of the text's best label; without labels, the cosine of an output with that of the whole
        text. Runs words + 2 * shares * (1 + draws) texts, in batches of the model's `max_batch_size`.

        Args:
            model: Name of the model; it takes text.
            text: The text, of at least two words.
            version: Version of the model; empty for the highest that is ready.
            attention: Selection of the map to judge, of one site or joined layers; None for the last layer, the mean
                over its heads. Its units are always words.
            output: Output whose cosine is compared; empty for the best label, or else `embedding`.
            shares: Shares of the words to leave out, above 0 and below 1; results are means over them.
            draws: Random choices of words, at least 2.
            seed: Seed of the choices and of the bootstrap.
            timeout: Seconds for each request.

        Raises:
            InvalidRequest: The text has fewer than two words, an argument is out of range, or the model has neither
                labels of a whole text nor such an output.
            AttnserveError: A call failed.

        Source: DeYoung et al. 2020, section 4.2.
        """
        chosen = replace(attention or AttentionSelection(layers=-1, heads="mean"), unit="word", special_tokens="drop")
        described = self.model(model, version, timeout=timeout)
        options = _options(described, output)
        whole = self.infer(model, text, version=version, attention=chosen, timeout=timeout, **options)
        if len(whole.attention) != 1:
            raise InvalidRequest.of(
                "attention", f"it selects {len(whole.attention)} maps; select one site, or join layers"
            )
        planned = plan(text, whole.attention[0], shares, draws, seed)
        results: list[InferenceResult] = []
        for start in range(0, len(planned.texts), described.max_batch_size):
            batch = list(planned.texts[start : start + described.max_batch_size])
            results += self.infer(model, batch, version=version, timeout=timeout, **options)
        if output or described.head is None:
            name = options["outputs"][0]
            values = [cosine(whole.outputs[name], each.outputs[name]) for each in results]
            return judge(planned, cosine(whole.outputs[name], whole.outputs[name]), values, f"cosine of {name}", seed)
        best = whole.labels[0]
        return judge(planned, best.score, [_score(each, best) for each in results], f"label {best.text}", seed)


def _options(model: ModelInfo, output: str) -> dict[str, Any]:
    """Return what to request: an output, or all labels."""
    if output or model.head is None:
        names = [spec.name for spec in model.outputs]
        name = output or "embedding"
        if name not in names:
            raise InvalidRequest.of("output", f"{name!r} is not one of {', '.join(names)}")
        return {"outputs": [name]}
    if model.head.kind != "sequence_labels":
        raise InvalidRequest.of("output", f"the labels are {model.head.kind}, not of a whole text; name an output")
    return {"outputs": [], "labels": {"top_k": max(1, len(model.head.labels))}}


def _score(result: InferenceResult, best: Label) -> float:
    """Return the score of one label; 0 if the server left it out."""
    assert result.labels is not None, "they were requested"
    return next((label.score for label in result.labels.labels if label.index == best.index), 0.0)
