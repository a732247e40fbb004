"""The only room that imports gRPC and HTTP: decode, validate, encode, status."""

import os

# gRPC's core logs plain text to standard error, where the server logs JSON; it reads this when it is first used.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
