"""The processes of one server: a supervisor, fronts that serve gRPC, and an engine for each model."""
