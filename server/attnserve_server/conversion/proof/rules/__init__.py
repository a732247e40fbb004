"""One rule for each operator: what holds of a node's outputs, given what holds of its inputs.

`RULES` is the table of all rules. Importing this package imports every module of rules, and each registers its own.

A rule takes the interpretation (`Context`), the node and the values of its inputs (None: omitted), and returns the
value of each output. It reports a dependence on padding or on neighbours as a value with a worse standing and its
cause. It raises `NotFollowed` in a case that it does not cover, which the interpreter turns into `unknown`, and `Mixed`
where the sequence's own positions leave their places, which becomes `refuted`.
"""

from attnserve_server.conversion.proof.context import RULES
from attnserve_server.conversion.proof.rules import (
    arithmetic,
    attention,
    choosing,
    control,
    elementwise,
    embedding,
    gathering,
    joining,
    masking,
    normalizing,
    onnxruntime_attention,
    padding,
    pointwise,
    products,
    quantizing,
    recurrent,
    reducing,
    reshaping,
    scores,
    selecting,
    shapes,
    slicing,
    sliding,
    taps,
    tuples,
)

__all__ = [
    "RULES",
    "arithmetic",
    "attention",
    "choosing",
    "control",
    "elementwise",
    "embedding",
    "gathering",
    "joining",
    "masking",
    "normalizing",
    "onnxruntime_attention",
    "padding",
    "pointwise",
    "products",
    "quantizing",
    "recurrent",
    "reducing",
    "reshaping",
    "scores",
    "selecting",
    "shapes",
    "slicing",
    "sliding",
    "taps",
    "tuples",
]
