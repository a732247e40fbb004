"""From a selection and raw weights to maps. Pure functions on arrays."""

from attnserve_server.attention.answer import answer, predicted_bytes
from attnserve_server.attention.resolve import resolve
from attnserve_server.attention.units import check_units, continued_units, pooled_units

__all__ = ["answer", "check_units", "continued_units", "pooled_units", "predicted_bytes", "resolve"]
