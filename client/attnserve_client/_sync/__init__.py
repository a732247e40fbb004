"""The client for threads, generated from `_async` by client/unasync.py. Do not edit it."""
