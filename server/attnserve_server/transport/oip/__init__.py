"""The Open Inference Protocol: an adapter on the data plane that all protocols share.

`layout` describes a model in the protocol's terms, `request` reads requests, `answer` writes answers, `describe` the
metadata, `servicer` and `stream` serve gRPC.
"""
