"""The client for asyncio. The client for threads in `_sync` is generated from it by client/unasync.py."""
