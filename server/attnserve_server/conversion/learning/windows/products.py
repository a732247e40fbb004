"""The two products of a windowed site: the values that its scores and its output are made of."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from attnserve_server.conversion.base.sites import Probabilities
from attnserve_server.conversion.finders.decomposed_products import Product
from attnserve_server.conversion.learning.provenance import NotTraced


@dataclass(frozen=True, slots=True)
class Products:
    """The values that a site's scores and its output are the products of."""

    query: ir.Value
    key: ir.Value
    scores: ir.Value
    weights: ir.Value
    value: ir.Value
    of_scores: Product
    of_value: Product
    position: int


def products_of(site: Probabilities) -> Products:
    """Of a site with probabilities. Raises NotTraced where they are not multiplied as (..., rows, W) @ (..., W, D)."""
    of_value = Product.of(site.product)
    of_scores = Product.of(site.scores[0])
    assert of_value is not None
    if of_scores is None or len(site.scores) > 1:
        raise NotTraced("its scores are not one product")
    position = site.position
    if position or not of_value.terms[0].endswith("ij") or not of_value.terms[1].endswith("jk"):
        raise NotTraced("its weights and its value are multiplied in no known layout")
    return Products(
        query=of_scores.operand(0),
        key=of_scores.operand(1),
        scores=of_scores.node.outputs[0],
        weights=site.weights,
        value=of_value.operand(1 - position),
        of_scores=of_scores,
        of_value=of_value,
        position=position,
    )
