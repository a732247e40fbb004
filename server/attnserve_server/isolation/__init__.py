"""What crosses between front processes, which serve gRPC, and the engine process of each model, which runs it."""
