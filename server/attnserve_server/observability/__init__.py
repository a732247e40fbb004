"""Metrics, logs, and the readiness check of a container."""
