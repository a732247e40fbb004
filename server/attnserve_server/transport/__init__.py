"""The only room that imports gRPC and HTTP: decode, validate, encode, status."""

import os

# Below errors, gRPC's core logs connections, which metrics count. It reads this when it is first used.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
