"""The only room that knows gRPC and HTTP: decode, validate, encode, status."""

import os

# gRPC's core writes lines of its own to standard error, where ours are JSON; it reads this when it is first used.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
