"""The files in deploy/ against each other and against the server's metrics and settings; no container runs here.

They are alerts, a dashboard and compose.yaml; the Dockerfile is read too. The tests that run promtool are skipped
without it.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import containers
import pytest
import watching
import yaml
from attnserve_server.config import Settings, variable_of
from attnserve_server.observability import probe
from attnserve_server.observability.metrics import SPECS, Metrics

ROOT = watching.DEPLOY.parent
SUFFIXES = ("_bucket", "_sum", "_count")
# Declared and read by no rule and no panel; each with its reason.
UNUSED: dict[str, str] = {
    "attnserve_connections_dropped_total": "callers that do not read harm themselves only",
    "attnserve_http_requests_total": "requests are counted by model and code, over all protocols",
    "attnserve_http_seconds": "queue and compute times are over all protocols",
    "attnserve_refusal_seconds": "for tests of overload: refusals are counted by cause in a panel",
    "attnserve_unread_bytes": "bounded, and large answers of slow readers are refused with a cause",
    "attnserve_log_lines_dropped_total": "the log states the number itself, once it is read again",
    "attnserve_spans_total": "lost spans harm no request, and the log states why exports fail",
    "attnserve_padded_tokens_total": "deprecated: exported for one release, for dashboards of users",
}


def exported() -> set[str]:
    """Every name that a query can use: those that a scrape declares, and the parts of histograms."""
    names = set()
    for family in Metrics().registry.collect():
        names.add(f"{family.name}_total" if family.type == "counter" else family.name)
        if family.type == "histogram":
            names.update(family.name + suffix for suffix in SUFFIXES)
    return names


def read_by_us() -> set[str]:
    queries = [*watching.recordings(), *watching.panel_queries()]
    return {name for query in queries for name in watching.metrics_in(query.expr)}


def family_of(name: str) -> str:
    histograms = {spec.name for spec in SPECS if spec.buckets}
    return next((name.removesuffix(s) for s in SUFFIXES if name.removesuffix(s) in histograms), name)


def test_every_metric_that_is_read_is_exported() -> None:
    assert read_by_us() - exported() == set()


def test_every_metric_that_is_declared_is_read_or_listed_with_a_reason() -> None:
    read = {family_of(name) for name in read_by_us()}
    assert {spec.name for spec in SPECS} - read == set(UNUSED)


def test_metrics_are_found_in_expressions_and_recorded_names_are_not() -> None:
    expr = 'sum(rate(attnserve_queue_seconds_bucket{x="attnserve_no"}[5m])) / model:attnserve_requests:rate5m'
    assert watching.metrics_in(expr) == {"attnserve_queue_seconds_bucket"}


def test_every_recorded_series_that_is_read_is_recorded() -> None:
    recorded = {rule["record"] for rule in watching.rules() if "record" in rule}
    texts = [rule["expr"] for rule in watching.rules()] + [query.expr for query in watching.panel_queries()]
    read = {name for text in texts for name in re.findall(r"\b[a-z_]+:[a-z_0-9]+:[a-z_0-9]+\b", text)}
    assert read - recorded == set()


@pytest.mark.parametrize("alert", watching.alerts(), ids=lambda alert: str(alert["alert"]))
def test_alert_compares_one_recorded_series_and_has_summary_threshold_and_runbook(alert: dict) -> None:
    recorded = {rule["record"] for rule in watching.rules() if "record" in rule}
    assert watching.alert_data(alert).expr in recorded
    assert alert["labels"]["severity"] in {"page", "ticket"}
    assert {"summary", "description", "threshold", "runbook"} <= alert["annotations"].keys()
    assert f"docs/runbook.md#{alert['alert'].lower()}" in alert["annotations"]["runbook"]


def entries() -> dict[str, str]:
    """The text of the runbook by its headings."""
    parts = re.split(r"^## (.*)$", watching.RUNBOOK.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def test_runbook_has_one_entry_for_each_alert_in_the_order_of_the_rules() -> None:
    assert [name for name in entries() if name.startswith("Attnserve")] == [one["alert"] for one in watching.alerts()]


@pytest.mark.parametrize("alert", watching.alerts(), ids=lambda alert: str(alert["alert"]))
def test_entry_states_severity_and_what_to_do_at_night(alert: dict) -> None:
    text = entries()[alert["alert"]].strip()
    assert text.startswith(f"*{alert['labels']['severity']}*")
    assert "**At night:**" in text


def test_alert_of_another_form_is_an_error() -> None:
    with pytest.raises(ValueError, match="not one recorded series"):
        watching.alert_data({"alert": "A", "expr": "rate(attnserve_requests_total[5m]) > 1"})


def test_every_alert_has_a_unit_test_that_fires_it() -> None:
    text = "".join(path.read_text() for path in watching.RULE_TESTS)
    assert [alert["alert"] for alert in watching.alerts() if alert["alert"] not in text] == []


@pytest.mark.parametrize("panel", watching.panels(), ids=lambda panel: str(panel["title"]))
def test_panel_has_a_description_a_unit_and_targets(panel: dict) -> None:
    assert len(panel["description"]) > 20
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    assert panel["targets"]
    assert all(target["datasource"] == panel["datasource"] for target in panel["targets"])
    identities = [target["refId"] for target in panel["targets"]]
    assert len(set(identities)) == len(identities)


def test_panels_fill_the_grid_without_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in watching.dashboard()["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24, panel["title"]
        taken |= cells
    ids = [panel["id"] for panel in watching.dashboard()["panels"]]
    assert len(set(ids)) == len(ids)


def test_dashboard_is_templated_and_every_variable_is_used() -> None:
    names = [variable["name"] for variable in watching.dashboard()["templating"]["list"]]
    assert names == ["datasource", "job", "instance", "model"]
    text = json.dumps(watching.panels())
    assert [name for name in names if f"${name}" not in text and f"${{{name}}}" not in text] == []


def test_panel_queries_use_known_variables_only() -> None:
    values = {"job": "j", "instance": "i", "model": "m", "__rate_interval": "1m"}
    for query in watching.panel_queries():
        watching.substituted(query, values)


def test_every_panel_query_looks_at_the_chosen_job_only() -> None:
    for query in watching.panel_queries():
        selectors = re.findall(r"[a-z_:0-9]+\{([^}]*)\}", query.expr)
        assert selectors, query
        assert all('job="$job"' in selector for selector in selectors), query


@pytest.mark.parametrize(
    "command",
    [
        ("check", "config", str(watching.PROMETHEUS_CONFIG)),
        ("check", "rules", str(watching.RULES)),
        *(("test", "rules", str(path)) for path in watching.RULE_TESTS),
    ],
    ids=" ".join,
)
def test_promtool_accepts(command: tuple[str, ...]) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("needs promtool: apt-get install -y prometheus")
    done = subprocess.run(["promtool", *command], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def compose() -> dict:
    return dict(yaml.safe_load((watching.DEPLOY / "compose.yaml").read_text()))


def test_compose_mounts_only_files_that_exist_and_all_of_them_read_only() -> None:
    for name, service in compose()["services"].items():
        for volume in (volume for volume in service["volumes"] if isinstance(volume, dict)):
            assert volume["read_only"] is True, (name, volume)
            if "$" not in volume["source"]:
                assert (watching.DEPLOY / volume["source"]).exists(), (name, volume)


def test_compose_hardens_every_service_and_publishes_on_loopback() -> None:
    for name, service in compose()["services"].items():
        assert service["cap_drop"] == ["ALL"], name
        assert "no-new-privileges:true" in service["security_opt"], name
        assert service["mem_limit"], name
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), name
    server = compose()["services"]["attnserve"]
    assert server["read_only"] is True
    assert server["user"] == "65532:65532"


def test_compose_pins_images_and_stops_later_than_the_drain() -> None:
    services = compose()["services"]
    assert all(re.search(r":v?\d+\.\d+\.\d+$", services[name]["image"]) for name in ("prometheus", "grafana"))
    grace_s = Settings.model_fields["drain_grace_s"].default
    assert int(services["attnserve"]["stop_grace_period"].removesuffix("s")) > grace_s


def test_prometheus_scrapes_the_service_that_compose_names() -> None:
    [scrape] = yaml.safe_load(watching.PROMETHEUS_CONFIG.read_text())["scrape_configs"]
    port = Settings.model_fields["http_port"].default
    assert scrape["job_name"] == "attnserve"
    assert scrape["static_configs"][0]["targets"] == [f"attnserve:{port}"]
    assert "attnserve" in compose()["services"]


def test_variables_in_dockerfile_and_compose_are_settings() -> None:
    known = {variable_of(field) for field in Settings.model_fields}
    dockerfile = re.findall(r"\b(ATTNSERVE_[A-Z_]+)=", (ROOT / "Dockerfile").read_text())
    given = set(dockerfile) | set(compose()["services"]["attnserve"]["environment"])
    assert given - known == set()
    assert {"ATTNSERVE_HOST", "ATTNSERVE_REPOSITORY"} <= set(dockerfile)


def test_dockerfile_runs_as_a_number_without_shell_forms_at_run_time() -> None:
    text = (ROOT / "Dockerfile").read_text()
    assert "# syntax=" not in text
    assert "<<" not in text
    assert re.findall(r"^USER (.*)$", text, re.MULTILINE) == ["65532:65532"]
    for instruction in ("ENTRYPOINT", "CMD"):
        assert all(line.startswith("[") for line in re.findall(rf"^{instruction} (.*)$", text, re.MULTILINE))
    [checked] = re.findall(r"^HEALTHCHECK [^[]*CMD (\[.*\])$", text, re.MULTILINE)
    assert json.loads(checked) == ["python", "-m", probe.__name__]
    ports = {str(Settings.model_fields[field].default) for field in ("grpc_port", "http_port", "rest_port")}
    assert set(re.search(r"^EXPOSE (.*)$", text, re.MULTILINE)[1].split()) == ports  # type: ignore[index]


def test_image_carries_one_runtime_only() -> None:
    stages = re.split(r"^FROM ", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    installs = {stage.split(" AS ")[1].split()[0]: stage for stage in stages if " install " in stage}
    assert installs.keys() == {"build-cpu", "build-gpu"}
    assert ".[otel,server]" in installs["build-cpu"]
    assert "gpu" not in installs["build-cpu"].partition("\n")[2]
    assert ".[otel,server-gpu]" in installs["build-gpu"]
    assert ",server]" not in installs["build-gpu"]


def test_probe_uses_the_variables_and_defaults_of_the_settings() -> None:
    fields = Settings.model_fields
    assert (variable_of("host"), variable_of("http_port")) == (probe.HOST_VARIABLE, probe.PORT_VARIABLE)
    assert (fields["host"].default, fields["http_port"].default) == (probe.DEFAULT_HOST, probe.DEFAULT_PORT)


def test_docker_context_holds_what_the_dockerfile_copies_and_nothing_else() -> None:
    ignored = (ROOT / ".dockerignore").read_text().split("\n")
    let_in = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    copies = re.findall(r"^COPY (?!--from)(.*)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    copied = {source for line in copies for source in line.split()[:-1]}
    assert ignored[1] == "*"
    assert copied == let_in
    assert all((ROOT / source).exists() for source in copied)


def test_ci_packages_are_sorted_and_unique() -> None:
    packages = Path(watching.DEPLOY / "ci-packages.txt").read_text().split()
    assert packages == sorted(set(packages))


def test_absent_container_tools_are_named_with_the_line_that_installs_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("os.geteuid", lambda: 0)
    reason = containers.missing_tools()
    assert reason.startswith("buildah, debootstrap, podman, prometheus, promtool, runc not found; apt-get install -y")
    assert {"buildah", "debootstrap", "podman", "prometheus", "runc"} <= set(reason.split())


def test_image_s_version_is_the_distribution_s() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    labelled = re.findall(r"^ARG VERSION=(.*)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert labelled == [project["version"]]


def test_compose_accepts_what_is_insecure_openly_and_the_image_does_not() -> None:
    assert compose()["services"]["attnserve"]["environment"]["ATTNSERVE_INSECURE"] == "true"
    settings = re.findall(r"^ENV(?:.*\\\n)*.*", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert any("ATTNSERVE_HOST=0.0.0.0" in text for text in settings)
    assert not any("ATTNSERVE_INSECURE" in text for text in settings)
