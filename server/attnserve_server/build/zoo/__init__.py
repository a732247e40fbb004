"""The zoo: small models of every form of attention, one short module each, seeded and made on the spot.

With `build.torch_export`, `build.hugging_face` and `build.architectures`, the only place that imports torch.
"""

from attnserve_server.build.zoo.registry import BUILDERS
from attnserve_server.build.zoo.skeleton import SIZES, ZooSize
from attnserve_server.build.zoo.source import ZooModel, source_model

__all__ = ["BUILDERS", "SIZES", "ZooModel", "ZooSize", "source_model"]
