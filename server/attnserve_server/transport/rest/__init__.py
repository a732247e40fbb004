"""REST: adapters from HTTP to the data plane that gRPC uses too. None checks what the data plane checks."""
