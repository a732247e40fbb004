"""Faults against real servers, and a check of everything that their callers got: `make faults` and `make soak`.

`python -m faults` runs the rows of `faults.rows`, `python -m faults.soak` a long mixed load. Both start servers as
processes, record every call (`history`) and check the record against a model of the service (`check`).
"""
