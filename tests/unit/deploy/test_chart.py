"""The Helm chart and the kustomize manifests: what they render and refuse, and whether Kubernetes knows each field.

No API server runs here. Objects are validated against the schemas of the packages kubernetes-validate (Kubernetes) and
@kubernetes-models (the Prometheus operator and KEDA). `play kube` runs the values of ci-values.yaml in `make e2e`.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import watching
import yaml
from attnserve_server.config import Settings, variable_of
from attnserve_server.model.repository import Repository
from attnserve_server.transport.peak import peak_of
from attnserve_server.transport.receiving import ReceiveBounds
from tiny_bundle import write_tiny_files, write_tiny_repository

pytest.importorskip("helm_python", reason="needs helm-python-sdk: pip install helm-python-sdk")
kubernetes_validate = pytest.importorskip(
    "kubernetes_validate", reason="needs kubernetes-validate: pip install kubernetes-validate"
)

DEPLOY = watching.DEPLOY
CHART = DEPLOY / "helm/attnserve"
VARIANTS = {path.stem: path for path in [*sorted((CHART / "ci").glob("*.yaml")), CHART / "ci-values.yaml"]}
KUBERNETES = ("1.25", "1.35")
"""The oldest that the chart admits, and a new one, which has images as volumes."""
CUSTOM = ("ServiceMonitor", "PrometheusRule", "ScaledObject")
MIB = 2**20
LEAST: dict[str, Any] = {"insecure": True, "models": {"hostPath": "/models"}}


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("render", DEPLOY / "render.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RENDER = script()


def merged(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    both = dict(one)
    for key, value in other.items():
        both[key] = merged(both[key], value) if isinstance(both.get(key), dict) and isinstance(value, dict) else value
    return both


def objects(values: dict[str, Any]) -> list[dict[str, Any]]:
    return [yaml.safe_load(text) for text in RENDER.documents(RENDER.rendered(values))]


def only(values: dict[str, Any], kind: str) -> dict[str, Any]:
    [found] = [one for one in objects(values) if one["kind"] == kind]
    return dict(found)


def variant(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load(VARIANTS[name].read_text()))


def container(deployment: dict[str, Any]) -> dict[str, Any]:
    return dict(deployment["spec"]["template"]["spec"]["containers"][0])


def variables(deployment: dict[str, Any]) -> dict[str, str]:
    return {one["name"]: one["value"] for one in container(deployment)["env"]}


def environment_of(folder: str) -> list[dict[str, Any]]:
    if shutil.which("kubectl") is None:
        pytest.skip("needs kubectl: apt-get install -y kubernetes-client")
    done = subprocess.run(
        ["kubectl", "kustomize", str(DEPLOY / "kustomize" / folder)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return [one for one in yaml.safe_load_all(done.stdout) if one]


def faults(every: list[dict[str, Any]], version: str) -> Iterator[str]:
    for one in every:
        if one["kind"] not in CUSTOM:
            try:
                kubernetes_validate.validate(one, version, strict=True)
            except kubernetes_validate.ValidationError as error:
                yield f"{one['kind']} {one['metadata']['name']}: {'.'.join(map(str, error.path))}: {error.message}"


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("name", VARIANTS)
def test_every_object_of_every_variant_is_valid(name: str, version: str) -> None:
    values = variant(name)
    if values["models"].get("image") and version == "1.25":
        assert list(faults(objects(values), version)), "the control: 1.25 has no images as volumes"
        return
    assert list(faults(objects(values), version)) == []


def test_validation_finds_an_unknown_field() -> None:
    deployment = only(LEAST, "Deployment")
    deployment["spec"]["template"]["spec"]["containers"][0]["livenessprobe"] = {}
    assert "livenessprobe" in "".join(faults([deployment], "1.35"))


@pytest.mark.slow
def test_custom_objects_are_valid() -> None:
    folder = DEPLOY.parent / ".schemas"
    if shutil.which("node") is None or not (folder / "node_modules").is_dir():
        pytest.skip("needs node and the packages of deploy/schemas: make schemas")
    shutil.copy(DEPLOY / "schemas/check.mjs", folder)
    every = [one for name in VARIANTS for one in objects(variant(name)) if one["kind"] in CUSTOM]
    assert {one["kind"] for one in every} == set(CUSTOM)

    def checked(given: list[dict[str, Any]]) -> subprocess.CompletedProcess[str]:
        line = ["node", str(folder / "check.mjs")]
        return subprocess.run(line, input=json.dumps(given), capture_output=True, text=True, timeout=120, check=False)

    done = checked(every)
    assert (done.returncode, done.stderr) == (0, "")
    unknown = json.loads(json.dumps(every))
    for one in unknown:
        one["spec"]["unheard"] = 1
    control = checked(unknown)
    assert control.returncode == 1
    assert control.stderr.count("'unheard'") + control.stderr.count('"unheard"') == len(every)


@pytest.mark.parametrize("name", VARIANTS)
def test_lint_finds_nothing_but_the_missing_icon(name: str) -> None:
    from helm_python import chart  # noqa: PLC0415 - after the skip above

    report = chart.lint(str(CHART), variant(name), strict=True)
    assert report["errors"] == []
    assert [message for message in report["messages"] if message["error"] != "icon is recommended"] == []


REFUSED = {
    "no models": ({"models": {"hostPath": ""}}, "models: 0 of claim, image, hostPath and inImage"),
    "two places of models": ({"models": {"claim": "a"}}, "models: 2 of claim"),
    "no TLS": ({"insecure": False}, "tls.secret is empty"),
    "no callers": ({"insecure": False, "tls": {"secret": "a"}}, "tokens.secret and tls.clientCaSecret are empty"),
    "clients without TLS": ({"tls": {"clientCaSecret": "a"}}, "client certificates need TLS"),
    "too little memory": ({"resources": {"limits": {"memory": "1487Mi"}}}, "is 1487 MiB, below the 1488 MiB"),
    "memory in megabytes": ({"resources": {"limits": {"memory": "1500M"}}}, "is 1430 MiB, below the 1488 MiB"),
    "a unit that is none": ({"resources": {"limits": {"memory": "2GB"}}}, "give it in Mi or Gi"),
    "scratch in memory": ({"scratch": {"inMemory": True}}, "below the 2512 MiB"),
    "a small scratch volume": ({"scratch": {"sizeMiB": 383}}, "below three times models.filesMiB, 384"),
    "grace below the drain": ({"gracePeriodS": 31}, "gracePeriodS is 31, below the 32 s"),
    "a budget for all replicas": ({"podDisruptionBudget": {"maxUnavailable": 2}}, "2 of 2 replicas"),
    "more at least than at most": ({"autoscaling": {"kind": "hpa", "minReplicas": 9}}, "minReplicas is 9, above"),
    "a share of no CPU": (
        {"autoscaling": {"kind": "hpa"}, "resources": {"requests": {"cpu": None}}},
        "autoscaling.cpuPercent is a share of resources.requests.cpu",
    ),
    "admin of several processes": ({"settings": {"admin": True, "isolation": "process"}}, "need settings.isolation"),
    "a scraper without a token": (
        {"serviceMonitor": {"enabled": True}, "tokens": {"secret": "a"}},
        "serviceMonitor.tokenSecret is empty",
    ),
    "a scraper without an authority": (
        {"serviceMonitor": {"enabled": True}, "tls": {"secret": "a"}},
        "serviceMonitor.caSecret is empty",
    ),
    "an unknown value": ({"replica": 2}, "replica"),
    "an unknown setting": ({"settings": {"max_batch": 2}}, "max_batch"),
    "a setting out of its range": ({"settings": {"look_ahead": 0}}, "look_ahead"),
    "instances by themselves": ({"settings": {"instances": 0}}, "instances"),
    "isolation by itself": ({"settings": {"isolation": "auto"}}, "isolation"),
    "a setting as a variable": ({"env": [{"name": "ATTNSERVE_HOST", "value": "::"}]}, "env"),
    "a setting that the chart derives": ({"settings": {"drain_grace_s": 60}}, "drain_grace_s"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_contradicting_values_are_refused_with_their_name(case: str) -> None:
    given, words = REFUSED[case]
    with pytest.raises(RENDER.Refused) as refused:
        objects(merged(LEAST, given))
    assert words in str(refused.value)


def test_grace_period_follows_the_drain() -> None:
    for drain, stop, grace in ((25, 5, 32), (60.5, 10, 73), (0, 0, 2)):
        deployment = only({**LEAST, "drainGraceS": drain, "preStopS": stop}, "Deployment")
        assert deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] == grace
        assert float(variables(deployment)["ATTNSERVE_DRAIN_GRACE_S"]) == drain
        sleep = container(deployment).get("lifecycle")
        assert sleep is None if not stop else f"time.sleep({stop})" in sleep["preStop"]["exec"]["command"][2]


def test_default_of_the_drain_is_the_server_s() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert values["drainGraceS"] == Settings.model_fields["drain_grace_s"].default


@pytest.mark.parametrize("isolation", ["none", "process"])
def test_formula_of_memory_is_the_server_s(tmp_path: Path, isolation: str) -> None:
    """It may exceed the server's, which knows that a model's largest run is below --max-batch-bytes."""
    repository = Repository(write_tiny_repository(tmp_path / "models", write_tiny_files(tmp_path)))
    bundles = [repository.bundle("tiny", "1"), repository.bundle("tiny", "2"), repository.bundle("plain", "1")]
    fronts = 2 if isolation == "process" else 0
    sizes = {"max_queue_bytes": 96 * MIB, "max_unread_bytes": 64 * MIB, "receive_budget_bytes": 48 * MIB}
    settings = {"isolation": isolation, "instances": 3, "fronts": 2, "max_batch_bytes": MIB, **sizes}
    loaded = Settings.load(settings)
    bounds = ReceiveBounds.of(loaded, [(bundle.manifest, 0) for bundle in bundles], max(1, fronts))
    peak = peak_of(bundles, loaded, bounds, fronts)
    models = {"hostPath": "/models", "count": 3, "filesMiB": 1, "sequenceMiB": 1}
    values = {**LEAST, "models": models, "settings": settings, "resources": {"limits": {"memory": "4Gi"}}}
    [notes] = [text for place, text in RENDER.rendered(values).items() if place.endswith("NOTES.txt")]
    stated = int(re.search(r"\((\d+) MiB at most", notes)[1])  # type: ignore[index]
    runs = 3 * 3 * 1
    assert peak.total - peak.runs <= (stated - runs) * MIB <= peak.total - peak.runs + 4 * MIB


def test_schema_describes_every_value_and_default() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())

    def compare(known: dict[str, Any], given: dict[str, Any], where: str) -> None:
        assert known["description"] if where else True, where
        if known.get("additionalProperties") is False:
            assert given.keys() <= known["properties"].keys(), where
            for name, one in known["properties"].items():
                assert len(one["description"]) > 3, f"{where}.{name}"
                if isinstance(given.get(name), dict):
                    compare(one, given[name], f"{where}.{name}")
            if where not in ("", ".settings"):
                assert given.keys() == known["properties"].keys(), where

    compare(schema, values, "")
    assert values.keys() == schema["properties"].keys() - {"global"}


def test_every_setting_is_a_value_or_derived_by_the_chart() -> None:
    settings = json.loads((CHART / "values.schema.json").read_text())["properties"]["settings"]["properties"]
    text = (CHART / "templates/deployment.yaml").read_text()
    rest = Settings.model_fields.keys() - settings.keys()
    constant = {"repository", "grpc_port", "http_port", "ports_file"}  # the image's, and of no use in a pod
    assert {name for name in rest - constant if f"{variable_of(name)}," not in text} == set()


@pytest.mark.parametrize("name", VARIANTS)
def test_variables_load_as_settings(name: str) -> None:
    """As the server reads them, large numbers included."""
    known = {variable_of(field): field for field in Settings.model_fields}
    given = {known[key]: value for key, value in variables(only(variant(name), "Deployment")).items() if key in known}
    for field in ("tls_cert", "tls_key", "tls_client_ca", "tokens_file"):
        given.pop(field, None)
    settings = Settings.load({**given, "insecure": "true"})
    values = merged(yaml.safe_load((CHART / "values.yaml").read_text()), variant(name))["settings"]
    assert settings.max_batch_bytes == values["max_batch_bytes"]
    assert settings.max_queue_size == values.get("max_queue_size", 4096)
    assert settings.verify_batches == values.get("verify_batches", 0)


def test_secrets_are_mounted_whole_so_that_renewed_files_arrive() -> None:
    deployment = only(variant("mutual-tls"), "Deployment")
    mounts = {one["name"]: one for one in container(deployment)["volumeMounts"]}
    assert {"tls", "client-ca"} <= mounts.keys()
    assert [mount for mount in mounts.values() if "subPath" in mount] == []
    settings = variables(deployment)
    assert settings["ATTNSERVE_TLS_CLIENT_CA"].startswith(mounts["client-ca"]["mountPath"])
    assert settings["ATTNSERVE_TLS_CERT"].startswith(mounts["tls"]["mountPath"])
    assert "ATTNSERVE_INSECURE" not in settings


@pytest.mark.parametrize("name", VARIANTS)
def test_every_pod_is_hardened_and_gets_no_variables_of_services(name: str) -> None:
    every = objects(variant(name))
    pods = [one["spec"] for one in every if one["kind"] == "Pod"]
    pods += [one["spec"]["template"]["spec"] for one in every if one["kind"] == "Deployment"]
    for pod in pods:
        assert pod["enableServiceLinks"] is False
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        for one in pod["containers"]:
            assert one["securityContext"]["readOnlyRootFilesystem"] is True
            assert one["securityContext"]["capabilities"]["drop"] == ["ALL"]
            assert "memory" in one["resources"]["limits"]


def test_insecure_is_stated_to_the_operator() -> None:
    def notes(values: dict[str, Any]) -> str:
        return next(text for place, text in RENDER.rendered(values).items() if place.endswith("NOTES.txt"))

    assert "INSECURE" in notes(LEAST)
    assert "Calls are not encrypted" in notes(LEAST)
    assert "INSECURE" not in notes(variant("secure"))


def test_probes_use_the_scheme_of_the_port() -> None:
    for name, scheme in (("insecure", "HTTP"), ("secure", "HTTPS")):
        one = container(only(variant(name), "Deployment"))
        gets = {kind: one[kind]["httpGet"] for kind in ("startupProbe", "livenessProbe", "readinessProbe")}
        assert {get["scheme"] for get in gets.values()} == {scheme}
        assert gets["readinessProbe"]["path"] == "/readyz"
        assert gets["livenessProbe"]["path"] == "/livez"


def test_budget_is_left_out_where_it_would_keep_a_node_from_being_drained() -> None:
    assert [one for one in objects({**LEAST, "replicas": 1}) if one["kind"] == "PodDisruptionBudget"] == []
    assert only(LEAST, "PodDisruptionBudget")["spec"]["maxUnavailable"] == 1


def test_autoscaled_deployment_states_no_replicas() -> None:
    assert "replicas" not in only(variant("secure"), "Deployment")["spec"]
    assert "replicas" not in only(variant("mutual-tls"), "Deployment")["spec"]


def test_query_of_keda_reads_metrics_of_the_server_and_holds_for_an_idle_release() -> None:
    trigger = only(variant("mutual-tls"), "ScaledObject")["spec"]["triggers"][0]
    query = trigger["metadata"]["query"]
    assert watching.metrics_in(query) == {"attnserve_queue_depth", "attnserve_sequences_total"}
    assert trigger["metadata"]["threshold"] == "0.1"
    if shutil.which("promtool") is None:
        pytest.skip("needs promtool: apt-get install -y prometheus")
    rules = {"groups": [{"name": "a", "rules": [{"record": "a:b:c", "expr": query}]}]}
    done = subprocess.run(
        ["promtool", "check", "rules", "/dev/stdin"], input=yaml.safe_dump(rules), capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_scraped_job_and_labels_are_those_of_the_rules() -> None:
    monitor = only(
        variant("gpu") | {"serviceMonitor": {"enabled": True, "tokenSecret": "a", "caSecret": "b"}}, "ServiceMonitor"
    )
    assert monitor["spec"]["jobLabel"] == "app.kubernetes.io/name"
    assert monitor["metadata"]["labels"]["app.kubernetes.io/name"] == "attnserve"
    [endpoint] = monitor["spec"]["endpoints"]
    labels = {one["targetLabel"]: one["replacement"] for one in endpoint["relabelings"]}
    assert labels["expected_provider"] == "CUDAExecutionProvider"
    rule = only(variant("secure"), "PrometheusRule")
    assert rule["spec"] == yaml.safe_load(watching.RULES.read_text())


def test_manifests_of_kustomize_are_those_of_the_chart() -> None:
    done = subprocess.run(
        [sys.executable, str(DEPLOY / "render.py"), "--check"], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("folder", ["base", "monitoring", "overlays/insecure", "overlays/gpu"])
def test_kustomize_builds_valid_objects(folder: str) -> None:
    every = environment_of(folder)
    assert every
    assert list(faults(every, "1.35")) == []


def test_overlay_without_tls_leaves_nothing_of_it() -> None:
    text = json.dumps(environment_of("overlays/insecure"))
    assert "ATTNSERVE_INSECURE" in text
    for trace in ("HTTPS", "TLS_CERT", "TOKENS_FILE", "/etc/attnserve"):
        assert trace not in text
        assert trace in json.dumps(environment_of("base")), "the control"


def test_values_for_podman_need_nothing_of_a_cluster() -> None:
    deployment = only(variant("ci-values"), "Deployment")
    assert deployment["spec"]["replicas"] == 1
    one = container(deployment)
    assert all("exec" in one[probe] for probe in ("startupProbe", "livenessProbe", "readinessProbe"))
    kinds = {
        volume["name"]: sorted(volume.keys() - {"name"}) for volume in deployment["spec"]["template"]["spec"]["volumes"]
    }
    assert kinds == {"models": ["hostPath"], "scratch": ["emptyDir"]}


def test_values_that_are_refused_are_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "values.yaml"
    path.write_text("insecure: true\n")
    line = [sys.executable, str(DEPLOY / "render.py"), "--values", str(path)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: models: 0 of claim")
