"""The load test behind the command `attnserve bench`. Only the command is public.

`lengths` and `workload` decide what is sent, `load` decides when, `sending` decides how; `report` computes the figures,
and `run` joins them.
"""
