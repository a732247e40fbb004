"""What each operator makes of what is known of its inputs. Importing this package registers every rule."""

from attnserve_server.build.proof.rules import (
    control,
    fused,
    gathering,
    moving,
    pointwise,
    products,
    quantizing,
    reducing,
    shapes,
    sliding,
)

__all__ = [
    "control",
    "fused",
    "gathering",
    "moving",
    "pointwise",
    "products",
    "quantizing",
    "reducing",
    "shapes",
    "sliding",
]
