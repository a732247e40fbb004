"""Requests whose answers once depended on their batch: each has the answer that it has alone, or its model is refused.

The server puts all pending requests that may share a run into one run. `CASES` are graphs by number of the bug report,
each with a request, its neighbours and, for some, the right values. Needs `bench` of this checkout.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from attnserve_client import Client, InferenceResult
from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.convert import PrepareRequest, prepare_bundle
from attnserve_server.model.equality import WEIGHTS_PREFIX, Equality
from attnserve_server.model.manifest import BATCH
from attnserve_server.model.repository import Bundle

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from batching_cases import CASES, Case, windows_as_heads  # noqa: E402
from serving import serve  # noqa: E402

from bench.batching import FORCING, Alone, equality_of  # noqa: E402
from bench.batching_graphs import Array, Feeds  # noqa: E402


@dataclass(frozen=True, slots=True)
class Served:
    """A server over the cases that were converted, and the messages of the cases that were refused."""

    client: Client
    bundles: Mapping[str, Bundle]
    alone: Mapping[str, Alone]
    refused: Mapping[str, str]

    def together(self, name: str) -> list[InferenceResult]:
        """Send the request and its neighbours in one call. Return their answers."""
        attention = any(site.available for site in self.bundles[name].manifest.sites) or None
        return self.client.infer(slug(name), [CASES[name].request, *CASES[name].neighbours], attention=attention)


def slug(name: str) -> str:
    """Return the model name of a case."""
    return name.lower().replace(" ", "-")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("cases")
    bundles, alone, refused = {}, {}, {}
    for name, case in {**CASES, "C17": Case(windows_as_heads, {}, ())}.items():
        source = folder / f"{slug(name)}.onnx"
        source.write_bytes(case.graph().SerializeToString())
        request = PrepareRequest(
            file=source, name=slug(name), repository=folder / "models", max_length=case.max_length, fuse=False
        )
        try:
            bundles[name] = prepare_bundle(request)
        except BuildRefused as fault:
            refused[name] = str(fault)
        else:
            alone[name] = Alone(source, bundles[name])
    with serve(folder / "models", folder, *FORCING) as server, Client(server.target) as client:
        yield Served(client, bundles, alone, refused)


def answer_of(result: InferenceResult) -> dict[str, Array]:
    """Outputs, and weights by `attention.<site>`."""
    return dict(result.outputs) | {WEIGHTS_PREFIX + each.sites[0]: each.weights for each in result.attention}


def bare(graph: bytes) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def padded(each: Sequence[Feeds]) -> Feeds:
    """Sequences as one batch, zeros behind their ends."""
    longest = max(len(next(iter(feeds.values()))) for feeds in each)

    def whole(values: Array) -> Array:
        return np.pad(values, [(0, longest - len(values)), *[(0, 0)] * (values.ndim - 1)])

    return {name: np.stack([whole(feeds[name]) for feeds in each]) for name in each[0]}


@pytest.mark.parametrize("name", CASES)
def test_answer_beside_neighbours_is_the_answer_alone(served: Served, name: str) -> None:
    if name in served.refused:
        assert len(served.refused[name].split()) > 5, "a refusal is a sentence"
        return
    case, equality = CASES[name], equality_of(served.bundles[name].manifest)
    for feeds, result in zip([case.request, *case.neighbours], served.together(name), strict=True):
        found, alone = answer_of(result), served.alone[name].answer(feeds)
        assert found.keys() == alone.keys()
        errors = {each: equality.error(each, values, alone[each]) for each, values in found.items()}
        assert max(errors.values()) <= 1, (errors, result.run)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.right])
def test_right_values_come_from_the_server(served: Served, name: str) -> None:
    right = CASES[name].right
    assert right is not None
    if name not in served.refused:
        right(answer_of(served.together(name)[0]))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.axis])
def test_sharing_is_refused_with_a_reason(served: Served, name: str) -> None:
    if name in served.refused:
        return
    clause = served.bundles[name].manifest.certificate.clause(CASES[name].axis)
    assert not clause.allows("proved")
    assert clause.reason
    (result, *_) = served.together(name)
    lengths = {len(next(iter(feeds.values()))) for feeds in [CASES[name].request, *CASES[name].neighbours]}
    if CASES[name].axis == BATCH or len(lengths) > 1:
        assert result.run.batch_size < 1 + len(CASES[name].neighbours)


def test_windows_are_not_heads(served: Served) -> None:
    if "C17" in served.refused:
        assert len(served.refused["C17"].split()) > 5
        return
    (site,) = served.bundles["C17"].manifest.sites
    if not site.available:
        assert site.unavailable_reason
        return
    values = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    (weights,) = served.client.infer("c17", {"x": values}, attention=True).attention
    assert (site.heads, weights.weights.shape[1]) == (1, 16)
    windows = values.reshape(4, 4, 8)
    scores = np.exp(windows @ windows.transpose(0, 2, 1))
    right = scores / scores.sum(-1, keepdims=True)
    dense = weights.weights[0]
    # Float32 weights of one softmax.
    for number in range(4):
        block = slice(4 * number, 4 * number + 4)
        np.testing.assert_allclose(dense[block, block], right[number], atol=1e-5)
    assert np.isclose(dense.sum(), 16, atol=1e-4)


def test_saturated_sites_are_not_called_causal(served: Served) -> None:
    assert [site.kind for site in served.bundles["C4"].manifest.sites] == ["self"]


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.shows])
def test_bare_graph_gives_another_answer_beside_neighbours(name: str) -> None:
    """The control: without these the tests above could not fail."""
    case: Case = CASES[name]
    graph = case.graph().SerializeToString()
    session = bare(graph)
    (alone,) = session.run(None, padded([case.request]))
    (together,) = session.run(None, padded([case.request, *case.neighbours]))
    cut = tuple(slice(extent) for extent in alone[0].shape)
    assert Equality("fp32").error("y", together[0][cut], alone[0]) > 1


@pytest.mark.parametrize("name", ["C1", "C1 masked", "C1 fused", "C6"])
def test_bare_graph_alone_gives_the_right_values(name: str) -> None:
    case = CASES[name]
    session = bare(case.graph().SerializeToString())
    names = [output.name for output in session.get_outputs()]
    assert case.right is not None
    case.right(dict(zip(names, (each[0] for each in session.run(None, padded([case.request]))), strict=True)))
