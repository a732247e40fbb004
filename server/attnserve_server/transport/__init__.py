"""The only room that knows gRPC and HTTP: decode, validate, encode, status."""
