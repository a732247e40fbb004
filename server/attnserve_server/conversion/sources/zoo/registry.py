"""Which models the zoo has, by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from attnserve_server.conversion.sources.zoo.causal import CausalAttention
from attnserve_server.conversion.sources.zoo.cross import EncoderDecoder
from attnserve_server.conversion.sources.zoo.cross_modal import CrossModalEncoder
from attnserve_server.conversion.sources.zoo.linear import LinearAttention
from attnserve_server.conversion.sources.zoo.multi_scale import MultiScaleAttention
from attnserve_server.conversion.sources.zoo.self_attention import DenseAttention
from attnserve_server.conversion.sources.zoo.skeleton import Encoder, ZooModule, ZooSize
from attnserve_server.conversion.sources.zoo.sliding_window import SlidingWindowAttention
from attnserve_server.conversion.sources.zoo.top_k import TopKAttention

BUILDERS: dict[str, Callable[[ZooSize], ZooModule]] = {
    "self": partial(Encoder, attention=DenseAttention),
    "causal": partial(Encoder, attention=CausalAttention),
    "cross": EncoderDecoder,
    "sliding-window": partial(Encoder, attention=SlidingWindowAttention),
    "top-k": partial(Encoder, attention=TopKAttention),
    "linear": partial(Encoder, attention=LinearAttention),
    "multi-scale": partial(Encoder, attention=MultiScaleAttention),
    "cross-modal": CrossModalEncoder,
}
