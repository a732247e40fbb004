"""Load for a server and what it took: behind the command `attnserve bench`, which is what is public here.

lengths and workload say what is sent, load says when, sending says how; report says what came of it, and run joins
them.
"""
