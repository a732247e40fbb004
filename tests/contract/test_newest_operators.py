"""The newest attention operators over a real server: mixed lengths share a batch, and each site has its weights.

The graph below has FlexAttention, Attention with counts of keys, and LinearAttention. It is converted for the test.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from attnserve_client import AsyncClient
from attnserve_server.app import Application
from attnserve_server.config import Settings
from attnserve_server.conversion.convert import PrepareRequest, prepare_bundle
from onnx import numpy_helper

LENGTHS = (7, 3, 5)
# float32 sums in another order.
TOLERANCE = 1e-6
SCORES = "float[B, H, L, S]"
GRAPH = f"""
<ir_version: 13, opset_import: ["" : 27, "ai.onnx.preview" : 1]>
newest (float[batch, seq, 8] x, int64[batch, seq] attention_mask) => (float[batch, seq, 8] y)
<int64[4] split = {{0, 0, 2, 4}}, int64[3] flat = {{0, 0, 8}}, int64[1] one = {{1}}> {{
    apart = Reshape(x, split)
    heads = Transpose <perm = [0, 2, 1, 3]> (apart)
    attended = ai.onnx.preview.FlexAttention <
        score_mod: graph = capped_triangle ({SCORES} s) => ({SCORES} t) <float most = {{2}}, int64 two = {{2}},
            int64 zero = {{0}}, int64 step = {{1}}, int64[1] last = {{-1}}, float low = {{-inf}}> {{
            a = Div(s, most)
            b = Tanh(a)
            c = Mul(b, most)
            sizes = Shape(s)
            length = Gather(sizes, two)
            places = Range(zero, length, step)
            of_query = Unsqueeze(places, last)
            earlier = GreaterOrEqual(of_query, places)
            t = Where(earlier, c, low)
        }},
        prob_mod: graph = half ({SCORES} p) => ({SCORES} r) <float part = {{0.5}}> {{ r = Mul(p, part) }}
    > (heads, heads, heads)
    back = Transpose <perm = [0, 2, 1, 3]> (attended)
    first = Reshape(back, flat)
    counts = ReduceSum <keepdims = 0> (attention_mask, one)
    second = Attention <q_num_heads = 2, kv_num_heads = 2> (x, x, x, , , , counts)
    rate = Sigmoid(rates)
    wide = MatMul(x, rate)
    beta = Sigmoid(wide)
    key = Tanh(x)
    third, state = LinearAttention <q_num_heads = 2, kv_num_heads = 2, update_rule = "delta"> (x, key, x, , , beta)
    sum = Sum(first, second, third)
    y = Identity(sum)
}}
"""


def graph() -> onnx.ModelProto:
    model = onnx.parser.parse_model(GRAPH)
    rates = np.random.default_rng(0).normal(size=(8, 2)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(rates, "rates"))
    return model


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[AsyncClient]:
    onnx.save(graph(), tmp_path / "newest.onnx")
    models = tmp_path / "models"
    prepare_bundle(PrepareRequest(file=tmp_path / "newest.onnx", name="newest", repository=models, max_length=32))
    # An overhead of a run that is worth any padding, so that one request's sequences share a run.
    settings = Settings(repository=models, grpc_port=0, http_port=0, instances=1, run_overhead_tokens=1_000_000)
    application = Application(settings)
    await application.start()
    async with AsyncClient(f"127.0.0.1:{application.grpc_port}") as opened:
        yield opened
    await application.aclose()


def expected_weights(x: np.ndarray) -> list[np.ndarray]:
    """Return the weights of the three sites by their definitions, float64 (H, T, T) each."""
    wide = x.astype(np.float64)
    heads = wide.reshape(len(x), 2, 4).transpose(1, 0, 2)
    scores = heads @ heads.swapaxes(1, 2) / 2

    def softmax(logits: np.ndarray) -> np.ndarray:
        exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
        return exponentials / exponentials.sum(axis=-1, keepdims=True)

    def sigmoid(values: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-values))

    rates = numpy_helper.to_array(graph().graph.initializer[-1]).astype(np.float64)
    beta = sigmoid(wide @ sigmoid(rates))
    keys = np.tanh(heads)
    implied = np.zeros_like(scores)
    for head in range(2):
        shares = np.zeros((4, len(x)))
        for place in range(len(x)):
            key = keys[head, place]
            unit = beta[place, head] * (np.eye(len(x))[place] - key @ shares)
            shares += key[:, None] * unit
            implied[head, place] = heads[head, place] @ shares / 2
    capped = np.where(np.tri(len(x), dtype=bool), 2 * np.tanh(scores / 2), -np.inf)
    return [softmax(capped) / 2, softmax(scores), implied]


async def test_weights_of_each_operator_are_those_of_its_definition(client: AsyncClient) -> None:
    rng = np.random.default_rng(1)
    each = [rng.normal(size=(length, 8)).astype(np.float32) for length in LENGTHS]
    results = await client.infer("newest", [{"x": x} for x in each], attention=True)
    assert {result.run.batch_size for result in results} == {len(LENGTHS)}
    for x, result in zip(each, results, strict=True):
        heads = x.reshape(len(x), 2, 4).transpose(1, 0, 2).astype(np.float64)
        output = np.zeros((2, len(x), 4))
        for found, weights in zip(result.attention, expected_weights(x), strict=True):
            np.testing.assert_allclose(found.weights, weights, rtol=0, atol=TOLERANCE)
            output += weights @ heads
        np.testing.assert_allclose(
            result.outputs["y"], output.transpose(1, 0, 2).reshape(len(x), 8), rtol=0, atol=10 * TOLERANCE
        )
    sites = (await client.model("newest")).sites
    assert [site.unavailable_reason for site in sites] == ["", "", ""]
