"""A real Prometheus over the container under load: every query that deploy/ ships must find data in it.

Needs `secured` of tests/e2e/conftest.py, a container with MiniLM, TLS and tokens, which skips the tests without root or
the container tools. Fails where a query finds no data in 10 s.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import watching
from attnserve_client import AttentionSelection, AttnserveError, Client
from attnserve_client.data_types import Tls
from scraping import Prometheus, prometheus_over, wait_until

pytestmark = pytest.mark.e2e

TEXTS = (
    "if processed: result.append(processed)",
    "The buyer agrees to assume all liabilities, except those specifically excluded in Schedule B.",
    "a short one",
    "long " * 200,
)
# Scrapes before the first query: rates need two, and recorded series build upon one another.
SCRAPES = 8
LOAD_TIMEOUT_S = 90.0
# A query may fall between two scrapes of a series that has just appeared.
QUERY_TIMEOUT_S = 10.0


def _call(client: Client, turn: int) -> None:
    """Make one call. Valid and invalid calls alternate by `turn`."""
    text = TEXTS[turn % len(TEXTS)]
    match turn % 8:
        case 0 | 1:
            client.infer("minilm", list(TEXTS))
        case 2:
            client.infer("minilm", text, attention=True)
        case 3:
            client.infer("minilm", text, attention=AttentionSelection(layers=[-1], heads="mean", unit="word", top_k=4))
        case 4:
            list(client.stream("minilm", TEXTS * 2, attention=AttentionSelection(layers=[0], dtype="float16")))
        case 5:
            client.infer("minilm", text, attention=AttentionSelection(layers=[99]))
        case 6:
            client.infer("minilm", list(TEXTS), timeout=0.003)
        case 7:
            client.model("minilm")


@pytest.fixture(scope="module")
def authority(secured, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of the authority that the server's certificate comes from."""
    path = tmp_path_factory.mktemp("authority") / "ca.pem"
    path.write_bytes(secured.files.authority.cert_pem.bytes())
    return path


@pytest.fixture(scope="module")
def load(secured, authority: Path) -> Iterator[None]:
    """Three callers that send one request after the other until the module's tests end."""
    stopping = threading.Event()

    def calls(offset: int) -> None:
        token = secured.tokens.secrets["caller"]
        with Client(secured.served.target, credentials=Tls(ca=authority), token=token) as client:
            turn = offset
            while not stopping.is_set():
                with contextlib.suppress(AttnserveError):
                    _call(client, turn)
                turn += 1

    callers = [threading.Thread(target=calls, args=(offset,)) for offset in (0, 3, 6)]
    for caller in callers:
        caller.start()
    yield
    stopping.set()
    for caller in callers:
        caller.join(timeout=60)


@pytest.fixture(scope="module")
def prometheus(secured, load: None, authority: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Prometheus with deploy/'s configuration, after a few scrapes of the loaded server, which reads a new token."""
    scrape = {
        "scheme": "https",
        "tls_config": {"ca_file": str(authority)},
        "authorization": {"credentials": secured.tokens.secrets["prometheus"]},
    }
    folder = tmp_path_factory.mktemp("prometheus")
    with prometheus_over(secured.served.http_port, folder, **scrape) as prometheus:
        secured.tokens.add("another", "infer")
        seen = f"count_over_time(model:attnserve_requests:rate5m[5m]) >= {SCRAPES}"
        wait_until(
            lambda: bool(prometheus.values(seen)),
            lambda: str(prometheus.get("targets")["activeTargets"]),
            LOAD_TIMEOUT_S,
        )
        yield prometheus


@pytest.fixture(scope="module")
def variables(prometheus: Prometheus) -> dict[str, str]:
    """The dashboard's variables as Grafana fills them: by their own queries, all values of those that take many."""
    values = {"__rate_interval": "1m"}
    for variable in watching.dashboard()["templating"]["list"]:
        if variable["type"] == "query":
            query = watching.substituted(watching.Query(variable["name"], variable["query"]["query"]), values)
            found = prometheus.label_values(query.expr)
            assert found, query
            values[variable["name"]] = "|".join(found) if variable["multi"] else found[0]
    return values


def assert_has_data(prometheus: Prometheus, query: watching.Query) -> None:
    wait_until(
        lambda: bool(prometheus.values(query.expr)), lambda: f"{query.where}: no data for {query.expr}", QUERY_TIMEOUT_S
    )


@pytest.mark.parametrize("query", watching.panel_queries(), ids=lambda query: query.where)
def test_panel_query_finds_data(prometheus: Prometheus, variables: dict[str, str], query: watching.Query) -> None:
    assert_has_data(prometheus, watching.substituted(query, variables))


@pytest.mark.parametrize("query", watching.recordings(), ids=lambda query: query.where)
def test_recording_rule_finds_data(prometheus: Prometheus, query: watching.Query) -> None:
    assert_has_data(prometheus, query)


@pytest.mark.parametrize("alert", watching.alerts(), ids=lambda alert: alert["alert"])
def test_alert_compares_a_series_that_has_data(prometheus: Prometheus, alert: dict) -> None:
    """The query is the alert without its threshold, which a healthy server does not exceed."""
    assert_has_data(prometheus, watching.alert_data(alert))


def test_query_of_an_unknown_metric_finds_no_data(prometheus: Prometheus) -> None:
    """The control: the tests above can fail."""
    assert prometheus.values("attnserve_no_such_metric") == []
    assert prometheus.values("0 / (0 * attnserve_queue_depth)") == []


def test_rules_evaluate_without_errors_and_nothing_fires(prometheus: Prometheus) -> None:
    groups = prometheus.get("rules")["groups"]
    faults = [(rule["name"], rule["lastError"]) for group in groups for rule in group["rules"] if rule.get("lastError")]
    assert faults == []
    assert sum(len(group["rules"]) for group in groups) == len(watching.rules())
    assert prometheus.get("query", query='ALERTS{alertstate="firing"}')["result"] == []


def test_scraped_provider_is_the_one_that_the_target_is_labelled_with(prometheus: Prometheus) -> None:
    assert prometheus.values("instance_model:attnserve_provider_unexpected:bool") == [0.0]
