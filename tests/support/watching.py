"""The Prometheus rules and dashboard queries of deploy/, read from the files. A file that is missing raises OSError."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"
PROMETHEUS_CONFIG = DEPLOY / "prometheus/prometheus.yml"
RULES = DEPLOY / "prometheus/rules/attnserve.rules.yml"
RULE_TESTS = (DEPLOY / "prometheus/rules/attnserve.test.yml", DEPLOY / "prometheus/rules/attnserve.days.test.yml")
RUNBOOK = DEPLOY.parent / "docs/runbook.md"
DASHBOARD = DEPLOY / "grafana/attnserve.json"

# The only form of an alert: a recorded series, compared with a number.
_ALERT = re.compile(r"\s*(?P<data>[a-z_:0-9]+:[a-z_:0-9]+)\s*(?:==|!=|>=|<=|>|<)\s*-?[0-9.]+\s*", re.IGNORECASE)
_OURS = re.compile(r"\b(?:attnserve|grpc_server|process|python)_[a-z0-9_]+")


@dataclass(frozen=True, slots=True)
class Query:
    """A query and its place in the files."""

    where: str
    expr: str


def rules() -> list[dict[str, Any]]:
    """Every rule, in the order of evaluation."""
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def recordings() -> list[Query]:
    """The expressions that are recorded."""
    return [Query(f"record {rule['record']}", rule["expr"]) for rule in rules() if "record" in rule]


def alerts() -> list[dict[str, Any]]:
    """The alert rules."""
    return [rule for rule in rules() if "alert" in rule]


def alert_data(alert: Mapping[str, Any]) -> Query:
    """The recorded series that an alert compares, without its threshold: it has data when all is well, too.

    Raises ValueError for an alert of another form.
    """
    form = _ALERT.fullmatch(alert["expr"])
    if form is None:
        raise ValueError(f"{alert['alert']}: {alert['expr']!r} is not one recorded series compared with one number")
    return Query(f"alert {alert['alert']}", form["data"])


def dashboard() -> dict[str, Any]:
    """The dashboard."""
    return dict(json.loads(DASHBOARD.read_text()))


def panels() -> list[dict[str, Any]]:
    """Its panels, without the rows."""
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def panel_queries() -> list[Query]:
    """Every panel's queries, with variables in them still."""
    return list(_panel_queries())


def _panel_queries() -> Iterator[Query]:
    for panel in panels():
        for target in panel["targets"]:
            yield Query(f"panel {panel['title']!r} {target['refId']}", target["expr"])


def substituted(query: Query, variables: Mapping[str, str]) -> Query:
    """The query with the dashboard's variables replaced, longest name first. Raises ValueError if one is left."""
    expr = query.expr
    for name in sorted(variables, key=len, reverse=True):
        expr = expr.replace(f"${name}", variables[name])
    if "$" in expr:
        raise ValueError(f"{query.where}: no value for a variable in {expr!r}")
    return Query(query.where, expr)


def metrics_in(expr: str) -> set[str]:
    """The server's metrics that an expression reads; names of recorded series are none."""
    bare = re.sub(r'"[^"]*"', "", expr)
    bare = re.sub(r"[a-z_]+:[a-z_:0-9]+", "", bare)
    return set(_OURS.findall(bare))
