"""Other serving systems (peers) and this one, over the same model and workload: `python -m bench.peers`.

`install` lists the packages of each system, `servers` starts and ends them, `load` drives them, `wires` are their
protocols. `apps/` holds a small server for each, which runs in a separate virtual environment. A system that cannot be
installed or does not start is listed with the reason.
"""
