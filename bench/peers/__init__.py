"""Other serving systems (peers) and this one, over the same model and workload: `python -m bench.peers`.

`install` lists the packages of each system, `servers` starts and ends them, `load` drives them, `wires` are their
protocols. `runtimes` runs bare runtimes, `variants` are the forms of this server, `tables` sums up. `apps/` holds a
small program for each system, which runs in a separate virtual environment. A system that cannot be installed or does
not start is listed with the reason.
"""
