"""Runs models: collation, the runtime session, the executor and its threads, warm-up, golden answers, costs."""
