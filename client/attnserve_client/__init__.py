"""The client of attnserve: sequences in, outputs and the attention behind them out.

from attnserve_client import AttentionSelection, Client

with Client("localhost:8001") as client:
    result = client.infer("minilm", "a sentence", attention=AttentionSelection(layers=[-1], heads="mean", unit="word"))
    print(result.outputs["embedding"].shape)
    for link in result.attention[0].links(top=5):
        print(f"{link.query} looks at {link.key}: {link.weight:.2f}")
"""

from attnserve_client._async_client import AsyncClient
from attnserve_client._attention import AttentionMap
from attnserve_client._client import Client
from attnserve_client._errors import (
    AttentionUnavailable,
    AttnserveError,
    BadAnswer,
    DeadlineExpired,
    FieldViolation,
    InternalFault,
    InvalidRequest,
    ModelNotFound,
    NotServing,
    Overloaded,
    RequestCancelled,
    ResponseTooLarge,
    ServerUnreachable,
    TextUnavailable,
)
from attnserve_client._inputs import Input, Inputs, Priority
from attnserve_client._models import Axis, IndexRange, ModelInfo, Site, TensorSpec
from attnserve_client._patches import Panel, PatchGrid
from attnserve_client._results import InferenceResult, Receipt, Run, StreamAnswer
from attnserve_client._retry import RetryPolicy
from attnserve_client._selection import AttentionSelection
from attnserve_client._tokens import Link, RawLinks, Token

__all__ = [
    "AsyncClient",
    "AttentionMap",
    "AttentionSelection",
    "AttentionUnavailable",
    "AttnserveError",
    "Axis",
    "BadAnswer",
    "Client",
    "DeadlineExpired",
    "FieldViolation",
    "IndexRange",
    "InferenceResult",
    "Input",
    "Inputs",
    "InternalFault",
    "InvalidRequest",
    "Link",
    "ModelInfo",
    "ModelNotFound",
    "NotServing",
    "Overloaded",
    "Panel",
    "PatchGrid",
    "Priority",
    "RawLinks",
    "Receipt",
    "RequestCancelled",
    "ResponseTooLarge",
    "RetryPolicy",
    "Run",
    "ServerUnreachable",
    "Site",
    "StreamAnswer",
    "TensorSpec",
    "TextUnavailable",
    "Token",
]
