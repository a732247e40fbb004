"""Types of what calls take and return, for annotations. The most used ones are in `attnserve_client` itself."""

from attnserve_client._credentials import Tls, TokenFile
from attnserve_client._features import SiteFeatures
from attnserve_client._gateways import ModelLoad, TokenizerFile
from attnserve_client._helpers import Ranked
from attnserve_client._inputs import Continuation, Input, Inputs, Priority
from attnserve_client._labels import Head, Label, LabeledSpan
from attnserve_client._models import Axis, ModelChange, Site
from attnserve_client._patches import Panel, PatchGrid
from attnserve_client._receipts import Timings
from attnserve_client._specs import Cache, IndexRange, Past, TensorSpec
from attnserve_client._tokens import RawLinks

__all__ = [
    "Axis",
    "Cache",
    "Continuation",
    "Head",
    "IndexRange",
    "Input",
    "Inputs",
    "Label",
    "LabeledSpan",
    "ModelChange",
    "ModelLoad",
    "Panel",
    "Past",
    "PatchGrid",
    "Priority",
    "Ranked",
    "RawLinks",
    "Site",
    "SiteFeatures",
    "TensorSpec",
    "Timings",
    "Tls",
    "TokenFile",
    "TokenizerFile",
]
