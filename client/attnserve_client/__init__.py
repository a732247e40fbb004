"""The client of attnserve: run models on a server, and get their outputs and attention as NumPy arrays.

    from attnserve_client import AttentionSelection, Client

    with Client("localhost:8001") as client:
        last_layer = AttentionSelection(layers=[-1], heads="mean", unit="word")
        result = client.infer("minilm", "a sentence", attention=last_layer)
        print(result.outputs["embedding"].shape)
        for link in result.attention[0].links(top=5):
            print(f"{link.query} looks at {link.key}: {link.weight:.2f}")

`attnserve_client.errors` has all errors, `attnserve_client.data_types` the types of arguments and results,
`attnserve_client.testing` a fake server for tests.
"""

from importlib.metadata import PackageNotFoundError, version

from attnserve_client._async.client import AsyncClient
from attnserve_client._attention import AttentionMap
from attnserve_client._features import AttentionFeatures
from attnserve_client._labels import Labels, LabelSelection
from attnserve_client._models import ModelInfo
from attnserve_client._receipts import Receipt, Run
from attnserve_client._results import InferenceResult, StreamAnswer
from attnserve_client._retry import RetryPolicy
from attnserve_client._selection import AttentionSelection
from attnserve_client._sync.client import Client
from attnserve_client._tokens import Link, Token
from attnserve_client.errors import (
    AttentionUnavailable,
    AttnserveError,
    DeadlineExpired,
    InvalidRequest,
    ModelNotFound,
    NotServing,
    Overloaded,
    ResponseTooLarge,
    ServerUnreachable,
)

__all__ = [
    "AsyncClient",
    "AttentionFeatures",
    "AttentionMap",
    "AttentionSelection",
    "AttentionUnavailable",
    "AttnserveError",
    "Client",
    "DeadlineExpired",
    "InferenceResult",
    "InvalidRequest",
    "LabelSelection",
    "Labels",
    "Link",
    "ModelInfo",
    "ModelNotFound",
    "NotServing",
    "Overloaded",
    "Receipt",
    "ResponseTooLarge",
    "RetryPolicy",
    "Run",
    "ServerUnreachable",
    "StreamAnswer",
    "Token",
    "__version__",
]

try:
    __version__ = version("attnserve")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "unknown"
