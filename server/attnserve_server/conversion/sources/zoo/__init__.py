"""The zoo: small models of every form of attention, one short module each, seeded and made on the spot."""

from attnserve_server.conversion.sources.zoo.registry import BUILDERS
from attnserve_server.conversion.sources.zoo.skeleton import SIZES, ZooSize
from attnserve_server.conversion.sources.zoo.source import ZooModel, source_model

__all__ = ["BUILDERS", "SIZES", "ZooModel", "ZooSize", "source_model"]
