"""From a selection and raw weights to maps: resolve, crop, reduce, links. Pure functions on arrays."""

from attnserve_server.attention.answer import answer
from attnserve_server.attention.pooled import pooled_units
from attnserve_server.attention.resolve import resolve
from attnserve_server.attention.size import predicted_bytes
from attnserve_server.attention.units import check_units

__all__ = ["answer", "check_units", "pooled_units", "predicted_bytes", "resolve"]
