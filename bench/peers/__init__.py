"""Other serving systems beside this one, over the same model and workload: `python -m bench.peers`.

install says what each needs, servers how each is started and ended, load drives one, wires are their protocols; apps/
holds a small server for each, which its own virtual environment runs.
"""
